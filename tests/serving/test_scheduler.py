"""The step scheduler: whatever the interleaving of lanes, every sequence gets exactly its tokens, and none starves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.batching import StepLimits
from serving.scheduler import StepScheduler
from serving.sequence import Sequence

pytestmark = pytest.mark.cpu

requests = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30), st.integers(1, 6)), min_size=1, max_size=12)


def sequence(request_id, model, prompt_tokens, output_tokens):
    return Sequence(request_id, model, list(range(prompt_tokens)), prompt_tokens, output_tokens)


def oldest_of_its_prompts(plan, in_flight):
    """Whether no step begun before `plan` computes an earlier chunk of a prompt of its."""
    before = in_flight[: in_flight.index(plan)]
    return not {id(s) for other in before for s, _ in other.items} & {id(s) for s, _ in plan.items}


@given(
    requests,
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 16),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_any_number_of_lanes_finishes_every_sequence(wanted, lanes, max_batch, prefill_chunk, chunks, rng):
    scheduler = StepScheduler(3, StepLimits(max_batch, prefill_chunk), chunks_in_flight=chunks)
    arriving = [sequence(i, *request) for i, request in enumerate(wanted)]
    generated = {s.request_id: [] for s in arriving}
    ended, in_flight = set(), []
    while arriving or scheduler.live or in_flight:
        if arriving and rng.random() < 0.4:
            scheduler.add(arriving.pop())
        elif len(in_flight) < lanes and (plan := scheduler.next_step()) is not None:
            under_way = [id(s) for other in in_flight for s, _ in other.items]
            for (s, rows), start in zip(plan.items, plan.starts, strict=True):
                assert under_way.count(id(s)) < chunks
                assert s.model == plan.model
                assert start == s.cached + s.rows_in_flight - rows
                assert start + rows <= len(s.tokens)
            assert len(plan.token_ids) == sum(plan.query_lens)
            in_flight.append(plan)
        elif in_flight:
            plan = rng.choice([step for step in in_flight if oldest_of_its_prompts(step, in_flight)])
            in_flight.remove(plan)
            count = len(plan.logit_rows)
            for s, token, last in scheduler.complete(plan, iter(range(100, 100 + count))):
                generated[s.request_id].append(token)
                if last:
                    ended.add(s.request_id)
    assert ended == set(range(len(wanted)))
    assert [len(generated[i]) for i in range(len(wanted))] == [output for _, _, output in wanted]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30), st.integers(1, 6), st.booleans()), max_size=12),
    st.integers(1, 4),
    st.integers(1, 16),
    st.integers(1, 3),
    st.integers(0, 2),
    st.randoms(use_true_random=False),
)
def test_rows_are_conserved_order_is_kept_and_no_model_or_lane_starves(
    wanted, lanes, prefill_chunk, chunks, lanes_of_model, rng
):
    """Every row of every sequence is computed once and in order; prompts of a model begin in order of arrival; a free lane
    gets a step where any sequence could have one; a ready model is passed over by each other one once, and none has more lanes
    than it may. Some are cancelled."""
    scheduler = StepScheduler(3, StepLimits(4, prefill_chunk, lanes_of_model), chunks_in_flight=chunks)
    sequences = [sequence(i, *request[:3]) for i, request in enumerate(wanted)]
    for one in sequences:
        scheduler.add(one)
    computed = [0] * len(sequences)
    passed_over, in_flight, ended = [0, 0, 0], [], []
    while scheduler.live or in_flight:
        for one in sequences:
            if wanted[one.request_id][3] and rng.random() < 0.05:
                assert scheduler.cancel(one.request_id, one.model) == (one.request_id not in ended)
        if len(in_flight) < lanes and rng.random() < 0.7:
            full = {
                model
                for model in range(3)
                if lanes_of_model and sum(p.model == model for p in in_flight) >= lanes_of_model
            }
            ready = {
                one.model
                for one in sequences
                if scheduler.holds(one) and (not one.in_flight or 0 < one.unscheduled and one.in_flight < chunks)
            } - full
            plan = scheduler.next_step()
            assert (plan is not None) == bool(ready), "a lane stays empty beside work, or has a step without"
            if plan is None:
                continue
            for model in range(3):
                passed_over[model] = (passed_over[model] + 1) * (model in ready and model != plan.model)
            assert max(passed_over) <= 2
            for (one, rows), start in zip(plan.items, plan.starts, strict=True):
                assert start == computed[one.request_id]
                computed[one.request_id] += rows
                older = [other for other in sequences[: one.request_id] if other.model == one.model]
                assert one.prompt_tokens == 1 or all(computed[other.request_id] for other in older)
            in_flight.append(plan)
        elif in_flight:
            plan = rng.choice([step for step in in_flight if oldest_of_its_prompts(step, in_flight)])
            in_flight.remove(plan)
            produced = scheduler.complete(plan, iter([0] * len(plan.logit_rows)))
            ended += [one.request_id for one, _, last in produced if last]
    assert sorted(ended) == list(range(len(wanted)))
    for one in sequences:
        assert computed[one.request_id] == one.cached == len(one.tokens) - 1
        assert not one.in_flight and not one.rows_in_flight
        assert one.cancelled or len(one.tokens) == one.prompt_tokens + one.max_new_tokens


def test_a_prompt_of_three_chunks_has_two_of_them_in_flight():
    scheduler = StepScheduler(1, StepLimits(max_batch=4, prefill_chunk=8), chunks_in_flight=2)
    scheduler.add(sequence(0, 0, 20, 5))
    first, second = scheduler.next_step(), scheduler.next_step()
    assert scheduler.next_step() is None
    assert (first.kv_lens, second.kv_lens) == ((8,), (16,))
    assert (first.logit_rows, second.logit_rows) == ((), ())
    assert scheduler.complete(first, iter([])) == []
    third = scheduler.next_step()
    assert (third.starts, third.query_lens, third.logit_rows) == ((16,), (4,), (3,))
    scheduler.complete(second, iter([]))
    assert scheduler.next_step() is None
    assert [token for _, token, _ in scheduler.complete(third, iter([9]))] == [9]
    assert scheduler.next_step().token_ids == [9]


def test_logit_rows_are_the_last_rows_of_complete_prompts():
    scheduler = StepScheduler(1, StepLimits(max_batch=4, prefill_chunk=8))
    for i, prompt in enumerate((3, 20, 1)):
        scheduler.add(sequence(i, 0, prompt, 5))
    plan = scheduler.next_step()
    assert plan.query_lens == (1, 3, 5)  # the one-token prompt is a decode row; the 20-token one gets what is left
    assert plan.logit_rows == (0, 3)
    assert plan.kv_lens == (1, 3, 5)


def test_generation_ends_at_a_stop_id():
    scheduler = StepScheduler(1, StepLimits())
    scheduler.add(Sequence(0, 0, [1, 2], 2, 9, stop_ids=(7,)))
    for token, expected in ((5, False), (7, True)):
        ((_, _, last),) = scheduler.complete(scheduler.next_step(), iter([token]))
        assert last is expected
    assert scheduler.live == 0


def test_models_take_turns():
    scheduler = StepScheduler(3, StepLimits())
    for i in range(3):
        scheduler.add(sequence(i, i, 1, 9))
    order = []
    for _ in range(6):
        plan = scheduler.next_step()
        order.append(plan.model)
        scheduler.complete(plan, iter([0]))
    assert order == [0, 1, 2, 0, 1, 2]
