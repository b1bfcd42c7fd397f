"""Metrics against cases worked out by hand."""

import pytest

from runner import metrics
from runner.config import SLO
from runner.observation import COMPLETED, FAILED, REJECTED, Observation, PoolRow, RequestRow
from serving.interface import DeviceStats

pytestmark = pytest.mark.cpu

MS = 1_000_000


def row(request_id=0, model="a", planned=0, admitted=None, tokens=(), outcome=COMPLETED, **more):
    times = [t * MS for t in tokens]
    admitted_ns = None if admitted is None else admitted * MS
    return RequestRow(
        request_id,
        model,
        10,
        max(len(times), 1),
        planned * MS,
        planned * MS,
        admitted_ns,
        times,
        outcome=outcome,
        **more,
    )


def test_latencies_run_from_the_planned_arrival():
    latency = metrics.latency_of(row(planned=100, admitted=130, tokens=(150, 160, 190)))
    assert latency.ttft_ms == 50
    assert latency.e2el_ms == 90
    assert latency.tpot_ms == (90 - 50) / 2
    assert latency.itl_ms == (10, 30)
    assert latency.queue_wait_ms == 30


def test_one_token_has_no_tpot_and_none_at_all_has_no_ttft():
    assert metrics.latency_of(row(tokens=(5,))).tpot_ms is None
    assert metrics.latency_of(row(outcome=REJECTED)).ttft_ms is None


def test_statistics_are_numpys_and_empty_is_none():
    numbers = metrics.statistics([1.0, 2.0, 3.0, 10.0])
    assert numbers["mean"] == 4 and numbers["median"] == 2.5
    assert numbers["p90"] == pytest.approx(7.9)
    assert set(metrics.statistics([]).values()) == {None}


def test_itl_pools_tokens_while_tpot_pools_requests():
    rows = [row(0, tokens=(0, 10, 20, 30)), row(1, tokens=(0, 100))]
    summary = metrics.latency_metrics(rows)
    assert summary["mean_itl_ms"] == pytest.approx((10 * 3 + 100) / 4)
    assert summary["mean_tpot_ms"] == pytest.approx((10 + 100) / 2)


def test_failed_and_rejected_requests_miss_their_slo_and_add_no_latency():
    slo = SLO(ttft_ms=20, tpot_ms=10)
    rows = [
        row(0, tokens=(10, 20)),
        row(1, tokens=(10, 25)),  # TPOT 15
        row(2, tokens=(30, 31)),  # TTFT 30
        row(3, tokens=(10,)),  # no TPOT: judged by TTFT
        row(4, tokens=(1, 2), outcome=FAILED),
        row(5, outcome=REJECTED),
    ]
    counts = metrics.count_metrics(rows, slo, duration_s=2.0, offered_s=1.5)
    assert [metrics.meets(r, slo) for r in rows] == [True, False, False, True, False, False]
    assert counts["completed"], counts["failed"] == (4, 1)
    assert counts["slo_attainment"] == 2 / 6
    assert counts["request_goodput"] == 1.0
    assert counts["request_throughput"] == 2.0
    assert counts["output_throughput"] == 9 / 2
    assert counts["offered_rate_rps"] == 4.0
    assert metrics.latency_metrics(rows)["mean_ttft_ms"] == pytest.approx((10 + 10 + 30 + 10) / 4)


def test_pages_are_weighted_by_time_and_summed_over_pools():
    def sample(time, pool, model, pages, budget):
        return PoolRow(time * MS, pool, model, pages, budget, 4096)

    pools = [
        sample(0, "x", "a", 4, 10),
        sample(10, "y", "b", 2, 20),
        sample(40, "x", "a", 0, 10),
        sample(50, "y", "b", 0, 20),
    ]
    summary = metrics.pool_metrics(pools)
    assert summary["peak_kv_pages"] == 6
    assert summary["mean_kv_pages"] == pytest.approx((4 * 10 + 6 * 30 + 2 * 10) / 50)
    assert summary["kv_page_budget"] == 30
    assert summary["peak_kv_share"] == pytest.approx(0.2)


def test_models_are_also_seen_alone_and_devices_by_their_busy_share():
    rows = [row(0, "hot", tokens=(0, 1)), row(1, "hot", tokens=(0, 1)), row(2, "cold", tokens=(0, 50))]
    stats = [DeviceStats("cpu:0", 30, 100, 4096), DeviceStats("cpu:1", 90, 100)]
    seen = Observation(rows, devices=stats, duration_ns=10**9)
    slo = SLO(1000, 1000)
    by_model = metrics.by_model(seen, slo, 1.0)
    assert by_model["cold"]["p99_itl_ms"] == 50 and by_model["hot"]["p99_itl_ms"] == 1
    summary = metrics.summarise(seen, slo, 1.0)
    assert summary["busy_share/cpu:0"] == 0.3
    assert summary["bytes_crossed"] == 4096
