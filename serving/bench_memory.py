"""`python -m serving.bench_memory`: what virtual KV memory costs on this machine, beside a flat arena.

Three questions: what mapping and unmapping a page costs, what one decode step's attention costs over mapped pages and over
plain memory of the same layout, and how much of the pages is lost to rounding. A flat arena needs no mapping, but every model
has to own the longest context of every request it may serve: the table says how much memory that takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from serving.checkpoints import open_weights
from serving.checkpoints.make import default_directory, make_checkpoint
from serving.errors import UserError, command
from serving.interface import ServedModel
from serving.layers.attention_half import AttentionHalf
from serving.layers.batch import BatchLayout
from serving.memory.budget import format_bytes
from serving.memory.kv_pool import KVGeometry, KVPool, cache_shape
from serving.residency.staying import load_attention
from serving.spec import load_spec


def mapping_us(model: ServedModel, page_bytes: int, tokens: int, rounds: int) -> dict[str, float]:
    """Microseconds to map and to unmap a page when a request of `tokens` tokens comes and goes, and when one grows alone."""
    geometry = KVGeometry.of(model.spec, model.dtype)
    pages = geometry.pages(tokens, page_bytes)
    pool = KVPool(2 * pages, page_bytes, [(model.spec, model.dtype)], max_runs=2)
    kv = pool.models[model.name]
    mapped, unmapped = [], []
    try:
        for _ in range(rounds):
            run = kv.open_run()
            mapped.append(_timed(lambda run=run: kv.grow(run, tokens)) / pages)
            kv.close_run(run)
            unmapped.append(_timed(pool.unmap_kept) / pages)
    finally:
        pool.close()
    return {"map_us": statistics.median(mapped), "unmap_us": statistics.median(unmapped)}


def _timed(action: Callable[[], object]) -> float:
    started_ns = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - started_ns) / 1e3


def attention_us(model: ServedModel, page_bytes: int, batch: int, tokens: int, rounds: int) -> dict[str, float]:
    """Microseconds of the attention layers of one decode step over virtual pages and over a flat arena, in turn. Raises
    UserError unless both compute the same."""
    half = load_attention(open_weights(model), model.dtype)
    pages = batch * KVGeometry.of(model.spec, model.dtype).pages(tokens, page_bytes)
    pool = KVPool(pages, page_bytes, [(model.spec, model.dtype)], max_runs=batch)
    try:
        kv = pool.models[model.name]
        runs = [kv.open_run() for _ in range(batch)]
        for run in runs:
            kv.grow(run, tokens)
        flat = [
            torch.zeros(cache_shape(model.spec, batch * tokens), dtype=getattr(torch, model.dtype))
            for _ in range(model.spec.num_layers)
        ]
        layouts = {
            "virtual": (kv.layers, tuple(run.start_slot for run in runs)),
            "flat": (flat, tuple(range(0, batch * tokens, tokens))),
        }
        return _compare(half, layouts, batch, tokens, rounds)
    finally:
        pool.close()


def _compare(half: AttentionHalf, layouts: dict, batch: int, tokens: int, rounds: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    past = {}
    for layer in range(half.spec.num_layers):
        shape = layouts["flat"][0][layer][:tokens].shape
        past[layer] = torch.randn(shape, generator=generator) * 0.1
    for caches, starts in layouts.values():
        for layer, cache in enumerate(caches):
            for start in starts:
                cache[start : start + tokens] = past[layer]
    times: dict[str, list[float]] = {name: [] for name in layouts}
    seen = {}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name, (caches, starts) in layouts.items():
                started_ns = time.perf_counter_ns()
                layout = BatchLayout((1,) * batch, (tokens,) * batch, starts, tuple(range(batch)))
                hidden, out = half.embed(torch.zeros(batch, dtype=torch.int64)), None
                for layer, cache in enumerate(caches):
                    hidden, out = half.attend(layer, hidden, out, cache, layout)
                if number:  # the first round warms up
                    times[name].append((time.perf_counter_ns() - started_ns) / 1e3)
                seen[name] = hidden
    if not torch.equal(seen["virtual"], seen["flat"]):
        raise UserError("attention over virtual pages and over the flat arena differ")
    return {f"{name}_us": statistics.median(measured) for name, measured in times.items()}


def rounding(model: ServedModel, page_bytes: int, tokens: int) -> dict[str, float]:
    """Of a request of `tokens` tokens: bytes of its pages, the share that no token fills, and what a flat arena keeps."""
    geometry = KVGeometry.of(model.spec, model.dtype)
    held = geometry.pages(tokens, page_bytes) * page_bytes
    used = geometry.num_layers * geometry.token_bytes * tokens
    arena = geometry.num_layers * geometry.token_bytes * geometry.max_context_tokens
    return {"held_bytes": held, "rounding_loss": 1 - used / held, "arena_bytes": arena}


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.bench_memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", default=["qwen3_moe", "deepseek_v2"])
    parser.add_argument("--size", default="100m")
    parser.add_argument("--page-kib", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a request")
    parser.add_argument("--batch", type=int, default=4, help="sequences of the decode step")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args(argv)
    if os.environ.get("CROSSPOOL_SHORT", "") not in ("", "0"):  # see that it works at all, as every documented command
        args.size, args.tokens, args.rounds = "tiny", 64, 2
    torch.set_num_threads(1)
    rows = []
    for architecture in args.arch:
        base = default_directory(architecture, args.size)
        directory = make_checkpoint(architecture, args.size, base.with_name(f"{base.name}-float32-s0"), progress=False)
        model = ServedModel(load_spec(directory, architecture), directory)
        if args.tokens > model.spec.max_context_tokens:
            raise UserError(
                f"--tokens {args.tokens} exceed the context of {architecture}, {model.spec.max_context_tokens}"
            )
        for page_bytes in (kib << 10 for kib in args.page_kib):
            rows.append(
                {"model": architecture, "page_bytes": page_bytes}
                | mapping_us(model, page_bytes, args.tokens, args.rounds)
                | attention_us(model, page_bytes, args.batch, args.tokens, args.rounds)
                | rounding(model, page_bytes, args.tokens)
            )
    print(
        f"requests of {args.tokens} tokens; attention layers of a decode step of {args.batch}; medians of {args.rounds}"
    )
    print(
        f"{'model':>14} {'page':>9} {'map us/page':>12} {'unmap us/page':>14} {'virtual us':>11} {'flat us':>9} "
        f"{'held':>10} {'lost':>7} {'flat arena':>11}"
    )
    for row in rows:
        print(
            f"{row['model']:>14} {format_bytes(row['page_bytes']):>9} {row['map_us']:>12.2f} {row['unmap_us']:>14.2f} "
            f"{row['virtual_us']:>11.1f} {row['flat_us']:>9.1f} {format_bytes(row['held_bytes']):>10} "
            f"{row['rounding_loss']:>7.1%} {format_bytes(row['arena_bytes']):>11}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
