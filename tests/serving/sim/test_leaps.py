"""Steps taken many at a time tell the host, event for event, what the same steps tell one by one, whatever comes between them."""

from pathlib import Path
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serving import registry
from serving.cost.table1 import published_spec
from serving.interface import Cluster, Demand, Device, Request, ServedModel
from serving.scheduler import StepScheduler
from serving.sim.backend import simulate_card

pytestmark = pytest.mark.cpu

MODELS = [
    ServedModel(published_spec(name), Path("unused"), "bfloat16") for name in ("deepseek-v2-lite", "qwen3-30b-a3b")
]
NAMES = [model.name for model in MODELS]
SYSTEMS = {
    "static": ("static", {"page_bytes": 1 << 16}),
    "quota": ("quota", {"page_bytes": 1 << 16, "adapt_every_s": 0.1}),
    "quota, few pages": ("quota", {"page_bytes": 1 << 16, "adapt_every_s": 0.05}),
}
MEMORY_BYTES = {"quota, few pages": 88_343 << 20}  # 1300 pages of KV: the longest sequence needs 351 or 1056 of them

gaps_s = st.sampled_from([0.0, 1e-6, 0.0037, 0.05, 0.4, 2.0])
prompts, outputs = st.sampled_from([1, 57, 300]), st.sampled_from([1, 2, 50, 400])
submissions = st.tuples(st.just("submit"), st.sampled_from(NAMES), prompts, outputs)
cancellations = st.tuples(st.just("cancel"), st.integers(0, 5))
actions = st.one_of(submissions, submissions, submissions, cancellations, st.just(("poll",)), st.just(("stats",)))
scripts = st.lists(st.tuples(gaps_s, actions), min_size=1, max_size=16)


# Quotas that adapt while a lone request decodes decide whose turn it is, and when, once a crowd comes.
CROWD = [
    (0.0, ("submit", NAMES[1], 57, 150)),
    (0.15, ("submit", NAMES[1], 300, 100)),
    *[(0.0, ("submit", NAMES[1], 300, output)) for output in (200, 200, 50)],
    (0.0, ("submit", NAMES[0], 300, 200)),
]


def play(case, script):
    """What a host sees that submits, cancels and looks as `script` says, and then waits for the end."""
    name, options = SYSTEMS[case]
    memory_bytes = MEMORY_BYTES.get(case, 99 << 30)
    cluster = Cluster((Device("gpu:0", "cuda", 0, memory_bytes, card="h200"),))
    system, backend, seen, submitted = registry.create(name, options), simulate_card("h200"), [], 0
    system.start(system.plan(cluster, MODELS, Demand()), backend)
    try:
        for gap_s, (what, *how) in script:
            backend.clock.sleep(gap_s)
            if what == "submit":
                model, prompt, output = how
                system.submit(Request(submitted, model, (0,) * prompt, output))
                submitted += 1
            elif what == "cancel":
                seen.append(system.cancel(*how))
            elif what == "poll":
                seen += [*system.poll(), *system.pool_samples()]
            else:
                seen.append(system.stats())
        while sum(getattr(one, "kind", None) is not None and one.kind.terminal for one in seen) < submitted:
            backend.clock.wait(1.0, 0.002)
            seen += [*system.poll(), *system.pool_samples()]
        return seen, system.stats()
    finally:
        system.stop()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(SYSTEMS)), scripts)
@example("quota, few pages", CROWD)
def test_whatever_comes_between_the_host_sees_the_same_as_step_by_step(case, script):
    found = play(case, script)
    with mock.patch.object(StepScheduler, "repeats", lambda scheduler, plan: 0):
        assert play(case, script) == found


def test_who_comes_at_the_end_of_a_step_is_not_in_the_next():
    """The step that ends then, and the one that begins, were decided before."""
    first = (0.0, ("submit", NAMES[0], 57, 50))
    alone_ns = tokens_of(0, [first])
    script = [first, (alone_ns[20] / 1e9, first[1])]
    assert tokens_of(0, script)[:22] == alone_ns[:22]
    assert tokens_of(1, script)[0] > alone_ns[21]


def tokens_of(request_id, script):
    """When the tokens of a request came."""
    seen, _ = play("static", script)
    return [one.time_ns for one in seen if getattr(one, "request_id", None) == request_id and one.tokens]
