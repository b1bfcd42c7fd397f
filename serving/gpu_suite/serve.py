"""Systems serving two models on one card, open loop: time between tokens and to the first, system after system on the same
requests. Both pools of CrossPool are on the one card under budgets of their own.

Processes on one card take turns on it unless MPS runs: the engines of `elastic`, which take KV from one shared ledger as
they find it. `static` is one process with a partition of KV for each model, `quota` one with a pool that they share by quota.
All systems get the same bytes: what the weights of both halves need, and `--kv-gib` for KV and workspaces, so that a little
of it makes KV scarce. Rates are of each model. With `--against NAME` each row also says by how much that system's P99 TBT is
longer or shorter, by model.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

from serving import registry
from serving.backend import Clock, MonotonicClock
from serving.batching import StepLimits
from serving.capacity import attention_bytes, ffn_pool_bytes
from serving.errors import command
from serving.generate import cuda_cluster
from serving.gpu_suite.results import save
from serving.gpu_suite.seeded import seeded
from serving.interface import Cluster, Demand, Device, EventKind, Request, ServedModel, System

_LANES = 2
OPTIONS = {"max_batch": 4, "prefill_chunk": 256, "page_bytes": 2 << 20, "max_running": 32}
SYSTEMS = {
    "crosspool lowered": ("crosspool", {"control": "lowered", "lanes": _LANES}),
    "crosspool host": ("crosspool", {"control": "host", "lanes": _LANES}),
    "crosspool lowered 1 lane": ("crosspool", {"control": "lowered", "lanes": 1}),
    "static": ("static", {}),
    "elastic": ("elastic", {}),
    "elastic cap": ("elastic", {"admission": "cap"}),
    "elastic placement": ("elastic-placement", {}),
    "elastic placement 5 s": ("elastic-placement", {"idle_evict_s": 5.0}),
    "quota": ("quota", {}),
    "swap": ("swap", {}),
    "swap token": ("swap", {"mode": "token"}),
}
# What the suite has time for.
_DEFAULT = ("crosspool lowered", "crosspool host", "crosspool lowered 1 lane", "static", "elastic", "elastic cap")
_NEW_TOKENS = (32, 128)
_POLL_S = 5e-4


def pool_bytes(models: Sequence[ServedModel], kv_bytes: int) -> tuple[int, int]:
    """Bytes of CrossPool's two devices on the card: attention weights and `kv_bytes`; FFN weights and what a step needs."""
    limits = StepLimits(OPTIONS["max_batch"], OPTIONS["prefill_chunk"])
    return kv_bytes + sum(attention_bytes(model) for model in models), ffn_pool_bytes(models, limits, _LANES)


def cluster_for(name: str, kv_bytes: int, weights_bytes: int) -> Cluster:
    """The card as the system's devices; all systems get the same bytes in all."""
    total = kv_bytes + weights_bytes
    if name != "crosspool":
        return cuda_cluster(1, total)
    return Cluster((Device("kv", "cuda", 0, kv_bytes), Device("weights", "cuda", 0, weights_bytes)))


def requests_of(
    models: Sequence[ServedModel],
    rate_rps: float,
    count: int,
    seed: int,
    prompts: tuple[int, int] = (64, 512),
    skew: float | None = 0.0,
) -> list[tuple[float, Request]]:
    """`count` Poisson arrivals (seconds, request) at `rate_rps`, uniform over lengths; prompts of `prompts` tokens. The i-th
    model is asked i^-`skew` times as often as the first; None is 0 as the first runs drew it, which were asked other models."""
    shares = [(place + 1) ** -(skew or 0.0) for place in range(len(models))]
    rng, now, arrivals = random.Random(seed), 0.0, []
    for number in range(count):
        now += rng.expovariate(rate_rps)
        model = models[rng.randrange(len(models))] if skew is None else rng.choices(models, shares)[0]
        prompt = tuple(rng.randrange(model.spec.vocab_size) for _ in range(rng.randint(*prompts)))
        arrivals.append((now, Request(number, model.name, prompt, rng.randint(*_NEW_TOKENS))))
    return arrivals


def replay(
    system: System, arrivals: Sequence[tuple[float, Request]], limit_s: float, clock: Clock | None = None
) -> dict[int, list[float]]:
    """Seconds of each request's planned arrival and of its tokens, on the clock of the system's backend (this host's without
    it). Raises RuntimeError when one does not complete in time."""
    clock = clock or MonotonicClock()
    times = {request.request_id: [at] for at, request in arrivals}
    waiting, open_requests, start_ns = list(arrivals), set(times), clock.now_ns()
    while open_requests:
        now_s = (clock.now_ns() - start_ns) / 1e9
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
        clock.sleep(_POLL_S)
    return times


def p99_by_model(times: dict[int, list[float]], arrivals: Sequence[tuple[float, Request]]) -> dict[str, float]:
    """P99 of each model's times between tokens, in seconds."""
    gaps: dict[str, list[float]] = {}
    for _, request in arrivals:
        gaps.setdefault(request.model, []).extend(b - a for a, b in pairwise(times[request.request_id][1:]))
    return {model: _p99(sorted(values)) for model, values in gaps.items() if values}


def _p99(values: Sequence[float]) -> float:
    return values[min(len(values) - 1, int(0.99 * len(values)))]


def summary(times: dict[int, list[float]]) -> dict[str, float]:
    """Mean and P99 of TBT (pooled over tokens) and TTFT, in seconds, and tokens a second of the whole run."""
    gaps = sorted(b - a for request in times.values() for a, b in pairwise(request[1:]))
    first = sorted(request[1] - request[0] for request in times.values())

    tokens = sum(len(request) - 1 for request in times.values())
    return {
        "tbt_mean_s": sum(gaps) / len(gaps),
        "tbt_p99_s": _p99(gaps),
        "ttft_mean_s": sum(first) / len(first),
        "ttft_p99_s": _p99(first),
        "tokens_per_s": tokens / max(request[-1] for request in times.values()),
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.gpu_suite.serve", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="deepseek-v2-lite,qwen3-30b-a3b")
    parser.add_argument("--systems", default=",".join(_DEFAULT), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--rates", default="1,3", help="requests a second of each model")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1, help="loads of each rate, one after the other")
    parser.add_argument("--prompts", default="64,512", help="least and most tokens of a prompt")
    parser.add_argument(
        "--skews", default="0", help="the i-th model is asked i^-SKEW times as often; each a load of its own"
    )
    parser.add_argument(
        "--card-gb", type=float, default=0, help="of memory for everything, to stand for a smaller card"
    )
    parser.add_argument("--kv-gib", default="16", help="for KV and workspaces; each of several is a run of its own")
    parser.add_argument("--label", default="", help="added to the names of systems, for what is set outside (MPS)")
    parser.add_argument("--against", default="crosspool lowered", help="the system that others are compared with")
    args = parser.parse_args(argv)
    names = args.models.split(",")
    models = seeded(names)
    prompts = tuple(int(text) for text in args.prompts.split(","))
    rates, skews = ([float(text) for text in told.split(",")] for told in (args.rates, args.skews))
    rows: list[dict] = []
    for kv_gib, label in product(map(float, args.kv_gib.split(",")), args.systems.split(",")):
        name, options = SYSTEMS[label]
        system = registry.create(name, {**OPTIONS, **options})
        row = {
            "system": f"{label} {args.label}".strip(),
            "kv_gib": kv_gib,
            "prompts": list(prompts),
            "requests": args.requests,
            "models": names,
            **({"card_gb": args.card_gb} if args.card_gb else {}),
        }
        try:
            begun = time.monotonic()
            cluster = cluster_for(name, *_pools(models, int(kv_gib * 2**30), int(args.card_gb * 1e9)))
            system.start(system.plan(cluster, models, Demand()))
            row["start_s"] = time.monotonic() - begun
            replay(system, requests_of(models, 20.0, 12, 99, prompts), 90)
            for rate, skew, seed in product(rates, skews, range(args.seeds)):
                before = _happened(system)
                arrivals = requests_of(
                    models, rate * len(models), args.requests, 1000 * seed + int(10 * rate), prompts, skew
                )
                times = replay(system, arrivals, 120)
                found = {"p99_by_model": p99_by_model(times, arrivals), **summary(times)}
                found |= {what: count - before[what] for what, count in _happened(system).items()}
                rows.append({**row, "rate_rps": rate * len(models), "skew": skew, "seed": seed, **found})
                _compare(rows, args.against)
                print("row: " + _described(rows[-1]), flush=True)
                save(args.out, rows)
        except Exception as error:  # noqa: BLE001  the next system may still work
            rows.append({**row, "error": f"{type(error).__name__}: {error}"[:300]})
            print("row: " + _described(rows[-1]), flush=True)
        finally:
            system.stop()
        save(args.out, rows)
    return int(any("error" in row for row in rows))


def _pools(models: Sequence[ServedModel], kv_bytes: int, card_bytes: int) -> tuple[int, int]:
    """As `pool_bytes`, of a card of `card_bytes` where that is not 0: what weights leave of it is KV."""
    kv, weights = pool_bytes(models, kv_bytes)
    return (max(card_bytes - weights, 0), min(weights, card_bytes)) if card_bytes else (kv, weights)


def _happened(system: System) -> dict[str, int]:
    """What devices had to do so far beside computing."""
    stats = system.stats()
    return {"preemptions": sum(device.preemptions for device in stats), "swaps": sum(device.swaps for device in stats)}


def _compare(rows: Sequence[dict], against: str) -> None:
    """Add to the last row how many times the P99 TBT of `against`, under the same load, its own is, by model."""
    row = rows[-1]
    same = [
        other
        for other in rows
        if other["system"] == against
        and all(other.get(key) == row[key] for key in ("rate_rps", "kv_gib", "skew", "seed"))
    ]
    if same:
        row["p99_over"] = {m: value / same[0]["p99_by_model"][m] for m, value in row["p99_by_model"].items()}


def _described(row: dict) -> str:
    if "error" in row:
        return f"{row['system']:<25} {row['error']}"
    over = ", ".join(f"{model} {value:.2f}" for model, value in row.get("p99_over", {}).items())
    return (
        f"{row['system']:<25} {row['rate_rps']:4.1f} req/s, skew {row['skew']:g}  TBT {row['tbt_mean_s'] * 1e3:7.2f} ms, P99 "
        f"{row['tbt_p99_s'] * 1e3:7.2f}; TTFT {row['ttft_mean_s'] * 1e3:8.1f}, P99 {row['ttft_p99_s'] * 1e3:8.1f}; "
        f"{row['tokens_per_s']:6.0f} tok/s; start {row['start_s']:.0f} s; "
        f"KV {row['kv_gib']:g} GiB, {row['preemptions']} preemptions, {row['swaps']} swaps; P99 over: {over}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
