"""`python -m baselines.swap.bench`: what a load reaches of a plain copy, and how much of it hides behind computing.

The plain copy is one of the whole image, from the memory file that loads read too to huge pages that are there already, by one
thread on the core of the loading thread, in the same round: by memmove and by what loads copy with, whichever is faster. A load is *hidden* as far as computing goes on: with L the
seconds of the load alone and S what the decode steps of another, resident model take longer while it loads than right before
and after, the share is 1 - S / L. Rounds are few and machines shared, so medians stand beside their quartiles. The model that
computes runs whole decode steps: attention over its KV cache, FFN and head of all its layers.

On the device's own core a copy and a step take turns by nature: nothing of an unthrottled load can hide there, and of one over
a link only the time that it waits for the link. What hides is judged by the rows of the other core, which stands for a DMA
engine. Both are bound by one memory, which devices with memory of their own would not share.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from serving.checkpoints.make import default_directory, make_checkpoint
from serving.errors import UserError, command
from serving.interface import ServedModel
from serving.layers.batch import BatchLayout
from serving.memory import streaming
from serving.memory.kv_pool import cache_shape
from serving.memory.movable import MovableMemory
from serving.memory.virtual import VirtualRange
from serving.residency.arena import DeviceArena
from serving.residency.image import PAGE_BYTES, image_bytes, num_units
from serving.residency.loader import Loader
from serving.residency.store import HostStore, StoreClient
from serving.spec import load_spec

_BUSY, _COMES = 0, 1  # the model that computes, and the one that is loaded beside it
_STEPS_BESIDE = 8  # before and after each load, to know what a step takes here and now


@dataclass(frozen=True)
class Result:
    """One way to load: gigabytes a second of a plain copy and of the load alone, and the share of the load that is hidden, of
    each round."""

    cores: str
    link_gbps: float | None
    plain_gbps: Sequence[float]
    load_gbps: Sequence[float]
    hidden: Sequence[float]

    @property
    def row(self) -> str:
        link = "none" if self.link_gbps is None else f"{self.link_gbps:g}"
        shares = [load / plain for load, plain in zip(self.load_gbps, self.plain_gbps, strict=True)]
        plain, load = statistics.median(self.plain_gbps), statistics.median(self.load_gbps)
        return (
            f"{self.cores:>6} {link:>10} {plain:>10.2f} {load:>9.2f} {_spread(shares):>20} {_spread(self.hidden):>20}"
        )


def _spread(shares: Sequence[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(shares, n=4) if len(shares) > 1 else shares * 3
    return f"{middle:.0%} [{low:.0%}, {high:.0%}]"


class Bench:
    """Two models of one checkpoint, one resident, in a process pinned to one core."""

    def __init__(self, model: ServedModel, rounds: int, rows: int, context_tokens: int) -> None:
        self._models = [
            dataclasses.replace(model, spec=dataclasses.replace(model.spec, name=n)) for n in ("busy", "comes")
        ]
        self._rounds = rounds
        size = image_bytes(model)
        self._store = HostStore(2 * size, "lru")
        self._store.promise(dict(enumerate(self._models)))
        ref = self._store.ref
        own = dataclasses.replace(ref, directory_fd=os.dup(ref.directory_fd))  # a client closes its own
        self._client = StoreClient(own, self._models)
        self._client.prime((_BUSY, _COMES))
        self._arena = DeviceArena(2 * size // PAGE_BYTES, self._models)
        self._plain = MovableMemory(size // PAGE_BYTES, PAGE_BYTES)
        self._target = VirtualRange(size)
        self._plain.lend(0, size // PAGE_BYTES, self._target.address)
        self._units = [0, 0]
        dtype = getattr(torch, model.dtype)
        shape = cache_shape(model.spec, rows * context_tokens)
        self._caches = [torch.zeros(shape, dtype=dtype) for _ in range(model.spec.num_layers)]
        starts = tuple(range(0, rows * context_tokens, context_tokens))
        self._layout = BatchLayout((1,) * rows, (context_tokens,) * rows, starts, tuple(range(rows)))
        self._tokens = torch.zeros(rows, dtype=torch.int64)

    def run(self, cores: str, others: set[int], link_gbps: float | None) -> Result:
        """Load on this core (`own`) or on `others`, at most at `link_gbps`."""
        where = others if cores == "other" else None
        loader = Loader(self._client, self._arena, self._units, where, link_gbps)
        plain, alone, hidden = [], [], []
        try:
            loader.load_now(_BUSY)
            for _ in range(self._rounds):
                plain.append(self._plain_gbps(where))
                done = loader.load_now(_COMES)
                alone.append(done.copied_bytes / done.weights_ns)
                self._leave(_COMES)
                hidden.append(self._hidden(loader, done.weights_ns / 1e9))
            self._leave(_BUSY)
        finally:
            loader.close()
        return Result(cores, link_gbps, plain, alone, hidden)

    def close(self) -> None:
        self._client.close()
        self._store.close()
        self._target.close()
        self._plain.close()

    def _hidden(self, loader: Loader, alone_s: float) -> float:
        beside = [_seconds(self._step) for _ in range(_STEPS_BESIDE)]
        during = []
        loader.start(_COMES)
        while loader.poll() is None:
            during.append(_seconds(self._step))
        beside += [_seconds(self._step) for _ in range(_STEPS_BESIDE)]
        self._leave(_COMES)
        return 1 - (sum(during) - len(during) * statistics.mean(beside)) / alone_s

    @torch.inference_mode()
    def _step(self) -> None:
        space, layout = self._arena.spaces[_BUSY], self._layout
        hidden, ffn_out = space.attention.embed(self._tokens), None
        for layer, cache in enumerate(self._caches):
            hidden, ffn_in = space.attention.attend(layer, hidden, ffn_out, cache, layout)
            ffn_out = space.ffn.forward(layer, ffn_in)
        space.attention.logits(hidden, ffn_out, layout).argmax(dim=-1).tolist()

    def _leave(self, model: int) -> None:
        self._arena.evict(model)
        self._units[model] = 0

    def _plain_gbps(self, cores: set[int] | None) -> float:
        image, _ = self._client.acquire(_COMES)
        size = image_bytes(self._models[_COMES])
        ((source, _),) = image.stretches
        took_s: list[float] = []

        def copy() -> None:
            if cores:
                os.sched_setaffinity(0, cores)
            for way in (ctypes.memmove, streaming.copy):
                took_s.append(_seconds(lambda way=way: way(self._target.address, source, size)))

        thread = threading.Thread(target=copy)
        thread.start()
        thread.join()
        self._client.release(_COMES)
        return size / min(took_s) / 1e9


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@command
def main(argv: Sequence[str] | None = None) -> int:
    about, *rest = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m baselines.swap.bench",
        description=about,
        epilog="".join(rest),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="checkpoint; default: a 110M Mixtral of 8 layers, made if missing")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=4, help="decode rows of the model that computes")
    parser.add_argument("--context", type=int, default=256, help="tokens of KV cache of each of its rows")
    parser.add_argument(
        "--link-gbps", type=float, nargs="*", default=[4.0, 1.0], help="links of the throttled rows, GB/s"
    )
    args = parser.parse_args(argv)
    if min(args.rounds, args.rows, args.context) < 1 or not all(link > 0 for link in args.link_gbps):
        raise UserError("--rounds, --rows and --context must be at least 1, --link-gbps more than 0")
    directory = args.model or make_checkpoint("mixtral", "100m", default_directory("mixtral", "100m"))
    model = ServedModel(load_spec(directory), directory)
    cores = sorted(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {cores[0]})
    try:
        bench = Bench(model, args.rounds, args.rows, args.context)
        print(
            f"{image_bytes(model) / 2**20:.0f} MiB of weights in {num_units(model)} units; GB/s; medians [quartiles] of "
            f"{args.rounds} rounds"
        )
        print(f"{'loader':>6} {'link GB/s':>10} {'plain copy':>10} {'load':>9} {'of copy':>20} {'hidden':>20}")
        for where in ("own", "other") if len(cores) > 1 else ("own",):
            for link_gbps in (None, *args.link_gbps):
                print(bench.run(where, set(cores[1:]), link_gbps).row, flush=True)
        bench.close()
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
