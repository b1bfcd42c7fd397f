"""`python -m serving.generate`: a system started, asked for tokens, and stopped. The smallest proof that it computes what
the model says.

    python -m serving.generate --model DIR --system crosspool --prompt-ids 1,2,3 --max-new-tokens 8

Repeat `--model` to co-locate several; each gets every prompt. Prints one JSON object on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from serving import registry
from serving.errors import UserError, command
from serving.interface import Cluster, Demand, Device, EventKind, Request, ServedModel, System
from serving.spec import BYTES_PER_ELEMENT, load_spec

_POLL_INTERVAL_S = 0.001


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.generate", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model", action="append", required=True, metavar="DIR", help="checkpoint directory; repeatable"
    )
    parser.add_argument("--system", default="crosspool", help=f"one of {', '.join(registry.names())}")
    parser.add_argument("--prompt-ids", action="append", required=True, metavar="1,2,3", help="token ids; repeatable")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=sorted(BYTES_PER_ELEMENT))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="kind of the devices")
    parser.add_argument(
        "--devices", type=int, default=2, help="devices: CPU cores, or cards, shared where there are fewer"
    )
    parser.add_argument("--device-memory-mib", type=int, default=1024, help="budget of each device")
    parser.add_argument("--stop-at-eos", action="store_true", help="end at an end-of-sequence id of the model")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the system")
    return parser.parse_args(argv)


def parse_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--prompt-ids {text!r} is not a comma-separated list of integers") from None


def parse_option(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--option {text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def cpu_cluster(devices: int, memory_bytes: int) -> Cluster:
    """`devices` CPU cores with a budget of `memory_bytes` each."""
    return Cluster(tuple(Device(f"cpu:{i}", "cpu", i, memory_bytes) for i in range(devices)))


def cuda_cluster(devices: int, memory_bytes: int) -> Cluster:
    """`devices` devices with a budget of `memory_bytes` each, dealt out over this machine's cards."""
    import torch

    cards = torch.cuda.device_count()
    if not cards:
        raise UserError("--device cuda: torch sees no card (python -m serving.doctor says what it sees)")
    return Cluster(tuple(Device(f"gpu{i}", "cuda", i % cards, memory_bytes) for i in range(devices)))


def generate(system: System, requests: Sequence[Request]) -> dict[int, list[int]]:
    """Tokens of every request, by id, from a started system. Raises UserError when one is rejected or fails."""
    tokens: dict[int, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        system.submit(request)
    unfinished = set(tokens)
    while unfinished:
        for event in system.poll():
            tokens[event.request_id].extend(event.tokens)
            if event.kind in (EventKind.REJECTED, EventKind.FAILED):
                raise UserError(f"request {event.request_id} was {event.kind.value}: {event.reason}")
            if event.kind is EventKind.COMPLETED:
                unfinished.discard(event.request_id)
        time.sleep(_POLL_INTERVAL_S)
    return tokens


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    specs = [load_spec(directory) for directory in args.model]
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise UserError(f"--model: directory names must differ, got {', '.join(names)}")
    models = [ServedModel(spec, Path(directory), args.dtype) for spec, directory in zip(specs, args.model, strict=True)]
    system = registry.create(args.system, dict(parse_option(text) for text in args.option))
    cluster = (cuda_cluster if args.device == "cuda" else cpu_cluster)(args.devices, args.device_memory_mib << 20)
    prompts = [parse_ids(text) for text in args.prompt_ids]
    placement = system.plan(cluster, models, Demand())
    cores = len(os.sched_getaffinity(0))
    if args.device == "cpu" and args.devices > cores:
        print(
            f"note: {args.devices} devices share {cores} cores; the tokens are the same, only slower", file=sys.stderr
        )
    asked = [(name, prompt) for name in names for prompt in prompts]
    requests = [
        Request(i, name, prompt, args.max_new_tokens, ignore_eos=not args.stop_at_eos)
        for i, (name, prompt) in enumerate(asked)
    ]
    try:
        system.start(placement)
        tokens = generate(system, requests)
    finally:
        system.stop()
    results = [
        {"model": name, "prompt_ids": list(prompt), "token_ids": tokens[i]} for i, (name, prompt) in enumerate(asked)
    ]
    print(json.dumps({"system": args.system, "dtype": args.dtype, "results": results}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
