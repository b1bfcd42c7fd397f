"""`python -m baselines.swap.bench`: what a load reaches of a plain copy, and how much of it hides behind computing.

A plain copy moves the same bytes between the same kinds of memory, mapped beforehand. A load is *hidden* as far as computing
goes on: with L the load alone, T the load while another model steps, and C what the steps done in T take alone, the share is
(L + C - T) / L. It is near 0 where copy and computing share a core, 1 where neither notices the other. Medians of rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from serving.checkpoints.make import default_directory, make_checkpoint
from serving.errors import UserError, command
from serving.interface import ServedModel
from serving.memory.virtual import PhysicalPages, VirtualRange
from serving.residency.arena import DeviceArena
from serving.residency.image import PAGE_BYTES, image_bytes, num_units
from serving.residency.loader import Loader
from serving.residency.store import HostStore, StoreClient
from serving.spec import load_spec

_BUSY, _COMES = 0, 1  # the model that computes, and the one that is loaded beside it


@dataclass(frozen=True)
class Result:
    """One way to load: gigabytes a second of a plain copy and of the load alone, and the share of the load that is hidden."""

    cores: str
    link_gbps: float | None
    plain_gbps: float
    load_gbps: float
    hidden: float

    @property
    def row(self) -> str:
        link = "none" if self.link_gbps is None else f"{self.link_gbps:g}"
        share = f"{self.load_gbps / self.plain_gbps:.0%}"
        return (
            f"{self.cores:>6} {link:>10} {self.plain_gbps:>10.2f} {self.load_gbps:>9.2f} {share:>8} {self.hidden:>8.0%}"
        )


class Bench:
    """Two models of one checkpoint, one resident, in a process pinned to one core."""

    def __init__(self, model: ServedModel, rounds: int, rows: int) -> None:
        self._models = [
            dataclasses.replace(model, spec=dataclasses.replace(model.spec, name=n)) for n in ("busy", "comes")
        ]
        self._rounds = rounds
        self._store = HostStore(2 * image_bytes(model), "lru")
        ref = self._store.ref
        own = dataclasses.replace(ref, directory_fd=os.dup(ref.directory_fd))  # a client closes its own
        self._client = StoreClient(own, self._models)
        self._client.prime((_BUSY, _COMES))
        self._arena = DeviceArena(2 * image_bytes(model) // PAGE_BYTES, self._models)
        self._units = [0, 0]
        self._rows = torch.randn(rows, model.spec.hidden_size, dtype=getattr(torch, model.dtype))

    def run(self, cores: str, others: set[int], link_gbps: float | None) -> Result:
        """Load on this core (`own`) or on `others`, at most at `link_gbps`."""
        loader = Loader(self._client, self._arena, self._units, others if cores == "other" else None, link_gbps)
        try:
            loader.load_now(_BUSY)
            step_s = statistics.median(_seconds(self._step) for _ in range(4 * self._rounds))
            plain, alone, hidden = [], [], []
            for _ in range(self._rounds):
                plain.append(self._plain_gbps())
                done = loader.load_now(_COMES)
                alone.append(done.copied_bytes / done.weights_ns)
                self._leave(_COMES)
                hidden.append(self._hidden(loader, done.weights_ns / 1e9, step_s))
            self._leave(_BUSY)
        finally:
            loader.close()
        return Result(cores, link_gbps, *map(statistics.median, (plain, alone, hidden)))

    def close(self) -> None:
        self._client.close()
        self._store.close()

    def _hidden(self, loader: Loader, alone_s: float, step_s: float) -> float:
        steps, started = 0, time.perf_counter()
        loader.start(_COMES)
        while loader.poll() is None:
            self._step()
            steps += 1
        took_s = time.perf_counter() - started
        self._leave(_COMES)
        return max((alone_s + steps * step_s - took_s) / alone_s, 0.0)

    def _step(self) -> None:
        half = self._arena.spaces[_BUSY].ffn
        with torch.inference_mode():
            for layer in range(self._models[_BUSY].spec.num_layers):
                half.forward(layer, self._rows)

    def _leave(self, model: int) -> None:
        self._arena.evict(model)
        self._units[model] = 0

    def _plain_gbps(self) -> float:
        source, _ = self._client.acquire(_COMES)
        size = image_bytes(self._models[_COMES])
        physical, target = PhysicalPages(size // PAGE_BYTES, PAGE_BYTES), VirtualRange(size)
        try:
            target.map(0, physical, 0, size // PAGE_BYTES)
            return size / _seconds(lambda: ctypes.memmove(target.address, source, size)) / 1e9
        finally:
            target.close()
            physical.close()
            self._client.release(_COMES)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m baselines.swap.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint; default: a 110M Mixtral of 8 layers, made if missing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4, help="decode rows of the model that computes")
    parser.add_argument("--link-gbps", type=float, default=1.0, help="the throttled rows' link")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.rows < 1 or not args.link_gbps > 0:
        raise UserError("--rounds and --rows must be at least 1, --link-gbps more than 0")
    directory = args.model or make_checkpoint("mixtral", "100m", default_directory("mixtral", "100m"))
    model = ServedModel(load_spec(directory), directory)
    cores = sorted(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {cores[0]})
    try:
        bench = Bench(model, args.rounds, args.rows)
        print(
            f"{image_bytes(model) / 2**20:.0f} MiB of weights in {num_units(model)} units; GB/s, medians of {args.rounds}"
        )
        print(f"{'loader':>6} {'link GB/s':>10} {'plain copy':>10} {'load':>9} {'of copy':>8} {'hidden':>8}")
        for where in ("own", "other") if len(cores) > 1 else ("own",):
            for link_gbps in (None, args.link_gbps):
                print(bench.run(where, set(cores[1:]), link_gbps).row, flush=True)
        bench.close()
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
