"""Systems serving two models on one card, open loop: time between tokens and to the first, system after system on the same
requests. Both pools of CrossPool, and both partitions of `static-2`, are on the one card under budgets of their own.

Processes on one card take turns on it (no MPS is started), which is what `static-2` shows: it stands for engines that share
a card and know nothing of each other. `static` is one process with a partition of KV for each model.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from serving import registry
from serving.cost.table1 import published_spec
from serving.errors import command
from serving.generate import cuda_cluster
from serving.gpu_suite.results import save
from serving.interface import Cluster, Demand, Device, EventKind, Request, ServedModel, System

_OPTIONS = {"max_batch": 4, "prefill_chunk": 256, "page_bytes": 2 << 20, "max_running": 32}
_SYSTEMS = {
    "crosspool lowered": ("crosspool", {"control": "lowered"}),
    "crosspool host": ("crosspool", {"control": "host"}),
    "crosspool lowered 1 lane": ("crosspool", {"control": "lowered", "lanes": 1}),
    "static": ("static", {}),
    "static-2": ("static", {}),
}
_PROMPT_TOKENS, _NEW_TOKENS = (64, 512), (32, 128)


def cluster_for(name: str, kv_bytes: int, weights_bytes: int) -> Cluster:
    """The card as the system's devices; all systems get the same bytes in all."""
    total = kv_bytes + weights_bytes
    if name == "static":
        return cuda_cluster(1, total)
    if name == "static-2":
        return cuda_cluster(2, total // 2)
    return Cluster((Device("kv", "cuda", 0, kv_bytes), Device("weights", "cuda", 0, weights_bytes)))


def requests_of(models: Sequence[ServedModel], rate_rps: float, count: int, seed: int) -> list[tuple[float, Request]]:
    """`count` Poisson arrivals (seconds, request) at `rate_rps`, uniform over models and lengths."""
    rng, now, arrivals = random.Random(seed), 0.0, []
    for number in range(count):
        now += rng.expovariate(rate_rps)
        model = models[rng.randrange(len(models))]
        prompt = tuple(rng.randrange(model.spec.vocab_size) for _ in range(rng.randint(*_PROMPT_TOKENS)))
        arrivals.append((now, Request(number, model.name, prompt, rng.randint(*_NEW_TOKENS))))
    return arrivals


def replay(system: System, arrivals: Sequence[tuple[float, Request]], limit_s: float) -> dict[int, list[float]]:
    """Seconds of each request's planned arrival and of its tokens. Raises RuntimeError when one does not complete in time."""
    times = {request.request_id: [at] for at, request in arrivals}
    waiting, open_requests, start_ns = list(arrivals), set(times), time.monotonic_ns()
    while open_requests:
        now_s = (time.monotonic_ns() - start_ns) / 1e9
        if now_s > limit_s:
            raise RuntimeError(f"{len(open_requests)} requests were unfinished after {limit_s:.0f} s")
        while waiting and waiting[0][0] <= now_s:
            system.submit(waiting.pop(0)[1])
        for event in system.poll():
            if event.kind is EventKind.TOKENS:
                times[event.request_id].append((event.time_ns - start_ns) / 1e9)
            elif event.kind is EventKind.COMPLETED:
                open_requests.discard(event.request_id)
            elif event.kind in (EventKind.REJECTED, EventKind.FAILED):
                raise RuntimeError(f"request {event.request_id} was {event.kind.value}: {event.reason}")
        time.sleep(0.0005)
    return times


def summary(times: dict[int, list[float]]) -> dict[str, float]:
    """Mean and P99 of TBT (pooled over tokens) and TTFT, in seconds, and tokens a second of the whole run."""
    gaps = sorted(b - a for request in times.values() for a, b in pairwise(request[1:]))
    first = sorted(request[1] - request[0] for request in times.values())

    def p99(values: list[float]) -> float:
        return values[min(len(values) - 1, int(0.99 * len(values)))]

    tokens = sum(len(request) - 1 for request in times.values())
    return {
        "tbt_mean_s": sum(gaps) / len(gaps),
        "tbt_p99_s": p99(gaps),
        "ttft_mean_s": sum(first) / len(first),
        "ttft_p99_s": p99(first),
        "tokens_per_s": tokens / max(request[-1] for request in times.values()),
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.gpu_suite.serve", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="deepseek-v2-lite,qwen3-30b-a3b")
    parser.add_argument("--systems", default=",".join(_SYSTEMS))
    parser.add_argument("--rates", default="2,6", help="requests a second")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--kv-gib", type=int, default=24)
    parser.add_argument("--weights-gib", type=int, default=96)
    args = parser.parse_args(argv)
    names = args.models.split(",")
    models = [ServedModel(published_spec(name), Path(), "bfloat16", dummy=True) for name in names]
    rows: list[dict] = []
    for label in args.systems.split(","):
        name, options = _SYSTEMS[label]
        system = registry.create(name, {**_OPTIONS, **options})
        row = {"system": label}
        try:
            begun = time.monotonic()
            placement = system.plan(cluster_for(label, args.kv_gib << 30, args.weights_gib << 30), models, Demand())
            system.start(placement)
            row["start_s"] = time.monotonic() - begun
            replay(
                system, requests_of(models, 50.0, args.requests, seed=99), 90
            )  # prefill compiles for sizes as they come
            for rate in map(float, args.rates.split(",")):
                times = replay(system, requests_of(models, rate, args.requests, seed=int(rate)), 120)
                rows.append({**row, "rate_rps": rate, **summary(times)})
                print("row: " + _described(rows[-1]), flush=True)
                save(args.out, rows)
        except Exception as error:  # noqa: BLE001  the next system may still work
            rows.append({**row, "error": f"{type(error).__name__}: {error}"[:300]})
            print("row: " + _described(rows[-1]), flush=True)
        finally:
            system.stop()
        save(args.out, rows)
    return int(any("error" in row for row in rows))


def _described(row: dict) -> str:
    if "error" in row:
        return f"{row['system']:<25} {row['error']}"
    return (
        f"{row['system']:<25} {row['rate_rps']:4.1f} req/s  TBT {row['tbt_mean_s'] * 1e3:7.2f} ms, P99 "
        f"{row['tbt_p99_s'] * 1e3:7.2f}; TTFT {row['ttft_mean_s'] * 1e3:8.1f}, P99 {row['ttft_p99_s'] * 1e3:8.1f}; "
        f"{row['tokens_per_s']:6.0f} tok/s; start {row['start_s']:.0f} s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
