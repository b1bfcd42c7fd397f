"""`python -m serving.doctor`: what this machine can run, and why it cannot run the rest.

Looks, never changes anything. `run_all.sh` calls it in its preflight; every finding is a line with a verdict, and `--json`
gives the same for programs. Exit status 1 when not even the CPU backend can run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from serving.errors import UserError, command, one_line
from serving.memory.budget import format_bytes
from serving.memory.host import huge_pages

OK, NOTE, MISSING = "ok", "note", "missing"
_PACKAGES = ("torch", "triton", "transformers", "datasets", "hydra-core", "wandb", "seaborn", "pytest")
_CPU_FLAGS = ("avx512f", "avx512_bf16", "amx_bf16")
_LEAST_CORES, _LEAST_MEMORY_BYTES, _LEAST_DISK_BYTES = 2, 8 << 30, 5 << 30
_MAPS_WANTED = 65530  # one mapping a KV page where physical neighbours are not virtual ones


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, the verdict, and what was seen or what would be right."""

    what: str
    verdict: str
    detail: str


def examine() -> list[Finding]:
    """All findings, the CPU's first."""
    return [*_software(), *_cpu(), *_storage(), *_gpus()]


def _software() -> Iterator[Finding]:
    yield Finding("python", OK, platform.python_version())
    for name in _PACKAGES:
        try:
            yield Finding(name, OK, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, MISSING, "not installed; ./run_all.sh installs it")


def _cpu() -> Iterator[Finding]:
    cores = sorted(os.sched_getaffinity(0))
    enough = len(cores) >= _LEAST_CORES
    yield Finding("cores", OK if enough else MISSING, f"{len(cores)} usable; the CPU backend pins one worker to each")
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = set(next((line for line in info.splitlines() if line.startswith("flags")), "").split())
    model = next(
        (line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "unknown"
    )
    known = ", ".join(f"{flag} {'yes' if flag in flags else 'no'}" for flag in _CPU_FLAGS)
    yield Finding("cpu", OK, f"{model}; {known}")
    tso = platform.machine() in ("x86_64", "AMD64")
    yield Finding("store order", OK if tso else MISSING, f"{platform.machine()}; CPU mailboxes rely on x86-64's")
    yield Finding("memfd", *((OK, "available") if hasattr(os, "memfd_create") else (MISSING, "needs Linux")))
    pages = huge_pages()
    slower = "; so systems read weights slower, all of them" if pages == "never" else ""
    yield Finding("huge pages", NOTE if slower else OK, f"{pages}{slower}")
    maps = Path("/proc/sys/vm/max_map_count")
    if maps.exists():
        count = int(maps.read_text())
        yield Finding("vm.max_map_count", OK if count >= _MAPS_WANTED else NOTE, f"{count}; bounds the mapped KV pages")


def _storage() -> Iterator[Finding]:
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    enough = memory_bytes >= _LEAST_MEMORY_BYTES
    yield Finding(
        "memory", OK if enough else NOTE, f"{format_bytes(memory_bytes)}; {format_bytes(_LEAST_MEMORY_BYTES)} wanted"
    )
    free_bytes = shutil.disk_usage(Path.cwd()).free
    enough = free_bytes >= _LEAST_DISK_BYTES
    yield Finding(
        "disk",
        OK if enough else NOTE,
        f"{format_bytes(free_bytes)} free here; {format_bytes(_LEAST_DISK_BYTES)} wanted",
    )


def _gpus() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        yield Finding("gpu", NOTE, "torch is not installed, so none can be looked for")
        return
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "this torch is built without CUDA" if built is None else f"torch {built} sees no device"
        yield Finding("gpu", NOTE, f"none ({why}); CUDA runs are skipped")
        return
    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        capability = f"sm_{properties.major}{properties.minor}"
        yield Finding(
            f"gpu {index}",
            OK,
            f"{properties.name}, {capability}, {properties.multi_processor_count} SMs, "
            f"{format_bytes(free_bytes)} free of {format_bytes(total_bytes)}",
        )
    yield Finding("cuda", OK, f"runtime {torch.version.cuda}, driver {_driver_version()}")
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    blocked = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if pairs:
        detail = "every pair" if not blocked else f"not between {blocked}"
        yield Finding("peer access", NOTE if blocked else OK, detail)
    else:
        yield Finding("peer access", NOTE, "one GPU; both pools share it, each with a capped budget")
    yield _virtual_memory()
    mps = shutil.which("nvidia-cuda-mps-control")
    yield Finding(
        "MPS", OK if mps else NOTE, "control program found" if mps else "absent: co-located engines time-slice"
    )


def _virtual_memory() -> Finding:
    from serving.cuda import driver

    try:
        pages = {driver.granularity_bytes(index) for index in range(_cards())}
    except UserError as error:
        return Finding("virtual KV", MISSING, one_line(error))
    return Finding("virtual KV", OK, f"by driver calls, pages of {' or '.join(map(format_bytes, sorted(pages)))}")


def _cards() -> int:
    import torch

    torch.cuda.init()  # the driver's calls need it to be started
    return torch.cuda.device_count()


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.splitlines()[0].strip()


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.doctor", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    findings = examine()
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{finding.verdict:>8}  {finding.what:<18} {finding.detail}")
    return int(any(finding.verdict == MISSING for finding in findings))


if __name__ == "__main__":
    raise SystemExit(main())
