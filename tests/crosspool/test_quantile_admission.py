"""Admission by planned quantile: more run at once, whoever outgrows its promise pauses, and tokens do not change."""

import random

import pytest
from served import served, with_kv_pages
from test_token_equality import OPTIONS, assert_equal_to_judge

from serving import registry
from serving.errors import UserError
from serving.generate import cpu_cluster, generate
from serving.interface import Demand, EventKind, Request
from serving.sim.backend import simulate_card

pytestmark = pytest.mark.cpu

PAGES = 24
DEMAND = Demand({"mixtral": 1.0}, {"mixtral": [(16, 4)] * 9 + [(16, 60)]})  # nine of ten ask for little


def scarce(models, **options):
    system = registry.create("crosspool", {**OPTIONS, "quantile": 0.8, **options})
    placement = system.plan(cpu_cluster(2, 64 << 20), models, DEMAND)
    return system, with_kv_pages(placement, PAGES, OPTIONS["page_bytes"])


def long_requests(count):
    rng = random.Random(3)
    return [Request(i, "mixtral", tuple(rng.randrange(300) for _ in range(16)), 60) for i in range(count)]


def test_requests_that_outgrow_their_promise_pause_and_compute_the_same(tiny_checkpoints):
    models = served(tiny_checkpoints, ["mixtral"])
    system, placement = scarce(models, admission="quantile")
    requests = long_requests(6)
    try:
        system.start(placement)
        assert_equal_to_judge(requests, generate(system, requests), tiny_checkpoints)
        mapping = system.notes()["kv_mapping"]
        assert mapping["pages_mapped"] > 0 and mapping["mapping_ns"] > 0
        assert 0 <= mapping["unfilled_share"] < 1
        samples = system.pool_samples()
        assert max(sum(sample.pages_in_use.values()) for sample in samples) <= PAGES
        assert sum(samples[-1].pages_in_use.values()) == 0
    finally:
        system.stop()


def test_more_are_admitted_at_once_than_by_cap_and_none_is_preempted(tiny_checkpoints):
    models = served(tiny_checkpoints, ["mixtral"])
    at_once = {}
    for admission in ("cap", "quantile"):
        system, placement = scarce(models, admission=admission)
        backend = simulate_card("a100-40gb")
        try:
            system.start(placement, backend)
            for request in long_requests(12):
                system.submit(request)
            events = system.poll()
            at_once[admission] = sum(event.kind is EventKind.ADMITTED for event in events)
            for _ in range(100):
                backend.clock.sleep(0.1)
                events += system.poll()
        finally:
            system.stop()
        kinds = [event.kind for event in events]
        assert kinds.count(EventKind.COMPLETED) == 12
        assert EventKind.PREEMPTED not in kinds
    assert at_once["quantile"] > at_once["cap"]


def test_an_unknown_rule_is_refused():
    with pytest.raises(UserError, match="option admission is 'none'; known: cap, quantile"):
        registry.create("crosspool", {"admission": "none"})
