"""A plan in words: the tables that the command prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from crosspool.planner.layout import DeviceLoad
from crosspool.planner.plan import Plan
from crosspool.planner.quantile import order_statistic_interval
from crosspool.planner.watch import ObservedDemand, overflow_curve, watch
from serving.memory.budget import format_bytes


def report(plan: Plan) -> str:
    """All tables of `plan`, and what does not fit."""
    sections = [_demand(plan), _budget(plan), _parallel(plan), _layout(plan)]
    if plan.checks:
        sections.append(_checks(plan))
    return "\n\n".join("\n".join(section) for section in sections)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Lines of a plain table: the first column to the left, all others to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        line = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  " + "  ".join(line).rstrip()


def _demand(plan: Plan) -> Iterator[str]:
    yield f"Demand of {plan.config.name}: {len(plan.models)} models, {plan.config.sampling.holding} holding"
    own = plan.estimate.own_pages()
    rows = []
    for model in plan.models:
        demand = model.demand
        mean = f"{demand.prompt_tokens.mean():.0f}+{demand.output_tokens.mean():.0f}"
        live, service = f"{demand.live_requests:.2f}", f"{demand.service_s.mean():.2f}"
        pages = own[demand.name]
        rows.append(
            (demand.name, f"{demand.rate_rps:.3g}", mean, service, live, format_bytes(demand.token_bytes), pages)
            + (f"{model.dispersion:.2f}",)
        )
    last = f"own P{100 * plan.config.quantiles[-1]:g} pages"
    header = ("model", "req/s", "mean tokens", "mean T s", "live", "KV/token", last, "dispersion")
    yield from table(header, rows)


def _budget(plan: Plan) -> Iterator[str]:
    estimate, config = plan.estimate, plan.config
    drawn = f"{estimate.observations} observation times, {estimate.requests} live requests drawn"
    yield f"Pool budget: {drawn}, seed {config.seed}"
    rows = []
    for quantile in config.quantiles:
        pages = estimate.pages_at(quantile)
        low, high = order_statistic_interval(estimate.samples_pages, quantile, config.sampling.confidence)
        width = f"{(high - low) / 2 / max(pages, 1):.2%}"
        rows.append((f"P{100 * quantile:g}", pages, format_bytes(pages * config.page_bytes), f"{low}..{high}", width))
    yield from table(("quantile", "pages", "bytes", f"{config.sampling.confidence:.0%} interval", "half width"), rows)
    if not estimate.converged:
        yield "  not converged: the interval is wider than asked for; raise sampling.most_requests"
    mean, exact = estimate.mean_pages, plan.moments.mean
    yield f"  mean {mean:.1f} pages; M/G/infinity closed form {exact:.1f} ({mean / exact - 1:+.2%})"
    yield f"  lost to rounding: {estimate.rounding_loss:.1%} of the pages in use"
    own = sum(estimate.own_pages().values())
    ratio = own / max(estimate.budget_pages, 1)
    yield f"  partitions with the same promise each would need {own} pages, {ratio:.2f} times the pool's"


def _parallel(plan: Plan) -> Iterator[str]:
    devices, pool = plan.config.devices.count, len(plan.layout.kv)
    yield f"Parallelism: KV that one request can use, on all {devices} devices and on the KV pool of {pool}"
    rows = []
    for planned in plan.models:
        model, demand = planned.config.name, planned.demand
        alone, pooled = plan.monolithic[model], plan.layout.parallel[model]
        request = plan.layout.request_bytes(model)
        run_pages = request // plan.config.page_bytes // demand.num_runs
        fitting = run_pages * plan.config.page_bytes // demand.run_token_bytes
        longest = min(fitting, planned.spec.max_context_tokens)
        rows.append((model, alone, alone.request_share, pooled, pooled.request_share, format_bytes(request), longest))
    header = ("model", f"on {devices}", "share", f"on {pool}", "share", "one request", "longest request, tokens")
    yield from table(header, rows)


def _layout(plan: Plan) -> Iterator[str]:
    layout = plan.layout
    budget, pool = format_bytes(layout.kv_budget_bytes), format_bytes(layout.kv_bytes)
    yield f"Layout: FFN split {plan.config.pools.ffn_split}, KV budget {budget} of {pool}"
    header = ("device", "role", "memory", "weights", "workspace", "KV", "free")
    yield from table(header, [_device_row(load) for load in (*layout.kv, *layout.weights)])
    for shortfall in layout.shortfalls:
        yield f"  does not fit: {shortfall}"


def watch_report(plan: Plan, observed: ObservedDemand, block_s: float) -> str:
    """Expected against observed demand, overflow against quantile, and whether to plan again."""
    look = watch(plan.estimate, observed, block_s)
    lines = [f"Watch: {observed.duration_s:g} s observed, in blocks of {block_s:g} s"]
    ratio = f"{look.load_ratio:.2f} times"
    lines.append(f"  mean demand {look.observed_pages:.1f} pages, {ratio} the expected {look.expected_pages:.1f}")
    points = overflow_curve(plan.estimate, observed)
    rows = [(f"P{100 * p.quantile:g}", p.pages, f"{p.promised:.2%}", f"{p.observed:.2%}") for p in points]
    lines += table(("quantile", "pages", "promised overflow", "observed"), rows)
    advice = look.suggestion
    lines.append(f"  {advice.action}: {advice.budget_pages} pages ({advice.reason})")
    return "\n".join(lines)


def _device_row(load: DeviceLoad) -> tuple[str, ...]:
    weights = sum(load.weights_bytes.values())
    sizes = (load.device.memory_bytes, weights, load.workspace_bytes, load.kv_bytes, load.free_bytes)
    return load.device.name, load.role, *(format_bytes(size) for size in sizes)


def _checks(plan: Plan) -> Iterator[str]:
    check = plan.config.check
    yield f"Overflow on time that was not fitted: {check.model}, blocks of {check.block_s:g} s"
    rows = []
    for c in plan.checks:
        seen, span = f"{c.observed:.2%}", f"{c.low:.2%}..{c.high:.2%}"
        verdict = "kept" if c.kept else "missed"
        rows.append(
            (c.how, c.fit, f"P{100 * c.quantile:g}", c.budget_pages, f"{c.promise:.2%}", seen, f"{c.ratio:.2f}")
        )
        rows[-1] += (span, c.plans, verdict)
    header = ("check", "fit", "quantile", "mean pages", "promise", "observed", "ratio", "range", "plans", "")
    yield from table(header, rows)
    yield "  kept: within a factor of two of the promise"
    yield "  range: single folds of a split, or 95 % by redrawn blocks (rolling)"
