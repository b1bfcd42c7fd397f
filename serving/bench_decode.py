"""`python -m serving.bench_decode`: decode and prefill tokens/s against `transformers`, like with like, in one run.

One device is one core, so a static partition on one device, and the two halves of a model without an engine, stand against
`transformers` with one thread, and CrossPool's two devices against two threads. Sides alternate, round after round, because
the machine's speed drifts; medians are quoted. A bfloat16 cell has `transformers` in float32 taking its turns too. Beside
all stands the bandwidth floor: the bytes that a decode step must read, over what this machine streams in the same run.

    python -m serving.bench_decode --checkpoint DIR --batch 1 8 32 --dtype float32 bfloat16
    python -m serving.bench_decode --checkpoint DIR --batch 1 --prompt-tokens 4096 --prefill-chunk 512 --new-tokens 8
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from serving.bench_sides import EngineSide, HalvesSide, Side, TransformersSide
from serving.errors import UserError, command
from serving.interface import ServedModel
from serving.spec import BYTES_PER_ELEMENT, ModelSpec, element_bytes, load_spec

_STREAM_BYTES = 512 << 20
_OURS = ("halves", "static", "crosspool")


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


def measure(
    sides: Sequence[Side], spec: ModelSpec, batch: int, args: argparse.Namespace
) -> list[list[tuple[float, float]]]:
    """(decode tokens/s, prefill tokens/s) of every round, one list a side, sides taking turns; a first round warms up and
    is not counted."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        tuple(torch.randint(0, spec.vocab_size, (args.prompt_tokens,), generator=generator).tolist())
        for _ in range(batch)
    ]
    rates: list[list[tuple[float, float]]] = [[] for _ in sides]
    for round_number in range(args.rounds + 1):
        for side, measured in zip(sides, rates, strict=True):
            decoded, prefill_s = side.run(prompts, args.new_tokens)
            if round_number:
                measured.append((decoded, batch * args.prompt_tokens / prefill_s))
    return rates


def open_sides(args: argparse.Namespace, model: ServedModel, batch: int) -> list[Side]:
    """All sides of one cell; engines are given room to prefill the whole batch in one step, if no chunk is set."""
    chunk = args.prefill_chunk or args.prompt_tokens
    options = {"max_batch": batch, "prefill_chunk": batch * chunk}
    sides: list[Side] = []
    if "halves" in args.sides:
        sides.append(HalvesSide(model, chunk))
    if "static" in args.sides:
        sides.append(EngineSide("static", 1, model, options, batches=1))
    two_cores = "crosspool" in args.sides
    if two_cores:
        sides.append(EngineSide("crosspool", 2, model, options, batches=2))
    if model.spec.architecture != "deepseek":  # which transformers does not have
        for dtype in dict.fromkeys((model.dtype, "float32")):
            for threads in (1, 2) if two_cores else (1,):
                sides += [TransformersSide(model.checkpoint, threads, dtype, mode) for mode in args.transformers]
    return sides


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.bench_decode", description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=sorted(BYTES_PER_ELEMENT))
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--prefill-chunk", type=int, default=0, help="prompt tokens a step; 0: the whole prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sides", nargs="+", default=["halves", "static"], choices=_OURS,
        help="crosspool takes two devices, and two threads of transformers beside them",
    )  # fmt: skip
    parser.add_argument("--transformers", nargs="+", default=["grouped_mm", "eager"], help="its expert modes")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    if args.new_tokens < 2 or args.prompt_tokens < 1 or args.prefill_chunk < 0 or min(args.batch) < 1:
        raise UserError("a decode rate needs a batch and a prompt of 1 or more, and 2 or more new tokens")
    torch.set_num_threads(1)
    spec = load_spec(args.checkpoint)
    figures = []
    print(
        f"{spec.name}: prompt {args.prompt_tokens}, {args.new_tokens} new tokens, median of {args.rounds} alternated rounds"
    )
    print(
        f"{'dtype':<9} {'batch':>5}  {'side':<36} {'tok/s':>8} {'min':>8} {'max':>8} {'of floor':>9} {'x best hf':>10} "
        f"{'x hf f32':>9} {'prefill/s':>10} {'x best hf':>10}"
    )
    for dtype in args.dtype:
        for batch in args.batch:
            figures += _cell(args, spec, dtype, batch)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def _cell(args: argparse.Namespace, spec: ModelSpec, dtype: str, batch: int) -> list[dict[str, object]]:
    """Measure and print one dtype and batch size; the rows of its table."""
    sides = open_sides(args, ServedModel(spec, args.checkpoint, dtype), batch)
    try:
        rates = measure(sides, spec, batch, args)
    finally:
        for side in sides:
            side.close()
    bandwidth = {cores: stream_bandwidth(cores) for cores in {side.cores for side in sides}}
    rows = []
    for side, measured in zip(sides, rates, strict=True):
        decoded, prefilled = (statistics.median(values) for values in zip(*measured, strict=True))
        bytes_read = step_bytes(spec, side.dtype, batch, args.prompt_tokens + args.new_tokens // 2)
        rows.append(
            {
                "model": spec.name, "dtype": side.dtype, "batch": batch, "side": side.name, "cores": side.cores,
                "peer": isinstance(side, TransformersSide), "median_tok_s": decoded,
                "min_tok_s": min(measured)[0], "max_tok_s": max(measured)[0], "prefill_tok_s": prefilled,
                "floor_tok_s": batch * bandwidth[side.cores] / bytes_read, "stream_gb_s": bandwidth[side.cores] / 1e9,
            }
        )  # fmt: skip
    for row in rows:
        _print_row(row, [peer for peer in rows if peer["peer"] and peer["cores"] == row["cores"]])
    return rows


def _print_row(row: dict[str, object], peers: Sequence[dict[str, object]]) -> None:
    def times(key: str, dtype: str | None = None) -> str:
        """This row's rate over that of the fastest of its peers, or of those in `dtype`."""
        rates = [peer[key] for peer in peers if dtype in (None, peer["dtype"])]
        return f"{row[key] / max(rates):.2f}" if rates else "-"

    print(
        f"{row['dtype']:<9} {row['batch']:>5}  {row['side']:<36} {row['median_tok_s']:>8.1f} {row['min_tok_s']:>8.1f} "
        f"{row['max_tok_s']:>8.1f} {row['median_tok_s'] / row['floor_tok_s']:>8.0%} {times('median_tok_s'):>10} "
        f"{times('median_tok_s', 'float32'):>9} {row['prefill_tok_s']:>10.0f} {times('prefill_tok_s'):>10}",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
