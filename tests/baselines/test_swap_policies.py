"""Policies of the swap baseline: who leaves first, who is loaded next, whose turn it is and for how long."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.swap.dispatch import Believed, choose
from baselines.swap.quota import quotas_s
from baselines.swap.request_level import RequestLevel
from baselines.swap.token_level import TokenLevel
from serving.residency.eviction import Candidate, victims
from serving.residency.policy import DeviceView, ModelView

pytestmark = pytest.mark.cpu

S = 10**9
IDLE = ModelView(
    image_pages=1, resident=True, loading=False, live=0, seated=0, prompts=0, oldest_ns=None, oldest_prompt_ns=None,
    used_ns=0, loaded_ns=0, step_ns=0, load_ns=S,
)  # fmt: skip


def idle(used_s):
    return dataclasses.replace(IDLE, used_ns=used_s * S)


def waiting(since_s, pages=1):
    since = since_s * S
    return dataclasses.replace(
        IDLE, resident=False, live=1, prompts=1, oldest_ns=since, oldest_prompt_ns=since, image_pages=pages
    )


def decoding(loaded_s=0, step_s=0.01):
    return dataclasses.replace(IDLE, live=1, seated=1, oldest_ns=0, loaded_ns=loaded_s * S, step_ns=round(step_s * S))


def view(now_s, *models, free=0):
    return DeviceView(round(now_s * S), models, free, link_busy=any(m.loading for m in models))


def test_the_least_recently_used_idle_model_makes_room_for_the_longest_waiting():
    decision = RequestLevel(prefetch=False).decide(view(9, idle(5), idle(3), idle(7), waiting(8), waiting(6)))
    assert (decision.load, decision.evict) == (4, (1,))


def test_cost_aware_eviction_spares_the_model_that_is_dear_to_bring_back():
    cheap, dear = Candidate(0, 1, 5 * S, S), Candidate(1, 1, 4 * S, 100 * S)
    assert victims([cheap, dear], 1, "lru", 9 * S) == [1]
    assert victims([cheap, dear], 1, "cost", 9 * S) == [0]


def test_an_idle_model_is_kept_alive_and_the_policy_says_until_when():
    policy = RequestLevel(keep_alive_s=10)
    kept = policy.decide(view(9, idle(5), waiting(8)))
    assert (kept.load, kept.again_ns) == (None, 15 * S)
    assert policy.decide(view(15, idle(5), waiting(8))).load == 1


def test_a_model_with_work_is_drained_only_after_its_hysteresis():
    policy = RequestLevel(hysteresis_s=4)
    early = policy.decide(view(9, decoding(loaded_s=6), waiting(8)))
    assert (early.load, early.seat, early.again_ns) == (None, (0,), 10 * S)
    draining = policy.decide(view(10, decoding(loaded_s=6), waiting(8)))
    assert (draining.step, draining.seat, draining.load) == ((0,), (), None)
    drained = dataclasses.replace(decoding(loaded_s=6), seated=0)
    assert policy.decide(view(11, drained, waiting(8))).evict == (0,)


def test_idle_models_go_before_those_with_work():
    decision = RequestLevel(hysteresis_s=0).decide(view(9, decoding(), idle(8), waiting(8)))
    assert (decision.load, decision.evict) == (2, (1,))


def test_free_room_is_filled_with_the_most_popular_model_unless_told_not_to():
    absent = dataclasses.replace(IDLE, resident=False)
    assert RequestLevel(popularity=(1, 0)).decide(view(1, absent, absent, free=1)).load == 1
    assert RequestLevel(prefetch=False).decide(view(1, absent, absent, free=1)).load is None


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), max_size=8),
    st.integers(1, 30),
    st.sampled_from(["lru", "cost"]),
)
def test_victims_suffice_and_none_of_them_could_stay(models, needed, rule):
    candidates = [Candidate(key, pages, used, 5) for key, (pages, used) in enumerate(models)]
    chosen = victims(candidates, needed, rule, 30)
    if chosen is None:
        assert sum(one.pages for one in candidates) < needed
        return
    pages = [candidates[key].pages for key in chosen]
    assert sum(pages) >= needed
    assert all(sum(pages) - one < needed for one in pages)


@given(
    st.lists(st.floats(1e-4, 0.2), min_size=1, max_size=8),
    st.floats(0, 5),
    st.floats(0.02, 0.5),
    st.floats(0.1, 8),
)
def test_every_turn_is_a_step_at_least_and_the_most_at_most(steps, switch_s, target_s, most_s):
    for turn, step in zip(quotas_s(steps, switch_s, target_s, most_s), steps, strict=True):
        assert step <= turn <= max(most_s, step) * (1 + 1e-9)


def test_turns_give_every_model_the_same_lead_and_slower_steps_longer_turns():
    steps, target = [0.005, 0.010], 0.1
    turns = quotas_s(steps, 0.5, target, 4.0)
    leads = [turn / step * target for turn, step in zip(turns, steps, strict=True)]
    assert leads[0] == pytest.approx(leads[1])
    assert leads[0] >= sum(turns) + 0.5  # worth at least the whole round: every token is on time
    assert turns[1] == pytest.approx(2 * turns[0])


def test_models_take_turns_and_each_lasts_its_quota():
    policy = TokenLevel(tbt_target_s=0.1, max_quota_s=4.0)
    models = (decoding(step_s=0.01), decoding(step_s=0.01))
    first = policy.decide(view(1.0, *models))
    assert first.step == (0,)
    ends_s = first.again_ns / S
    assert policy.decide(view(ends_s - 1e-3, *models)).step == (0,)
    assert policy.decide(view(ends_s, *models)).step == (1,)


def test_prompts_come_first_every_other_turn_and_grouped_in_order_of_arrival():
    policy = TokenLevel()
    prompt = dataclasses.replace(decoding(), prompts=1, live=2, oldest_prompt_ns=S // 2)
    assert policy.decide(view(1, decoding(), prompt)).step == (1,)
    assert policy.decide(view(2, decoding(), decoding())).step == (0,)


def test_resident_models_go_on_while_the_one_in_turn_is_loading_and_the_farthest_gives_way():
    policy = TokenLevel()
    loading = dataclasses.replace(waiting(0), loading=True)
    assert set(policy.decide(view(1, loading, decoding(), decoding())).step) == {0, 1, 2}
    policy = TokenLevel()
    decision = policy.decide(view(1, waiting(0), decoding(), decoding()))
    assert (decision.load, decision.evict) == (0, (2,))
    assert decision.give_way == (2, 1)


def test_a_request_goes_where_its_model_is_until_the_backlog_outweighs_a_load():
    assert choose([50.0, 0.0], [True, False], 100.0) == 0
    assert choose([150.0, 0.0], [True, False], 100.0) == 1
    believed = Believed(2, {"a": 1, "b": 1, "c": 1}, ["a", "b"])
    believed.use("a")
    believed.use("c")
    assert "b" not in believed and "a" in believed and "c" in believed
