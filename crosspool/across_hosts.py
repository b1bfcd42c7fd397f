"""The two pools as two processes that share no memory, under torchrun: `torch.distributed` carries the hidden rows.

    torchrun --standalone --nproc-per-node 2 -m crosspool.across_hosts --model DIR --prompt-ids 1,2,3 --max-new-tokens 4

Rank 0 is the KV pool, rank 1 the weights pool. On two hosts, run it on each with `--nnodes 2 --nproc-per-node 1` and a common
`--rdzv-endpoint`. Rank 0 prints what `python -m serving.generate` prints; the tokens are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from crosspool.engine import CrossPool, CrossPoolOptions
from serving.checkpoints import open_weights
from serving.errors import UserError, command
from serving.generate import cpu_cluster, parse_ids
from serving.interface import Demand, Placement, ServedModel
from serving.memory.kv_pool import KVPool
from serving.residency.staying import load_attention, load_ffn
from serving.shm.region import SharedRegion
from serving.shm.ring import Ring
from serving.spec import load_spec
from serving.transport.distributed import DistributedFFN, serve
from serving.workers import counters
from serving.workers.messages import Stop, Submit, Tokens, decode, encode
from serving.workers.model_worker import HostedModel, ModelWorker

KV_RANK, WEIGHTS_RANK = 0, 1
_RING_BYTES = 4 << 20
_SAMPLE_INTERVAL_MS = 50.0


def weights_pool(models: Sequence[ServedModel]) -> None:
    """Hold the FFN halves of `models` and answer the KV pool until it stops."""
    halves = [load_ffn(open_weights(model), model.dtype) for model in models]
    shapes = [(model.spec.hidden_size, getattr(torch, model.dtype)) for model in models]
    dist.barrier()
    with torch.inference_mode():
        serve(KV_RANK, shapes, lambda model, layer, rows: halves[model].forward(layer, rows))


def kv_pool(
    placement: Placement, options: CrossPoolOptions, requests: Sequence[Submit]
) -> tuple[dict[int, list[int]], int]:
    """Hold attention halves and KV, and generate `requests`: (tokens by request id, bytes that crossed)."""
    models = placement.models
    port = DistributedFFN(WEIGHTS_RANK, options.lanes)
    pages = placement.devices[0].kv_bytes // options.page_bytes
    pool = KVPool(
        pages, options.page_bytes, [(m.spec, m.dtype) for m in models], max(options.max_running, len(requests))
    )
    hosted = [
        HostedModel(
            index=index,
            half=load_attention(open_weights(model), model.dtype),
            kv=pool.models[model.name],
            port=port,
            ffn_index=index,
            num_layers=model.spec.num_layers,
        )
        for index, model in enumerate(models)
    ]
    control, reported = (Ring(SharedRegion(_RING_BYTES)) for _ in range(2))
    counted = counters.Counters(SharedRegion(counters.REGION_BYTES))
    limits = options.limits
    worker = ModelWorker(
        hosted, [("kv-pool", pool)], limits, options.lanes, control, reported, counted, _SAMPLE_INTERVAL_MS
    )
    dist.barrier()
    tokens: dict[int, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        control.push(encode(request))
    reader = threading.Thread(target=_collect, args=(reported, control, tokens), daemon=True)
    reader.start()
    worker.run()
    reader.join()
    port.close()
    return tokens, port.bytes_crossed


def _collect(reported: Ring, control: Ring, tokens: dict[int, list[int]]) -> None:
    """Take tokens until every request has ended, then stop the worker."""
    unfinished = len(tokens)
    while unfinished:
        while (data := reported.pop()) is not None:
            message = decode(data)
            if isinstance(message, Tokens):
                for request_id, token, last in message.items:
                    tokens[request_id].append(token)
                    unfinished -= last
        time.sleep(0.001)
    control.push(encode(Stop()))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m crosspool.across_hosts", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model", action="append", required=True, metavar="DIR", help="checkpoint directory; repeatable"
    )
    parser.add_argument("--prompt-ids", action="append", required=True, metavar="1,2,3", help="token ids; repeatable")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--lanes", type=int, default=2, help="in-flight batches")
    parser.add_argument("--device-memory-mib", type=int, default=1024, help="budget of each pool")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    if os.environ.get("WORLD_SIZE") != "2":
        raise UserError("two pools are two processes: start this with torchrun, two processes in all")
    models = [ServedModel(load_spec(directory), Path(directory)) for directory in args.model]
    options = CrossPoolOptions(lanes=args.lanes, page_bytes=4096)
    placement = CrossPool(options).plan(cpu_cluster(2, args.device_memory_mib << 20), models, Demand())
    prompts = [parse_ids(text) for text in args.prompt_ids]
    asked = [(index, prompt) for index in range(len(models)) for prompt in prompts]
    requests = [Submit(i, model, prompt, args.max_new_tokens, ()) for i, (model, prompt) in enumerate(asked)]
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", "0")) % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        if dist.get_rank() == WEIGHTS_RANK:
            weights_pool(models)
            return 0
        tokens, crossed = kv_pool(placement, options, requests)
    finally:
        dist.destroy_process_group()
    results = [
        {"model": models[model].name, "prompt_ids": list(prompt), "token_ids": tokens[i]}
        for i, (model, prompt) in enumerate(asked)
    ]
    print(json.dumps({"transport": "gloo", "bytes_crossed": crossed, "results": results}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
