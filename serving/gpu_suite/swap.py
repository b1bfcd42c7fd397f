"""Swapping on a card: what a load reaches of a plain copy from pinned memory, and how much of it hides behind computing.

One model stays and decodes, the other comes and goes. The *plain
copy* is the same bytes in one call. *Hidden* is 1 - S / L: L the seconds of the load alone, from the first page that is mapped
to the last byte, and S how much longer the decode steps of the model that stays took beside it than before. *Overlap* is of
the first prompt of the model that comes, whose layers run as they come: of what could be saved, the shorter of load and step,
the share that was.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from serving.batching import StepLimits
from serving.cuda.build import open_pool, prepare_process, weights_of
from serving.cuda.capture import CardModel
from serving.cuda.ffn_parts import FFNParts
from serving.cuda.residency import CardArena, CardLoader
from serving.cuda.runner import StepRunner
from serving.errors import command
from serving.gpu_suite.results import save
from serving.gpu_suite.seeded import seeded
from serving.interface import Device, ServedModel
from serving.residency.image import CARD_FRAME_BYTES, placed_bytes
from serving.scheduler import StepPlan
from serving.sequence import Sequence

_PAGE_BYTES, _KV_BYTES = 2 << 20, 8 << 30
_PROMPT_TOKENS, _NEW_TOKENS = 512, 4096
_CHUNK_TOKENS = 256
_STEPS_ALONE = 60
_STAYS, _COMES = 0, 1


class Bench:
    """Both models on card 0, with room for both images."""

    def __init__(self, models: Seq[ServedModel]) -> None:
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
        self._arena = CardArena(
            sum(placed_bytes(model, "cuda") // CARD_FRAME_BYTES for model in models), models, device
        )
        for index, model in enumerate(models):
            self._arena.open(index).build(weights_of(model, device))
            torch.cuda.synchronize()
            self._arena.evict(index)
        pool = open_pool(_KV_BYTES // _PAGE_BYTES, _PAGE_BYTES, list(models), 4, Device("cuda:0", "cuda", 0, 1 << 40))
        kvs = [pool.models[model.name] for model in models]
        self._loader = CardLoader(self._arena, [0] * len(models), device)
        halves = [
            CardModel.of(image.attention, FFNParts(image.ffn), kv)
            for image, kv in zip(self._arena.images, kvs, strict=True)
        ]
        self._runner = StepRunner(halves, 2, StepLimits(1, _CHUNK_TOKENS), "fused", self._loader)
        self._loader.load_now(_STAYS)
        runs = [kv.open_run() for kv in kvs]
        for kv, run in zip(kvs, runs, strict=True):
            kv.grow(run, _PROMPT_TOKENS + _CHUNK_TOKENS)
        decoding = Sequence(0, _STAYS, [7] * _PROMPT_TOKENS, _PROMPT_TOKENS, _NEW_TOKENS, run=runs[_STAYS])
        decoding.cached = _PROMPT_TOKENS - 1
        prompt = [7 + 131 * place for place in range(_CHUNK_TOKENS)]
        first = Sequence(1, _COMES, prompt, _CHUNK_TOKENS, _NEW_TOKENS, run=runs[_COMES])
        self._decode = StepPlan.following(_STAYS, ((decoding, 1),))
        self._prefill = StepPlan.following(_COMES, ((first, _CHUNK_TOKENS),))

    def round(self) -> dict[str, float]:
        """Seconds and gigabytes a second of one round; the model that comes is gone before and after."""
        alone_s, copied_bytes, mapping_s = self._load()
        plain_s = self._plain_copy()
        step_s = statistics.median(self._step(0, self._decode) for _ in range(_STEPS_ALONE))
        prefill_s = statistics.median(self._step(1, self._prefill) for _ in range(5))
        self._arena.evict(_COMES)
        slower_s, beside_s = self._load_beside(step_s)
        self._arena.evict(_COMES)
        together_s = self._first_step_of_a_load()
        begun = time.perf_counter()
        self._arena.evict(_COMES)
        return {
            "image_bytes": copied_bytes,
            "load_s": alone_s,
            "mapping_s": mapping_s,
            "load_gbps": copied_bytes / alone_s / 1e9,
            "plain_gbps": copied_bytes / plain_s / 1e9,
            "of_plain": plain_s / alone_s,
            "step_s": step_s,
            "load_beside_s": beside_s,
            "hidden": 1 - slower_s / alone_s,
            "prefill_s": prefill_s,
            "load_and_prefill_s": together_s,
            "overlap": (alone_s + prefill_s - together_s) / min(alone_s, prefill_s),
            "evict_s": time.perf_counter() - begun,
        }

    def _load(self) -> tuple[float, int, float]:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        self._loader.start(_COMES)
        mapped = time.perf_counter()
        while (done := self._loader.poll()) is None:
            self._loader.wait(1e-4)
        return time.perf_counter() - begun, done.copied_bytes, mapped - begun

    def _plain_copy(self) -> float:
        image = self._arena.images[_COMES]
        target = image.bytes[: image.used_bytes]
        torch.cuda.synchronize()
        begun = time.perf_counter()
        target.copy_(image.host, non_blocking=True)
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    def _step(self, lane: int, plan: StepPlan) -> float:
        begun = time.perf_counter()
        self._runner.launch(lane, plan.model, plan)
        while not self._runner.done(lane):
            pass
        return time.perf_counter() - begun

    def _load_beside(self, step_s: float) -> tuple[float, float]:
        """How much longer steps took beside a load, and the load's seconds."""
        torch.cuda.synchronize()
        begun = time.perf_counter()
        self._loader.start(_COMES)  # the host maps pages meanwhile: no step of this worker can be launched
        mapped_s = time.perf_counter() - begun
        steps = 0
        stepping = time.perf_counter()
        while self._loader.poll() is None:
            self._step(0, self._decode)
            steps += 1
        ended = time.perf_counter()
        return mapped_s + (ended - stepping) - steps * step_s, ended - begun

    def _first_step_of_a_load(self) -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        self._loader.start(_COMES)
        self._step(1, self._prefill)
        while self._loader.busy:
            self._loader.poll()
        return time.perf_counter() - begun


@command
@torch.inference_mode()
def main(argv: Seq[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.gpu_suite.swap", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="deepseek-moe-16b,deepseek-v2-lite", help="who stays, who comes")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    prepare_process()
    models = seeded(args.models.split(","))
    begun = time.perf_counter()
    bench = Bench(models)
    print(f"row: {args.models} ready in {time.perf_counter() - begun:.1f} s", flush=True)
    rows: list[dict] = []
    for _ in range(args.rounds):
        rows.append({"stays": models[_STAYS].name, "comes": models[_COMES].name, **bench.round()})
        save(args.out, rows)
        row = rows[-1]
        print(
            f"row: load {row['load_gbps']:.1f} GB/s, plain {row['plain_gbps']:.1f} ({row['of_plain']:.2f} of it), mapping "
            f"{row['mapping_s'] * 1e3:.0f} ms, hidden {row['hidden']:.2f}, overlap {row['overlap']:.2f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
