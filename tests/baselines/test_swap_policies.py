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


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 50)), min_size=1, max_size=8), st.integers(0, 8))
def test_of_equally_large_models_the_first_in_the_rule_s_order_go(models, count):
    """By age under `lru`; by what it costs to get one back for the time since its use under `cost`."""
    candidates = [Candidate(key, 1, used * S, load * S) for key, (used, load) in enumerate(models)]
    count, now = min(count, len(models)), 30 * S
    gone = victims(candidates, count, "lru", now)
    kept = [models[key][0] for key in range(len(models)) if key not in gone]
    assert len(gone) == count and all(models[key][0] <= min(kept, default=99) for key in gone)
    cost = [load / (30 - used) for used, load in models]
    gone = victims(candidates, count, "cost", now)
    kept = [cost[key] for key in range(len(models)) if key not in gone]
    assert len(gone) == count and all(cost[key] <= min(kept, default=99) for key in gone)


@st.composite
def model_views(draw):
    """A model as a device at second 20 can have it."""
    live = draw(st.integers(0, 3))
    there = draw(st.sampled_from(["resident", "resident", "absent"]))
    oldest = draw(st.integers(0, 20)) * S if live else None
    return dataclasses.replace(
        IDLE,
        image_pages=draw(st.integers(1, 4)),
        resident=there == "resident",
        live=live,
        seated=draw(st.integers(0, live)),
        prompts=live,
        oldest_ns=oldest,
        oldest_prompt_ns=oldest,
        used_ns=draw(st.integers(0, 20)) * S,
        loaded_ns=draw(st.integers(0, 20)) * S,
        load_ns=draw(st.integers(1, 9)) * S,
    )


@given(
    st.lists(model_views(), min_size=3, max_size=6),
    st.integers(0, 1),
    st.integers(0, 20),
    st.integers(0, 20),
    st.sampled_from(["lru", "cost"]),
)
def test_request_level_keeps_alive_spares_who_has_work_and_serves_the_longest_waiting(
    models, free, keep_alive_s, hysteresis_s, rule
):
    now = view(20, *models, free=free)
    decision = RequestLevel(rule, keep_alive_s, hysteresis_s, prefetch=False).decide(now)
    there = [number for number, model in enumerate(models) if model.resident]
    assert set(decision.evict) <= set(there) and set(decision.seat) <= set(decision.step) == set(there)
    for number in set(there) - set(decision.seat):  # on its way out, or gone
        model = models[number]
        since, least = (model.loaded_ns, hysteresis_s) if model.live else (model.used_ns, keep_alive_s)
        assert 20 * S - since >= least * S
    assert not any(models[number].seated for number in decision.evict)
    waiting = [number for number, model in enumerate(models) if not model.resident and model.live]
    if decision.load is None:
        assert not decision.evict
        return
    wanted = models[decision.load]
    assert decision.load in waiting and wanted.oldest_ns == min(models[n].oldest_ns for n in waiting)
    freed = [models[n].image_pages for n in decision.evict]
    assert free + sum(freed) >= wanted.image_pages
    idle_pages = sum(models[n].image_pages for n in decision.evict if not models[n].live)
    if any(models[n].live for n in decision.evict):
        assert free + idle_pages < wanted.image_pages, "who has work goes only where idle ones do not suffice"


@given(st.lists(st.integers(1, 40), min_size=2, max_size=6), st.integers(1, 4), st.randoms(use_true_random=False))
def test_every_decoding_model_has_its_turn_in_every_round(steps_ms, rounds, rng):
    """Token level, all resident: in each round each model has one turn, in the same order, and it lasts its quota at least."""
    policy = TokenLevel(tbt_target_s=0.1, max_quota_s=1.0)
    models = tuple(decoding(step_s=step / 1e3) for step in steps_ms)
    turns, now_s = [], 1.0
    while len(turns) < rounds * len(models):
        decision = policy.decide(view(now_s, *models))
        (turn,) = decision.step
        if not turns or turn != turns[-1][0]:
            turns.append((turn, now_s))
        elif rng.random() < 0.5:
            now_s = max(now_s, decision.again_ns / S)
            continue
        now_s += steps_ms[turn] / 1e3
    order = [turn for turn, _ in turns]
    assert sorted(order[: len(models)]) == list(range(len(models)))
    assert order == order[: len(models)] * rounds


@given(
    st.lists(st.floats(0.001, 0.02), min_size=1, max_size=6),
    st.floats(0.05, 1.0),
    st.floats(0.2, 0.5),
    st.floats(5.0, 60.0),
)
def test_turns_that_nothing_bounds_give_all_models_a_lead_of_a_round(steps, switch_s, target_s, most_s):
    turns = quotas_s(steps, switch_s, target_s, most_s)
    free = [(turn, step) for turn, step in zip(turns, steps, strict=True) if step * 1.001 < turn < most_s * 0.999]
    leads = [turn / step * target_s for turn, step in free]
    assert leads == pytest.approx([leads[0]] * len(leads)) if leads else True
    if len(free) == len(steps) and sum(step / target_s for step in steps) < 0.5:
        assert min(leads) >= (sum(turns) + switch_s) * (1 - 1e-9), "every token on time"


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
