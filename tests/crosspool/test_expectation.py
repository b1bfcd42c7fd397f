"""The planner beside the engine: what is expected stands in the placement, and what is observed is held against it."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosspool.expectation import PoolUse, RecentUse, compare, expect
from crosspool.planner.from_trace import ServiceModel
from serving import registry
from serving.errors import UserError
from serving.generate import cpu_cluster
from serving.interface import Demand, Request, ServedModel
from serving.memory.kv_pool import KVGeometry
from serving.sim.backend import simulate_card
from serving.spec import load_spec

pytestmark = pytest.mark.cpu

PAGE_BYTES = 4096
SERVICE = ServiceModel(base_s=1.0, prompt_token_s=0.0, output_token_s=0.01)


@pytest.fixture(scope="module")
def models(tiny_checkpoints):
    return [ServedModel(load_spec(tiny_checkpoints[a], a), Path(tiny_checkpoints[a])) for a in ("mixtral", "qwen3_moe")]


def expected(models, rate, lengths, pool_pages=100, quantile=0.95):
    demand = Demand({model.name: rate for model in models}, {model.name: lengths for model in models})
    return expect(models, demand, PAGE_BYTES, pool_pages, quantile, SERVICE)


def test_nothing_is_expected_of_an_unknown_demand(models):
    assert expect(models, Demand(), PAGE_BYTES, 100, 0.99, SERVICE) is None
    assert expect(models, Demand({"mixtral": 1.0}), PAGE_BYTES, 100, 0.99, SERVICE) is None


@settings(max_examples=15, deadline=None)
@given(st.floats(0.2, 5), st.integers(1, 100), st.integers(1, 100), st.integers(0, 4000))
def test_the_budget_covers_the_quantile_and_the_pool_is_judged_by_it(models, rate, prompt, output, pool_pages):
    found = expected(models, rate, [(prompt, output)], pool_pages)
    plain = found.described()
    assert found.estimate.overflow_probability(plain["budget_pages"]) <= 0.05 + 1e-9
    assert plain["fits"] == (pool_pages >= plain["budget_pages"])
    assert plain["pool_overflow"] <= 0.05 + 1e-9 if plain["fits"] else plain["pool_overflow"] > 0
    assert plain["promised_output_tokens"] == {model.name: output for model in models}
    # Little's law: live requests times what each holds when full is an upper bound of the mean.
    live = rate * (SERVICE.base_s + SERVICE.output_token_s * output)
    full = sum(KVGeometry.of(m.spec, m.dtype).pages(prompt + output, PAGE_BYTES) for m in models)
    assert plain["mean_pages"] <= live * full * 1.1 + 1


def test_more_than_expected_suggests_to_grow_and_as_expected_to_keep(models):
    found = expected(models, 1.0, [(32, 64), (64, 32)])
    budget = found.estimate.budget_pages
    times = [i * 0.1 for i in range(400)]
    high = compare(found, [PoolUse(t, budget, budget) for t in times])
    assert high["suggestion"] == "grow"
    assert high["suggested_pages"] > budget
    assert high["observed_overflow"] == 1.0
    calm = compare(found, [PoolUse(t, math.ceil(found.estimate.mean_pages), 0) for t in times])
    assert calm["suggestion"] == "keep"
    assert calm["observed_overflow"] == 0.0
    assert [point["promised"] for point in calm["curve"]] == sorted(
        (p["promised"] for p in calm["curve"]), reverse=True
    )
    assert compare(found, [PoolUse(0.0, 1, 0)]) == {}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_says_what_was_expected_and_what_was_seen(ranks, models):
    system = registry.create("crosspool", {"page_bytes": PAGE_BYTES, "kv_devices": ranks, "quantile": 0.9})
    demand = Demand({model.name: 2.0 for model in models}, {model.name: [(20, 30)] for model in models})
    placement = system.plan(cpu_cluster(3, 64 << 20), models, demand)
    backend = simulate_card("a100-40gb")
    try:
        system.start(placement, backend)
        for number in range(40):
            system.submit(Request(number, models[number % 2].name, (1,) * 20, 30))
            backend.clock.sleep(0.05)
            system.poll()
        backend.clock.sleep(10.0)
        system.poll()
        notes = system.notes()
    finally:
        system.stop()
    pages = sum(plan.kv_bytes for plan in placement.devices) // PAGE_BYTES
    assert notes["planner"]["pool_pages"] == pages
    assert notes["planner"]["quantile"] == 0.9
    assert notes["observed"]["observed_pages"] > 0
    assert notes["observed"]["suggestion"] in ("keep", "grow", "shrink", "wait")


def test_a_quantile_outside_the_open_unit_interval_is_refused():
    with pytest.raises(UserError, match="option quantile is 1"):
        registry.create("crosspool", {"quantile": 1.0})


@given(st.integers(2, 9), st.lists(st.integers(0, 99), max_size=40))
def test_only_the_latest_use_is_kept(most, pages):
    seen = RecentUse(most)
    for time_s, count in enumerate(pages):
        seen.add(time_s, count, 2 * count)
        assert len(seen) <= most
    assert len(seen) >= min(len(pages), most // 2)
    kept = len(seen)
    assert list(seen) == [PoolUse(t, pages[t], 2 * pages[t]) for t in range(len(pages) - kept, len(pages))]
