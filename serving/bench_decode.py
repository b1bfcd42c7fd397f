"""`python -m serving.bench_decode`: decode tokens/s of the engine against `transformers`, like with like, in one run.

One device is one core, so a static partition on one device stands against `transformers` with one thread, and CrossPool's
two devices against two threads. Sides alternate, round after round, because the machine's speed drifts; medians are quoted.
Beside them stands the bandwidth floor: the bytes that a step must read, over what this machine streams in the same run.

    python -m serving.bench_decode --checkpoint DIR --batch 1 8 --dtype float32
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import torch

from serving import registry
from serving.errors import UserError, command
from serving.generate import cpu_cluster
from serving.interface import Demand, Request, ServedModel
from serving.spec import BYTES_PER_ELEMENT, ModelSpec, element_bytes, load_spec

_MEMORY_BYTES = 6 << 30
_STREAM_BYTES = 512 << 20


class Side(Protocol):
    """One contestant: `run` decodes and returns (decode tokens/s, prefill seconds)."""

    name: str

    def run(self, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> tuple[float, float]: ...

    def close(self) -> None: ...


class EngineSide:
    """A system of this project. `batches` batches of the same size are kept in flight, one a lane."""

    def __init__(self, system: str, devices: int, model: ServedModel, options: dict[str, object], batches: int) -> None:
        self.name = f"{system}, {devices} device{'s' if devices > 1 else ''}"
        self._model, self._batches = model, batches
        self._system = registry.create(system, options)
        self._system.start(self._system.plan(cpu_cluster(devices, _MEMORY_BYTES), [model], Demand()))
        self._next_id = 0

    def run(self, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> tuple[float, float]:
        wanted = list(prompts) * self._batches
        first_id, self._next_id = self._next_id, self._next_id + len(wanted)
        started_ns = time.monotonic_ns()
        for number, prompt in enumerate(wanted):
            self._system.submit(Request(first_id + number, self._model.name, prompt, new_tokens))
        times: dict[int, list[int]] = {first_id + number: [] for number in range(len(wanted))}
        left = len(wanted)
        while left:
            for event in self._system.poll():
                if event.tokens:
                    times[event.request_id].append(event.time_ns)
                if event.kind.terminal:
                    left -= 1
                    if event.reason:
                        raise UserError(f"{self.name}: {event.reason}")
            time.sleep(0.002)
        begin, end = max(t[0] for t in times.values()), min(t[-1] for t in times.values())
        decoded = sum(begin < moment <= end for moments in times.values() for moment in moments)
        return decoded / (end - begin) * 1e9, (begin - started_ns) / 1e9

    def close(self) -> None:
        self._system.stop()


class TransformersSide:
    """`generate` of `transformers`, in a process of its own with `threads` threads on as many cores."""

    def __init__(self, checkpoint: Path, threads: int, dtype: str, mode: str) -> None:
        self.name = f"transformers ({mode}), {threads} thread{'s' if threads > 1 else ''}"
        context = multiprocessing.get_context("spawn")
        self._connection, far = context.Pipe()
        self._process = context.Process(target=_transformers_server, args=(far, str(checkpoint), threads, dtype, mode))
        self._process.start()
        far.close()
        self._receive()

    def _receive(self) -> object:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise UserError(f"{self.name}: its process ended") from None
        if isinstance(answer, str):
            raise UserError(f"{self.name}: {answer}")
        return answer

    def run(self, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> tuple[float, float]:
        self._connection.send((list(prompts), new_tokens))
        return self._receive()

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def _transformers_server(connection: Connection, checkpoint: str, threads: int, dtype: str, mode: str) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(cores[:threads]))
    torch.set_num_threads(threads)
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):
        """Never stops; notes when each token was there."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), attn_implementation="sdpa", experts_implementation=mode
        ).eval()
    except (ValueError, OSError) as error:
        connection.send(str(error).splitlines()[0])
        return
    connection.send((0.0, 0.0))
    with torch.inference_mode():
        while True:
            try:
                prompts, new_tokens = connection.recv()
            except EOFError:
                return
            clock = Clock()
            ids = torch.tensor(prompts)
            started = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
            decoded = len(prompts) * (len(clock.times) - 1)
            connection.send((decoded / (clock.times[-1] - clock.times[0]), clock.times[0] - started))


def step_bytes(spec: ModelSpec, dtype: str, batch: int, context_tokens: int) -> float:
    """Bytes that one decode step of `batch` sequences must read: attention weights, the head, the FFN weights of the
    distinct experts that uniform routing hits, and each sequence's KV, once each."""
    routed_layers = spec.num_layers - len(spec.dense_layers)
    experts = routed_layers * spec.moe.distinct_experts(batch) * spec.expert_elements
    others = sum(spec.ffn_layer_elements(layer) for layer in range(spec.num_layers))
    others -= routed_layers * spec.moe.num_experts * spec.expert_elements
    weights = spec.attention_elements + spec.vocab_size * spec.hidden_size + experts + others
    return weights * element_bytes(dtype) + batch * context_tokens * spec.kv_bytes_per_token(dtype)


def stream_bandwidth(threads: int) -> float:
    """Bytes/s that `threads` threads read from memory here and now: the best of five sums over a large array."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    data = torch.ones(_STREAM_BYTES // 4)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        best = max(best, _STREAM_BYTES / (time.perf_counter() - started))
    torch.set_num_threads(before)
    return best


def measure(sides: Sequence[Side], spec: ModelSpec, batch: int, args: argparse.Namespace) -> list[list[float]]:
    """Decode tokens/s of every side, one list a side, sides taking turns; a first round warms up and is not counted."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        tuple(torch.randint(0, spec.vocab_size, (args.prompt_tokens,), generator=generator).tolist())
        for _ in range(batch)
    ]
    rates: list[list[float]] = [[] for _ in sides]
    for round_number in range(args.rounds + 1):
        for side, measured in zip(sides, rates, strict=True):
            rate, _ = side.run(prompts, args.new_tokens)
            if round_number:
                measured.append(rate)
    return rates


def open_sides(args: argparse.Namespace, model: ServedModel, dtype: str, batch: int) -> list[Side]:
    """All sides for one batch size; engines are given room to prefill the whole batch in one step."""
    options = {"max_batch": batch, "prefill_chunk": batch * args.prompt_tokens}
    sides: list[Side] = [EngineSide("static", 1, model, options, batches=1)]
    if args.two_cores:
        sides.append(EngineSide("crosspool", 2, model, options, batches=2))
    threads = (1, 2) if args.two_cores else (1,)
    if model.spec.architecture != "deepseek":  # which transformers does not have
        sides += [TransformersSide(model.checkpoint, n, dtype, mode) for n in threads for mode in args.transformers]
    return sides


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.bench_decode", description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=sorted(BYTES_PER_ELEMENT))
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--two-cores", action="store_true", help="also CrossPool on two devices, and two threads")
    parser.add_argument("--transformers", nargs="+", default=["grouped_mm"], help="its expert implementations to try")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    spec = load_spec(args.checkpoint)
    figures = []
    print(
        f"{spec.name}: prompt {args.prompt_tokens}, {args.new_tokens} new tokens, median of {args.rounds} alternated rounds"
    )
    print(
        f"{'dtype':<9} {'batch':>5}  {'side':<34} {'tok/s':>8} {'min':>8} {'max':>8} {'of floor':>9} {'x first hf':>10}"
    )
    for dtype in args.dtype:
        for batch in args.batch:
            figures += _cell(args, spec, dtype, batch)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _cell(args: argparse.Namespace, spec: ModelSpec, dtype: str, batch: int) -> list[dict[str, object]]:
    model = ServedModel(spec, args.checkpoint, dtype)
    sides = open_sides(args, model, dtype, batch)
    try:
        rates = measure(sides, spec, batch, args)
    finally:
        for side in sides:
            side.close()
    bandwidth = {threads: stream_bandwidth(threads) for threads in (1, 2)}
    bytes_read = step_bytes(spec, dtype, batch, args.prompt_tokens + args.new_tokens // 2)
    peers = [statistics.median(r) for side, r in zip(sides, rates, strict=True) if isinstance(side, TransformersSide)]
    rows = []
    for side, measured in zip(sides, rates, strict=True):
        cores = 2 if side.name.endswith(("2 devices", "2 threads")) else 1
        floor = batch * bandwidth[cores] / bytes_read
        median = statistics.median(measured)
        row = {
            "model": spec.name, "dtype": dtype, "batch": batch, "side": side.name, "median_tok_s": median,
            "min_tok_s": min(measured), "max_tok_s": max(measured), "floor_tok_s": floor,
            "stream_gb_s": bandwidth[cores] / 1e9,
        }  # fmt: skip
        rows.append(row)
        ratio = f"{median / peers[0]:.2f}" if peers else "-"
        print(
            f"{dtype:<9} {batch:>5}  {side.name:<34} {median:>8.1f} {min(measured):>8.1f} {max(measured):>8.1f} "
            f"{median / floor:>8.0%} {ratio:>10}"
        )
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
