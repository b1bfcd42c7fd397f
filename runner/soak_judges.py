"""Whether a soak left anything behind: pure judgements over what was counted and sampled. Each can fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

FLAT = 0.05  # of the memory at half-time that it may move by until the end
_ENDS = ("completed", "rejected", "cancelled")


@dataclass(frozen=True)
class Judgement:
    """`value` is what was looked at, where that is one number."""

    name: str
    passed: bool
    said: str
    value: float | None = None


@dataclass(frozen=True)
class Left:
    """What is there after a system has stopped and was not before it started."""

    shared_memory: Sequence[str]
    processes: int
    descriptors: int


def second_half(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the tenth of `values` that follows their middle, and of the last tenth. Raises ValueError for none."""
    if not values:
        raise ValueError("no samples")
    tenth = max(1, len(values) // 10)
    middle = min(len(values) // 2, len(values) - tenth)
    return median(values[middle : middle + tenth]), median(values[-tenth:])


def judge(
    counts: Mapping[str, int],
    series: Mapping[str, Sequence[float]],
    pages: Mapping[str, int],
    left: Left,
    wrong: str = "",
) -> list[Judgement]:
    """All judgements of one soak. `pages` are in use at the end by pool; `wrong` says what went wrong on the way."""
    return [
        Judgement("run", not wrong, wrong or "nothing went wrong"),
        _memory(series.get("memory_bytes", ())),
        _no_more(series.get("descriptors", ()), "descriptors"),
        _no_more(series.get("threads", ()), "threads"),
        _accounted(counts),
        _pages(pages),
        Judgement(
            "shared memory", not left.shared_memory, f"left in /dev/shm: {', '.join(left.shared_memory) or 'none'}"
        ),
        Judgement("processes", left.processes <= 0, f"{left.processes} left", left.processes),
        Judgement("descriptors left", left.descriptors <= 0, f"{left.descriptors} left open", left.descriptors),
    ]


def _memory(values: Sequence[float]) -> Judgement:
    if not values:
        return Judgement("memory", False, "was never sampled")
    half, end = second_half(values)
    moved = end / half - 1
    said = f"{half / 2**20:.1f} MiB at half-time, {end / 2**20:.1f} MiB at the end; {FLAT:.0%} are allowed"
    return Judgement("memory", abs(moved) <= FLAT, said, moved)


def _no_more(values: Sequence[float], name: str) -> Judgement:
    if not values:
        return Judgement(name, False, "were never sampled")
    half, end = second_half(values)
    return Judgement(name, end <= half, f"{half:g} at half-time, {end:g} at the end", end - half)


def _accounted(counts: Mapping[str, int]) -> Judgement:
    """Every request ended once, as what it was meant to: those too long rejected and no other, those cancelled cancelled."""
    ends = {name: counts.get(name, 0) for name in _ENDS}
    sent, too_long, asked = (counts.get(name, 0) for name in ("sent", "too_long", "asked_to_cancel"))
    told = ", ".join(f"{count} {name}" for name, count in ends.items())
    said = f"{told} of {sent} sent; {too_long} were too long, {asked} were to be cancelled"
    passed = sent > 0 and sum(ends.values()) == sent and ends["rejected"] == too_long and ends["cancelled"] == asked
    return Judgement("requests", passed, said)


def _pages(pages: Mapping[str, int]) -> Judgement:
    held = {name: count for name, count in pages.items() if count}
    said = ", ".join(f"{name}: {count}" for name, count in held.items()) if held else "all free at the end"
    return Judgement("KV pages", bool(pages) and not held, said if pages else "were never reported")
