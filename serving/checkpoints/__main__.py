"""`python -m serving.checkpoints make|inspect`: write small seeded checkpoints, or say what one holds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from serving.checkpoints.make import DEFAULT_SHARD_BYTES, default_directory, make_checkpoint
from serving.checkpoints.reader import open_checkpoint
from serving.checkpoints.sizes import SIZES
from serving.errors import UserError, command
from serving.memory.budget import format_bytes
from serving.spec import ARCHITECTURES, BYTES_PER_ELEMENT


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.checkpoints", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write a seeded checkpoint in Hugging Face format")
    make.add_argument("--arch", nargs="+", choices=[*ARCHITECTURES, "all"], default=["all"])
    make.add_argument("--size", choices=SIZES, default="tiny")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--dtype", choices=sorted(BYTES_PER_ELEMENT), default="float32")
    make.add_argument("--shard-bytes", type=int, default=DEFAULT_SHARD_BYTES)
    make.add_argument("--out", type=Path, help="directory of the checkpoint (with several: their parent)")
    inspect = commands.add_parser("inspect", help="check a checkpoint directory and print what it holds")
    inspect.add_argument("directory", type=Path)
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.command == "inspect":
        return _inspect(args.directory)
    if args.seed < 0 or args.shard_bytes < 1:
        raise UserError(f"--seed {args.seed} and --shard-bytes {args.shard_bytes} must not be negative")
    architectures = ARCHITECTURES if "all" in args.arch else args.arch
    for architecture in architectures:
        out = args.out or default_directory(architecture, args.size)
        if args.out and len(architectures) > 1:
            out = args.out / f"{architecture}-{args.size}"
        print(make_checkpoint(architecture, args.size, out, args.seed, args.dtype, args.shard_bytes))
    return 0


def _inspect(directory: Path) -> int:
    with open_checkpoint(directory) as weights:
        spec = weights.spec
    rows = {
        "architecture": spec.architecture,
        "layers / hidden / vocabulary": f"{spec.num_layers} / {spec.hidden_size} / {spec.vocab_size}",
        "attention": f"{spec.attention.kind}, {spec.attention.num_heads} heads",
        "experts": f"top {spec.moe.top_k} of {spec.moe.num_experts}, width {spec.moe.expert_width}, {spec.moe.routing}",
        "parameters": f"{spec.total_elements / 1e6:.1f} M, FFN {100 * spec.ffn_elements / spec.total_elements:.1f} %",
        "stored as": spec.dtype,
        "KV a token": format_bytes(spec.kv_bytes_per_token(spec.dtype)),
        "context": f"{spec.max_context_tokens} tokens",
    }
    for name, value in rows.items():
        print(f"{name:<30} {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
