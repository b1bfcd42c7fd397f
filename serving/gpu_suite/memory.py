"""What virtual KV costs on a card: the driver's calls by page, whether they wait for a running kernel, and whether attention
reads mapped pages as fast as one allocation; and what a crossing costs, on one card
and between two, and an exchange among several."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from kernels.attention import decode_gqa
from kernels.bench.crossing import crossing_seconds
from kernels.bench.exchanging import question_seconds, sum_seconds
from kernels.mailbox import Mailbox, wait
from kernels.paged_kv import PagedKV
from serving.cuda import driver
from serving.cuda.build import open_peer_access
from serving.cuda.memory import CardMemory
from serving.errors import command
from serving.gpu_suite.results import save

_PAGE_BYTES = 2 << 20
_PAGES = 256
_WAIT_SPINS = 400_000  # some tenths of a second
_CROSSING_ROWS = (1, 4, 16)  # the last are 64 KiB
_EXCHANGED_ROWS = (1, 4, 256)
_TOKENS, _KV_HEADS, _DIM, _HEADS = 65536, 8, 128, 32


def _microseconds(run: Callable[[], object], count: int = 1) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / count * 1e6


def page_costs() -> dict[str, float]:
    """Microseconds a page of each call, over `_PAGES` pages one at a time, and of one access call for all."""
    address, handles = driver.reserve(_PAGES * _PAGE_BYTES), []
    places = [address + page * _PAGE_BYTES for page in range(_PAGES)]
    costs = {
        "create": _microseconds(lambda: handles.extend(driver.create(0, _PAGE_BYTES) for _ in places), _PAGES),
        "map": _microseconds(lambda: [driver.map_memory(a, _PAGE_BYTES, h) for a, h in zip(places, handles)], _PAGES),
        "allow": _microseconds(lambda: [driver.allow(0, place, _PAGE_BYTES) for place in places], _PAGES),
        "unmap": _microseconds(lambda: [driver.unmap(place, _PAGE_BYTES) for place in places], _PAGES),
        "map again": _microseconds(
            lambda: [driver.map_memory(a, _PAGE_BYTES, h) for a, h in zip(places, handles)], _PAGES
        ),
        "allow all at once": _microseconds(lambda: driver.allow(0, address, _PAGES * _PAGE_BYTES), _PAGES),
        "unmap all at once": _microseconds(lambda: driver.unmap(address, _PAGES * _PAGE_BYTES), _PAGES),
        "release": _microseconds(lambda: [driver.release(handle) for handle in handles], _PAGES),
    }
    driver.free_address(address, _PAGES * _PAGE_BYTES)
    return costs


def beside_a_waiting_kernel() -> dict[str, float]:
    """Milliseconds that each call takes while a kernel of another stream waits for `waiting kernel` ms: a call that takes as
    long has waited for the kernel."""
    device = torch.device("cuda", 0)
    mailbox = Mailbox.allocate(1, 1, 16, torch.float32, device)
    wait(mailbox, 0, 1, 16, 1)  # compiles
    stream = torch.cuda.Stream()
    fill = torch.zeros(1 << 20, device=device)
    torch.cuda.synchronize()
    address = driver.reserve(_PAGE_BYTES)
    handle = driver.create(0, _PAGE_BYTES)
    other = driver.create(0, _PAGE_BYTES)

    def launch_wait() -> None:
        with torch.cuda.stream(stream):
            wait(mailbox, 0, 1, 16, _WAIT_SPINS)

    def spell(run: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        launch_wait()
        start = time.perf_counter()
        run()
        taken = (time.perf_counter() - start) * 1e3
        torch.cuda.synchronize()
        return taken

    return {
        "waiting kernel": spell(stream.synchronize),
        "create": spell(lambda: driver.release(driver.create(0, _PAGE_BYTES))),
        "map": spell(lambda: driver.map_memory(address, _PAGE_BYTES, handle)),
        "allow": spell(lambda: driver.allow(0, address, _PAGE_BYTES)),
        "unmap": spell(lambda: driver.unmap(address, _PAGE_BYTES)),
        "release": spell(lambda: driver.release(other)),
        "torch allocates 64 MiB": spell(lambda: torch.empty(1 << 26, dtype=torch.uint8, device=device)),
        "torch fills": spell(lambda: fill.fill_(1.0)),
        "pinned copy": spell(lambda: torch.zeros(1024).pin_memory()),
    }


def attention_seconds(cache: torch.Tensor) -> float:
    """Median seconds of decode attention of one sequence over all of `cache` [tokens, 2, KH, d]."""
    table = torch.arange(_TOKENS // 64, dtype=torch.int32, device=cache.device)[None]
    lens = torch.full((1,), _TOKENS, dtype=torch.int32, device=cache.device)
    query = torch.randn(1, _HEADS, _DIM, device=cache.device, dtype=cache.dtype)
    kv = PagedKV(cache, 64, table, lens)
    times = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        decode_gqa(query, kv, _DIM**-0.5)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def mapped_against_allocated() -> dict[str, float]:
    """Microseconds of decode attention over 256 MiB of KV: one allocation, and pages mapped in order and shuffled."""
    shape = (_TOKENS, 2, _KV_HEADS, _DIM)
    flat = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    memory = CardMemory(torch.device("cuda", 0))
    count = flat.numel() * 2 // _PAGE_BYTES
    physical, results = memory.pages(count, _PAGE_BYTES), {"one allocation": attention_seconds(flat) * 1e6}
    for name, order in (("pages in order", range(count)), ("pages shuffled", [(i * 37) % count for i in range(count)])):
        region = memory.reserve(count * _PAGE_BYTES)
        for place, page in enumerate(order):
            region.map(place * _PAGE_BYTES, physical, page, 1)
        cache = region.tensor(0, shape, torch.bfloat16)
        cache.copy_(flat)
        results[name] = attention_seconds(cache) * 1e6
        torch.cuda.synchronize()
        del cache
        region.close()
    physical.close()
    return results


def crossings() -> dict[str, float]:
    """Microseconds one way, put to end of wait, of bfloat16 rows of 2,048: between two streams of a card, and where there are
    two cards between them."""
    cards = [torch.device("cuda", index) for index in range(min(2, torch.cuda.device_count()))]
    open_peer_access(cards)
    return {
        f"{'between cards' if other.index else 'within a card'}, {rows} rows": crossing_seconds(
            rows, 2048, cards[0], torch.bfloat16, other
        )
        * 1e6
        for other in cards
        for rows in _CROSSING_ROWS
    }


def exchanges() -> dict[str, float]:
    """Microseconds of a sum over 2, 3... cards of bfloat16 rows of 2,048, and of a question from one card to all others with the
    sum of their answers."""
    cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    open_peer_access(cards)
    found = {}
    for count in range(2, len(cards) + 1):
        for rows in _EXCHANGED_ROWS:
            among = cards[:count]
            found[f"sum over {count} cards, {rows} rows"] = sum_seconds(rows, 2048, among, torch.bfloat16) * 1e6
            asked = question_seconds(rows, 2048, cards[0], among[1:], torch.bfloat16)
            found[f"one card asks {count - 1}, {rows} rows"] = asked * 1e6
    return found


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.gpu_suite.memory", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    torch.zeros(1, device="cuda")
    results = {}
    for name, measure, unit in (
        ("page_us", page_costs, "us a page"),
        ("attention_us", mapped_against_allocated, "us"),
        ("beside_a_waiting_kernel_ms", beside_a_waiting_kernel, "ms"),
        ("crossing_us", crossings, "us"),
        ("exchange_us", exchanges, "us"),
    ):
        try:
            results[name] = measure()
        except Exception as error:  # noqa: BLE001  the next measurement may still work
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        text = ", ".join(
            f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}"
            for key, value in results[name].items()
        )
        print(f"row: {name} ({unit}): {text}", flush=True)
        save(args.out, results)
    return int(any("error" in result for result in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
