"""What the environment of the Python that runs this file still lacks, for scripts/setup_env.sh.

    python scripts/environment.py missing [extra...]     requirements of pyproject.toml that are not met, one a line
    python scripts/environment.py constraints [--own]    the pins to install under, one a line
    python scripts/environment.py pin torch              the pinned requirement of one package

Standard library and pip's own copy of `packaging` only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from importlib import metadata
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("torch", "triton")  # never replaced where a suitable one is there: they fit a machine's driver


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements(extras: list[str]) -> list[Requirement]:
    """The requirements of pyproject.toml that apply on this platform."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    found = [Requirement(line) for line in lines]
    return [requirement for requirement in found if requirement.marker is None or requirement.marker.evaluate()]


def missing(extras: list[str]) -> list[str]:
    """Requirements that no installed distribution meets."""
    unmet = []
    for requirement in requirements(extras):
        version = installed_version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name}{requirement.specifier}")
    return unmet


def pins() -> dict[str, str]:
    """constraints.txt as {name: pinned requirement}."""
    lines = (line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {canonicalize_name(line.split("==")[0]): line for line in lines if line and not line.startswith("#")}


def constraints(own: bool) -> list[str]:
    """Pins to install under. In an environment of our `own` all hold; in another's, only those of absent packages do, so
    that nothing there is replaced without need. Torch and Triton are held at the installed version in both."""
    held = []
    for name, pin in pins().items():
        version = installed_version(name)
        if version is not None and name in KEPT:
            held.append(f"{name}=={version}")
        elif version is None or own:
            held.append(pin)
    return held


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("missing").add_argument("extras", nargs="*")
    commands.add_parser("constraints").add_argument("--own", action="store_true")
    commands.add_parser("pin").add_argument("name")
    arguments = parser.parse_args(argv)
    if arguments.command == "missing":
        lines = missing(arguments.extras)
    elif arguments.command == "constraints":
        lines = constraints(arguments.own)
    else:
        lines = [pins()[canonicalize_name(arguments.name)]]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
