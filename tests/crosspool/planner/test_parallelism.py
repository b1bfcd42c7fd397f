"""Parallelism plans: the paper's Fig. 2, and that no plan exposes more KV to a request."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspool.planner.parallelism import best_plan, plans
from serving.errors import UserError

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("num_kv_heads", "plan", "share"),
    [(4, "TP4", Fraction(1)), (2, "TP2 x DP2", Fraction(1, 2)), (1, "DP4", Fraction(1, 4))],
    ids=["mha", "gqa", "mla"],
)
def test_figure_2_four_gpus(num_kv_heads, plan, share):
    best = best_plan(num_kv_heads, 4)
    assert (str(best), best.request_share) == (plan, share)
    assert best.total_share == 1  # no KV is stored twice


def test_a_pool_of_one_device_exposes_everything_to_every_model():
    assert all(best_plan(heads, 1).request_share == 1 for heads in (1, 2, 3, 8, 16))


@given(st.integers(1, 32), st.integers(1, 16))
def test_no_plan_exposes_more(num_kv_heads, devices):
    best = best_plan(num_kv_heads, devices)
    assert best.devices == devices
    for plan in plans(num_kv_heads, devices):
        assert plan.request_share <= best.request_share
        assert plan.request_share <= plan.total_share <= 1


def test_a_plan_of_nothing_is_refused():
    with pytest.raises(UserError, match="at least 1"):
        plans(0, 4)
