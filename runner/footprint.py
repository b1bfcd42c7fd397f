"""What this process and all that descend from it hold of the machine: memory, descriptors, threads, and what they leave.

Linux only, as the workers are: everything is read from /proc and counted the moment it is asked for.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

_SHARED_MEMORY = Path("/dev/shm")
_IN_ROLLUP = ("Pss_Anon:", "Pss_Shmem:")


@dataclass(frozen=True)
class Footprint:
    """Sums over the processes. `memory_bytes` is resident anonymous and shared memory, a page that n processes map counted
    as an n-th in each (PSS), so once in the sum; pages of files (libraries), which the kernel shares with strangers and drops
    as it likes, are left out. `shm_bytes` is the shared part of it: rings, mailboxes, KV pages, host caches."""

    memory_bytes: int
    shm_bytes: int
    descriptors: int
    threads: int
    processes: int

    @classmethod
    def now(cls) -> Footprint:
        """Of this process and its descendants. One that ends meanwhile counts as far as it was seen."""
        memory = shared = descriptors = threads = 0
        alive = family()
        for pid in alive:
            folder = Path("/proc") / str(pid)
            try:
                anonymous, shm = _rollup(folder / "smaps_rollup")
                descriptors += len(os.listdir(folder / "fd"))
                threads += len(os.listdir(folder / "task"))
            except OSError:
                continue
            memory += anonymous + shm
            shared += shm
        return cls(memory, shared, descriptors, threads, len(alive))


def family() -> list[int]:
    """This process and its living descendants."""
    me = psutil.Process()
    return [me.pid, *(child.pid for child in me.children(recursive=True))]


def _rollup(path: Path) -> tuple[int, int]:
    """Anonymous and shared bytes."""
    kib = dict.fromkeys(_IN_ROLLUP, 0)
    for line in path.read_text().splitlines():
        name, *rest = line.split()
        if name in kib:
            kib[name] = int(rest[0])
    return kib[_IN_ROLLUP[0]] << 10, kib[_IN_ROLLUP[1]] << 10


def shared_memory_names() -> frozenset[str]:
    """What lies in /dev/shm."""
    return frozenset(os.listdir(_SHARED_MEMORY))


def held_shared_memory() -> set[str]:
    """Names in /dev/shm that this process or a descendant has mapped or open."""
    held: set[str] = set()
    for pid in family():
        folder = Path("/proc") / str(pid)
        try:
            targets = {line.split(maxsplit=5)[-1] for line in (folder / "maps").read_text().splitlines()}
            for number in os.listdir(folder / "fd"):
                with contextlib.suppress(OSError):  # closed since: the listing's own, if nothing else
                    targets.add(os.readlink(folder / "fd" / number))
        except OSError:
            continue
        held |= {path.removeprefix(f"{_SHARED_MEMORY}/") for path in targets if path.startswith(f"{_SHARED_MEMORY}/")}
    return held


def left_in_shared_memory(before: Iterable[str], held: Iterable[str]) -> list[str]:
    """Of the names that our processes `held` at any time, or hold now: those that are still in /dev/shm and were not there
    `before`. What is new there without us having held it is others'; they use the same folder."""
    return sorted((set(held) | held_shared_memory()) & shared_memory_names() - set(before))
