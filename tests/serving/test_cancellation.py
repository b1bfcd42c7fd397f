"""A cancelled request ends once and early, its pages go back, and those beside it get the tokens they would have had."""

import itertools
import time

import judges
import pytest

from serving import registry
from serving.generate import cpu_cluster
from serving.interface import Demand, EventKind, Request, ServedModel
from serving.sim.backend import simulate_card
from serving.spec import load_spec

pytestmark = pytest.mark.cpu

LONG, MODELS = 60, ("mixtral", "glm4_moe_lite")
SYSTEMS = {
    "crosspool": ("crosspool", {}),
    "crosspool quantile": ("crosspool", {"admission": "quantile"}),
    "static": ("static", {}),
    "static, cut": ("static", {"placement": "given", "groups": {name: {"devices": ["cpu:0", "cpu:1"]} for name in MODELS}}),
    "elastic": ("elastic", {}),
    "elastic-cap": ("elastic", {"admission": "cap"}),
    "elastic-placement": ("elastic-placement", {}),
    "quota": ("quota", {}),
    "swap": ("swap", {}),
    "swap-token": ("swap", {"mode": "token"}),
}  # fmt: skip


def run(system_name, checkpoints, cancelled, backend=None, count=10, **options):
    """`count` requests of which `cancelled` are cancelled, some before they begin. Returns (how each ended, its tokens, last
    pages in use by pool), by request."""
    models = [ServedModel(load_spec(checkpoints[name], name), checkpoints[name]) for name in MODELS]
    system = registry.create(system_name, {"page_bytes": 4096, "max_running": 3, **options})
    system.start(system.plan(cpu_cluster(2, 16 << 20), models, Demand()), backend)
    ended, tokens, pages = {}, {number: [] for number in range(count)}, {}
    clock, deadline = backend.clock if backend else None, time.monotonic() + 60
    try:
        for number in range(count):
            prompt = tuple((7 * number + 3 * place) % 300 for place in range(20))
            system.submit(Request(number, MODELS[number % 2], prompt, LONG))
        waiting = set(cancelled)
        for turn in itertools.count():
            assert time.monotonic() < deadline
            for event in system.poll():
                tokens[event.request_id] += event.tokens
                if event.kind.terminal:
                    assert event.request_id not in ended
                    ended[event.request_id] = event.kind
            for sample in system.pool_samples():
                pages[sample.device, tuple(sample.pages_in_use)] = sum(sample.pages_in_use.values())
            for number in sorted(waiting):
                if turn == 0 and number >= count - 2 or len(tokens[number]) >= 2:
                    assert system.cancel(number)
                    waiting.discard(number)
            if len(ended) == count and not any(pages.values()):
                break
            clock.sleep(2e-5) if clock else time.sleep(0.001)
        assert not system.cancel(0) and not system.cancel(count + 1)
    finally:
        system.stop()
    return ended, tokens, pages


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_simulated_system_ends_what_is_cancelled(name, tiny_checkpoints):
    system, options = SYSTEMS[name]
    ended, tokens, pages = run(system, tiny_checkpoints, {1, 4, 9}, simulate_card("h200"), **options)
    assert {number for number, kind in ended.items() if kind is EventKind.CANCELLED} == {1, 4, 9}
    assert all(
        kind is EventKind.COMPLETED and len(tokens[n]) == LONG for n, kind in ended.items() if n not in {1, 4, 9}
    )
    assert all(len(tokens[number]) < LONG for number in (1, 4, 9)) and pages


@pytest.mark.parametrize("name", ["crosspool", "static, cut", "elastic", "swap"])
def test_a_cancellation_frees_its_pages_and_leaves_other_tokens_alone(name, tiny_checkpoints):
    system, options = SYSTEMS[name]
    ended, tokens, pages = run(system, tiny_checkpoints, {1, 4, 9}, **options)
    assert {number for number, kind in ended.items() if kind is EventKind.CANCELLED} == {1, 4, 9}
    assert all(len(tokens[number]) < LONG for number in (1, 4, 9)) and pages
    for number in (0, 3, 4):
        prompt = tuple((7 * number + 3 * place) % 300 for place in range(20))
        assert judges.greedy_agrees(tiny_checkpoints[MODELS[number % 2]], prompt, tokens[number])
