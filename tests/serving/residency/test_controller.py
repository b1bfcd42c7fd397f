"""Models that come and go under any load: no page is promised twice, nothing leaves within a step, and everyone finishes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.swap.request_level import RequestLevel
from baselines.swap.token_level import TokenLevel
from serving.batching import StepLimits
from serving.residency.controller import Evict, Expire, Facts, Load, Restore, Save, SwapController
from serving.scheduler import StepScheduler
from serving.sequence import Sequence

pytestmark = pytest.mark.cpu

MODELS, UNITS, LANES, TICK_NS = 4, 3, 2, 10_000_000
POLICIES = {
    "request": lambda: RequestLevel(hysteresis_s=0.02),
    "request, thrashing": lambda: RequestLevel(hysteresis_s=0.0, eviction="cost"),
    "request, keeping": lambda: RequestLevel(hysteresis_s=0.3, keep_alive_s=0.2, prefetch=False),
    "token": lambda: TokenLevel(tbt_target_s=0.05, max_quota_s=0.2),
    "token, long turns": lambda: TokenLevel(max_quota_s=4.0, eviction="cost", prefetch=False),
}
requests = st.lists(
    st.tuples(st.integers(0, MODELS - 1), st.integers(1, 7), st.integers(1, 6), st.integers(0, 30), st.booleans()),
    max_size=14,
)


class Device:
    """A device that carries out what its controller says, a tick a turn; a token is a KV page and a byte of KV."""

    def __init__(self, policy, images, arena_pages, kv_pages, host_bytes, deadline_ns, rng):
        facts = [Facts(pages, 1, 5 * TICK_NS) for pages in images]
        self.images, self.arena_pages, self.kv_pages, self.host_bytes = images, arena_pages, kv_pages, host_bytes
        self.control = SwapController(
            facts, arena_pages, kv_pages, host_bytes, lambda model, tokens: tokens, policy, deadline_ns
        )
        self.since_ns, self.deadline_ns = {}, deadline_ns
        self.scheduler = StepScheduler(MODELS, StepLimits(2, 4))
        self.rng, self.now_ns, self.lanes = rng, 0, []
        self.loading, self.away, self.ended = None, {}, set()

    def tick(self):
        self.now_ns += TICK_NS
        if self.loading is not None and self.rng.random() < 0.6:
            self.control.units[self.loading] += 1
            if self.control.units[self.loading] == UNITS:
                done, self.loading = self.loading, None
                self.control.loaded(done, self.now_ns, 5 * TICK_NS)
        for action in self.control.actions(self.now_ns):
            self.carry_out(action)
        self.check()
        while len(self.lanes) < LANES and (plan := self.scheduler.next_step(self.control.may_step())) is not None:
            assert self.control.units[plan.model], "a step of a model that is not there"
            assert not any(sequence in self.away for sequence, _ in plan.items), "a step without its KV"
            self.control.began(plan)
            self.lanes.append(plan)
        for plan in [
            plan for plan in self.lanes if self.control.units[plan.model] == UNITS and self.rng.random() < 0.8
        ]:
            self.lanes.remove(plan)
            produced = self.scheduler.complete(plan, iter([0] * len(plan.logit_rows)))
            ended = [sequence for sequence, _, last in produced if last]
            self.ended |= {sequence.request_id for sequence in ended}
            self.control.ended(plan, ended, self.now_ns, TICK_NS)

    def carry_out(self, action):
        running = {plan.model for plan in self.lanes}
        if isinstance(action, Load):
            assert self.loading is None and not self.control.units[action.model]
            self.loading = action.model
        elif isinstance(action, Evict):
            assert action.model not in running and action.model != self.loading
        elif isinstance(action, Save):
            assert action.sequence.model not in running
            self.away[action.sequence] = action.sequence.cached
        elif isinstance(action, Expire):
            sequence = action.sequence
            assert not sequence.cached and not sequence.in_flight
            assert self.now_ns - self.since_ns[sequence] > self.deadline_ns > 0
            self.scheduler.drop(sequence)
            self.ended.add(sequence.request_id)
        elif isinstance(action, Restore):
            assert self.away.pop(action.sequence) == action.sequence.cached

    def check(self):
        there = [m for m in range(MODELS) if self.control.models[m].resident or m == self.loading]
        assert self.control.free_pages == self.arena_pages - sum(self.images[m] for m in there) >= 0
        assert 0 <= self.control.free_kv_pages <= self.kv_pages
        assert self.control.free_host_bytes == self.host_bytes - sum(self.away.values()) >= 0
        for number, model in enumerate(self.control.view(self.now_ns).models):
            live = self.scheduler.sequences(number)
            assert model.live == len(live) and model.resident == self.control.models[number].resident
            assert model.prompts == sum(one.cached < one.prompt_tokens for one in live)
            untouched = not any(one.cached for one in self.scheduler.sequences(number))
            if self.deadline_ns and model.live and not model.seated and untouched:
                assert self.now_ns - model.oldest_ns <= self.deadline_ns, "forgotten"


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60, deadline=None)
@given(
    requests,
    st.lists(st.integers(1, 4), min_size=MODELS, max_size=MODELS),
    st.integers(0, 4),
    st.integers(12, 16),
    st.sampled_from([0, 6, 1000]),
    st.sampled_from([0, 7 * TICK_NS]),
    st.randoms(use_true_random=False),
)
def test_whatever_comes_all_end_and_everything_is_given_back(
    policy, asked, images, spare, kv_pages, host_bytes, deadline_ns, rng
):
    """Requests are (model, prompt, output, when it comes, whether it is cancelled on the way)."""
    device = Device(POLICIES[policy](), images, max(images) + spare, kv_pages, host_bytes, deadline_ns, rng)
    coming = sorted(enumerate(asked), key=lambda one: one[1][3])
    ticks = 0
    while len(device.ended) < len(asked):
        while coming and coming[0][1][3] <= ticks:
            number, (model, prompt, output, _, _) = coming.pop(0)
            sequence = Sequence(number, model, [0] * prompt, prompt, output)
            device.scheduler.add(sequence)
            device.since_ns[sequence] = device.now_ns
            device.control.add(sequence, device.now_ns)
        for number, (model, _, _, when, cancelled) in enumerate(asked):
            if cancelled and ticks == when + 5:
                device.scheduler.cancel(number, model)
        device.tick()
        ticks += 1
        assert ticks < 2000, f"{len(asked) - len(device.ended)} starve"
    assert device.control.free_kv_pages == kv_pages and device.control.free_host_bytes == host_bytes
    assert not device.away
