"""How much memory of the host is to be had, for what is kept there beside the devices (copies of weights), and in what pages."""

from __future__ import annotations

from pathlib import Path

from serving.errors import CapacityError
from serving.memory.budget import format_bytes

# Of a control group, as version 2 and version 1 name them: its limit, what it holds, and how that is made up.
_GROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
_CACHE = ("active_file", "inactive_file")  # pages of files, which give way


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that the kernel says are available, or that the control group of this container, as seen from `root`, leaves where
    that is less."""
    meminfo = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    found = [int(meminfo["MemAvailable"].split()[0]) << 10]
    groups = root / "sys/fs/cgroup"
    for limit, usage, stat in _GROUP_FILES:
        try:
            limit_bytes = int((groups / limit).read_text())
            parts = dict(line.split() for line in (groups / stat).read_text().splitlines())
            held_bytes = int((groups / usage).read_text()) - sum(int(parts.get(name, 0)) for name in _CACHE)
        except (OSError, ValueError):  # no such group, or one without a limit
            continue
        found.append(limit_bytes - held_bytes)
    return max(min(found), 0)


def huge_pages(root: Path = Path("/")) -> str:
    """Whether memory comes in huge pages: `always`, to who asks for them (`madvise`), or `never`, as where the kernel has none."""
    try:
        settings = (root / "sys/kernel/mm/transparent_hugepage/enabled").read_text().split()
    except OSError:
        return "never"
    return next((setting.strip("[]") for setting in settings if setting.startswith("[")), "never")


def require_available(what: str, needed_bytes: int) -> None:
    """Raises CapacityError, naming `what` and the missing bytes, where the host has fewer than `needed_bytes`."""
    missing_bytes = needed_bytes - available_bytes()
    if missing_bytes > 0:
        raise CapacityError(
            f"{what} need {format_bytes(needed_bytes)} of host memory and {format_bytes(needed_bytes - missing_bytes)} are "
            f"available; {missing_bytes} bytes ({format_bytes(missing_bytes)}) are missing"
        )
