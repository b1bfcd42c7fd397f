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


@given(requests, st.integers(1, 4), st.integers(1, 5), st.integers(1, 16), st.randoms(use_true_random=False))
def test_any_number_of_lanes_finishes_every_sequence(wanted, lanes, max_batch, prefill_chunk, rng):
    scheduler = StepScheduler(3, StepLimits(max_batch, prefill_chunk))
    arriving = [sequence(i, *request) for i, request in enumerate(wanted)]
    generated = {s.request_id: [] for s in arriving}
    ended, in_flight = set(), []
    while arriving or scheduler.live or in_flight:
        if arriving and rng.random() < 0.4:
            scheduler.add(arriving.pop())
        elif len(in_flight) < lanes and (plan := scheduler.next_step()) is not None:
            busy = {id(s) for other in in_flight for s, _ in other.items}
            assert not busy & {id(s) for s, _ in plan.items}
            assert all(s.model == plan.model for s, _ in plan.items)
            assert len(plan.token_ids) == sum(plan.query_lens)
            in_flight.append(plan)
        elif in_flight:
            plan = in_flight.pop(rng.randrange(len(in_flight)))
            count = len(plan.logit_rows)
            for s, token, last in scheduler.complete(plan, iter(range(100, 100 + count))):
                generated[s.request_id].append(token)
                if last:
                    ended.add(s.request_id)
    assert ended == set(range(len(wanted)))
    assert [len(generated[i]) for i in range(len(wanted))] == [output for _, _, output in wanted]


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
