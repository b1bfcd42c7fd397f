"""The cost forms, their fit, the measured table and the routing distributions, on rows made here."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.cost.fit import fit_form, fitting_half, predict, shape_keys
from serving.cost.form import Kernel, soft_max, waves
from serving.cost.forms import ELEMENTWISE, FORMS
from serving.cost.hardware import load_hardware
from serving.cost.routing import distinct_experts
from serving.cost.silicon import Rows
from serving.cost.table import MeasuredTable
from serving.errors import UserError

pytestmark = pytest.mark.cpu

H200 = load_hardware("h200")
TRUTH = {"t0_us": 3.0, "eta_b": 0.8, "eta_f": 0.5, "q": 2.0, "tail": 0.1, "k_ns": 2.0, "k_split": 3.0}


def gemm_rows(shapes=((512, 1024), (4096, 2048), (8192, 8192), (1024, 6144)), wobble=0.0) -> Rows:
    """GEMM rows that follow the form exactly, or off by `wobble` in alternation."""
    grid = [(m, n, k) for n, k in shapes for m in (2, 4, 8, 16, 32, 64)]
    columns = {name: np.array([float(point[i]) for point in grid]) for i, name in enumerate("mnk")}
    seconds = FORMS["gemm"].cost(TRUTH, columns, H200, Kernel())
    seconds = seconds * np.where(np.arange(len(grid)) % 2, 1 + wobble, 1 - wobble)
    return Rows("h200", "gemm", columns, np.array(["made/m64"] * len(grid)), seconds, ())


def test_a_fit_recovers_the_times_it_was_made_from():
    rows = gemm_rows(shapes=[(n, k) for n in (256, 1024, 4096, 16384) for k in (256, 2048, 8192)])
    found = fit_form(FORMS["gemm"], rows.columns, rows.seconds, H200, Kernel())
    again = FORMS["gemm"].cost(found, rows.columns, H200, Kernel())
    assert np.max(np.abs(again / rows.seconds - 1)) < 0.03


def test_a_split_never_cuts_through_a_shape_and_depends_on_its_seed_only():
    rows = gemm_rows(shapes=[(n, k) for n in (256, 512, 1024) for k in (256, 512, 1024)])
    half, keys = fitting_half(rows, seed=3), shape_keys(rows)
    assert set(keys[half]).isdisjoint(keys[~half])
    assert len(set(keys[half])) == 5
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = Rows(
        rows.card, rows.operator, {c: v[order] for c, v in rows.columns.items()}, rows.variant, rows.seconds, ()
    )
    assert (fitting_half(shuffled, seed=3) == half[order]).all()
    assert (fitting_half(rows, seed=4) != half).any()


@given(a=st.floats(1e-12, 1e3), b=st.floats(1e-12, 1e3), q=st.floats(1, 8))
def test_soft_max_lies_between_the_largest_and_the_sum(a, b, q):
    value = float(soft_max(q, a, b))
    assert max(a, b) * (1 - 1e-9) <= value <= (a + b) * (1 + 1e-9)


def test_waves_count_the_last_one_whole():
    assert waves(133, 132, True) == 2
    assert waves(133, 132, False) == pytest.approx(133 / 132)
    assert waves(1, 132, True) == 1


SHAPED = {
    "gemm": ({"m": 8, "n": 2048, "k": 2048}, "m"),
    "moe": (
        {"num_tokens": 8, "hidden_size": 2048, "width": 768, "topk": 8, "num_experts": 128, "distinct": 50},
        "distinct",
    ),
    "decode_attention": (
        {"batch_size": 4, "context": 4096, "num_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "cold": True},
        "batch_size",
    ),
    "decode_mla": ({"batch_size": 4, "context": 4096, "num_heads": 16, "cold": True}, "batch_size"),
    "prefill_attention": (
        {"batch_size": 1, "isl": 1024, "num_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
        "isl",
    ),
    "prefill_mla": ({"batch_size": 1, "isl": 1024, "num_heads": 16}, "isl"),
    "collective": ({"num_gpus": 4, "message_size": 1 << 20}, "message_size"),
    "stage_decode": ({"batch_size": 2, "context": 100}, "context"),
    "stage_beside": ({"batch_size": 2, "context": 100}, "context"),
    "stage_prefill": ({"isl": 64, "past": 64}, "past"),
    "stage_routed": ({"num_tokens": 4, "distinct": 6}, "num_tokens"),
    **{f"stage_{name}": ({"rows": 8}, "rows") for name in ("dense", "begin", "end")},
    **{name: ({"rows": 8, "width": 2048}, "rows") for name in ELEMENTWISE},
}


@pytest.mark.parametrize("operator", sorted(FORMS))
def test_every_form_is_positive_and_grows_with_work(operator):
    form, (point, grows) = FORMS[operator], SHAPED[operator]
    small = form.cost(form.initial, point, H200, Kernel())
    large = form.cost(form.initial, point | {grows: point[grows] * 64}, H200, Kernel())
    assert 0 < small < large


@pytest.mark.parametrize("operator", sorted(FORMS))
def test_a_faster_card_is_never_slower(operator):
    form, (point, grows) = FORMS[operator], SHAPED[operator]
    point = point | {grows: point[grows] * 16}
    faster = dataclasses.replace(
        H200, memory_bandwidth=2 * H200.memory_bandwidth, bf16_flops=2 * H200.bf16_flops, peer_bandwidth=1e12
    )
    assert form.cost(form.initial, point, faster, Kernel()) <= form.cost(form.initial, point, H200, Kernel())


def test_cold_kv_costs_at_least_what_cached_kv_does():
    form, (point, _) = FORMS["decode_attention"], SHAPED["decode_attention"]
    cold = form.cost(form.initial, point, H200, Kernel())
    assert cold > form.cost(form.initial, point | {"cold": False}, H200, Kernel())


def test_a_captured_graph_drops_the_hosts_floor():
    form, (point, _) = FORMS["decode_mla"], SHAPED["decode_mla"]
    kernel = Kernel(host_floor=True)
    eager = form.cost(form.initial, point, H200, kernel)
    assert eager == pytest.approx(300e-6)
    assert form.cost(form.initial, point | {"graph": True}, H200, kernel) < eager


def test_a_table_returns_what_was_measured_and_interpolates_between():
    rows = gemm_rows(wobble=0.2)
    fitted = {"made/m64": TRUTH}
    table = MeasuredTable(rows, H200, fitted)
    assert np.allclose(table.predict(rows), rows.seconds)
    between = {"m": 6.0, "n": 512.0, "k": 1024.0}
    form = FORMS["gemm"].cost(TRUTH, between, H200, Kernel())
    assert 0.8 * form < form * table.correction("made/m64", between) < 1.2 * form
    assert table.correction("never/seen", between) == 1


def test_a_table_keeps_its_last_ratio_beyond_its_sizes_and_averages_shapes_it_never_saw():
    rows = gemm_rows()
    rows = dataclasses.replace(rows, seconds=rows.seconds * 1.1)
    table = MeasuredTable(rows, H200, {"made/m64": TRUTH})
    assert table.correction("made/m64", {"m": 4096.0, "n": 512.0, "k": 1024.0}) == pytest.approx(1.1)
    assert table.correction("made/m64", {"m": 8.0, "n": 3000.0, "k": 3000.0}) == pytest.approx(1.1)


def test_rows_without_coefficients_are_not_predicted():
    rows = gemm_rows()
    assert np.isnan(predict({}, rows, H200)).all()
    assert np.allclose(predict({"other": TRUTH}, rows, H200, {"made/m64": "other"}), rows.seconds)


def test_balanced_and_uniform_routing():
    assert distinct_experts(4, 128, 8, "balanced") == 32
    assert distinct_experts(64, 128, 8, "balanced") == 128
    assert distinct_experts(1, 128, 8) == pytest.approx(8)
    with pytest.raises(UserError, match="unknown routing distribution 'zipf'.*power_law"):
        distinct_experts(1, 8, 2, "zipf")


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 300),
    experts=st.sampled_from([8, 64, 128]),
    top_k=st.sampled_from([2, 6, 8]),
    exponent=st.sampled_from(["1.01", "1.2"]),
)
def test_skewed_routing_hits_some_experts_and_never_more_than_balanced(tokens, experts, top_k, exponent):
    hit = distinct_experts(tokens, experts, top_k, f"power_law_{exponent}")
    assert 1 <= hit <= distinct_experts(tokens, experts, top_k, "balanced")
