"""Placement by KV pressure and the queue by deadline: pure policies against brute force, and what bad settings are told."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.multiplex.deadlines import DeadlineQueue, moore_hodgson
from baselines.multiplex.pressure import Pressing, greedy, naive, objective, place, pressures
from serving import registry
from serving.admission import AdmissionLimits
from serving.errors import CapacityError, UserError
from serving.generate import cpu_cluster
from serving.interface import Demand, ServedModel
from serving.memory.kv_pool import KVGeometry
from serving.spec import load_spec

pytestmark = pytest.mark.cpu

devices = st.lists(st.integers(10, 60), min_size=1, max_size=3).map(
    lambda sizes: {f"d{i}": s for i, s in enumerate(sizes)}
)
models_lists = st.lists(
    st.tuples(st.integers(1, 25), st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=5
).map(lambda all_: [Pressing(f"m{i}", held, least, float(demand)) for i, (held, least, demand) in enumerate(all_)])


def served(checkpoints, architectures=("mixtral", "deepseek_v2")):
    return [
        ServedModel(load_spec(checkpoints[name], f"m{i}"), checkpoints[name]) for i, name in enumerate(architectures)
    ]


def attempt(rule, models, memory_bytes):
    try:
        return rule(models, memory_bytes)
    except CapacityError:
        return None


def assert_fits(models, placed, memory_bytes):
    for device, size in memory_bytes.items():
        there = [model for model in models if placed[model.name] == device]
        if there:
            assert sum(m.held_bytes for m in there) + max(m.least_kv_bytes for m in there) <= size


@given(models_lists, devices)
def test_placement_fits_is_the_same_again_and_no_worse_than_largest_first(models, memory_bytes):
    placed = attempt(place, models, memory_bytes)
    simple = attempt(naive, models, memory_bytes)
    assert (placed is None) <= (simple is None and attempt(greedy, models, memory_bytes) is None)
    if placed is None:
        return
    assert set(placed) == {model.name for model in models}
    assert_fits(models, placed, memory_bytes)
    assert placed == place(random.Random(1).sample(models, len(models)), memory_bytes), "the order given is no matter"
    if simple is not None:
        assert objective(models, placed, memory_bytes) <= objective(models, simple, memory_bytes)


@given(models_lists, devices)
def test_what_does_not_fit_names_bytes_that_are_missing_indeed(models, memory_bytes):
    try:
        place(models, memory_bytes)
    except CapacityError as error:
        missing = int(str(error).split(" comes nearest and ")[1].split()[0])
        assert missing > 0
        roomier = {device: size + 10_000 for device, size in memory_bytes.items()}
        assert_fits(models, place(models, roomier), roomier)


def test_models_that_press_do_not_meet():
    """Largest first puts both hot models on one device, because the cold one fills the other."""
    models = [Pressing("cold", 12, 1, 0.0), Pressing("hot", 10, 1, 5.0), Pressing("warm", 9, 1, 4.0)]
    memory_bytes = {"d0": 50, "d1": 50}
    assert naive(models, memory_bytes) == {"cold": "d0", "hot": "d1", "warm": "d1"}
    placed = place(models, memory_bytes)
    assert placed["hot"] != placed["warm"]
    assert (
        pressures(models, placed, memory_bytes)[placed["hot"]]
        < pressures(models, naive(models, memory_bytes), memory_bytes)["d1"]
    )


jobs_lists = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), max_size=6)


@given(st.integers(0, 5), jobs_lists)
def test_no_order_meets_more_deadlines(now, jobs):
    on_time, late = moore_hodgson(now, jobs)
    assert sorted(on_time + late) == list(range(len(jobs)))
    end = now
    for index in on_time:
        end += jobs[index][0]
        assert end <= jobs[index][1], "who is said to be on time is"
    most = 0
    for order in itertools.permutations(range(len(jobs))):
        end, met = now, 0
        for index in order:
            end += jobs[index][0]
            met += end <= jobs[index][1]
        most = max(most, met)
    assert len(on_time) == most


def a_queue(prompts_at_once=1, rule="open", pages=500, **slo_s):
    limits = AdmissionLimits(pages, 64, 2, 10, rule)
    geometries = [KVGeometry(name, 1, 64, 1000) for name in slo_s]
    return DeadlineQueue(limits, geometries, slo_s.__getitem__, prompts_at_once)


def test_the_queue_lets_in_by_deadline_so_many_at_once_and_skips_who_may_not_run():
    queue = a_queue(patient=9.0, urgent=1.0)
    for request_id, model in enumerate(("patient", "patient", "urgent", "urgent", "urgent")):
        assert not queue.offer(request_id, model, 10, 5, request_id / 10)
    seen = []
    for step in range(4):
        (request_id,) = queue.admit(0.5)
        assert queue.admit(0.5) == [], "one prompt at once"
        queue.first_token(request_id, "urgent" if request_id > 1 else "patient", 0.6 + step / 10)
        seen.append(request_id)
    assert seen == [2, 3, 0, 1], "two of a model may run, so the third waits though it is due first"
    queue.finish(2)
    assert queue.admit(1.0) == [4]


def test_a_prompt_that_cannot_be_on_time_waits_for_those_that_can():
    queue = a_queue(only=1.0)
    queue.offer(0, "only", 100, 1, 0.0)
    assert queue.admit(0.0) == [0]
    queue.first_token(0, "only", 0.5)
    queue.finish(0)
    assert queue.work_s("only", 100) == pytest.approx(0.5)
    queue.offer(1, "only", 150, 1, 0.5)
    queue.offer(2, "only", 60, 1, 0.6)
    queue.offer(3, "only", 60, 1, 0.6)
    assert queue.admit(0.6) == [2], "the long one leaves time for neither of the two"


def test_under_the_cap_promises_fit_the_pool():
    queue = a_queue(prompts_at_once=4, rule="cap", pages=30, only=1.0)
    for request_id in range(3):
        queue.offer(request_id, "only", 5, 10, 0.0)
    assert queue.admit(0.0) == [0, 1]
    assert queue.promised_pages <= 30


def test_who_waits_past_the_deadline_of_the_queue_leaves_it_whole():
    limits = AdmissionLimits(10, 64, 1, 10, "open", deadline_s=1.0)
    queue = DeadlineQueue(limits, [KVGeometry("only", 1, 64, 1000)], lambda model: 1.0, 1)
    for request_id in range(2):
        queue.offer(request_id, "only", 4, 1, 0.0)
    assert queue.admit(0.0) == [0]
    assert queue.expire(2.0) == [1] and queue.queued == 0
    queue.first_token(0, "only", 2.0)
    queue.finish(0)
    queue.offer(1, "only", 4, 1, 2.0)
    assert queue.admit(2.0) == [1], "its number is free again"


def test_models_that_are_asked_for_much_lie_apart(tiny_checkpoints):
    models = served(tiny_checkpoints, ("mixtral", "deepseek_v2") * 2)
    system = registry.create("elastic-placement", {"page_bytes": 4096})
    demand = Demand({"m0": 0.1, "m1": 5.0, "m2": 0.1, "m3": 5.0}, {m.name: [(50, 50)] for m in models})
    placement = system.plan(cpu_cluster(2, 64 << 20), models, demand)
    where = {entry["model"]: entry["devices"] for entry in placement.options["instances"]}
    assert where["m1"] != where["m3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": {"m0": {"devices": [0]}}}, "decides itself where models lie"),
        ({"admission": "reserved"}, "known: optimistic, cap"),
        ({"ttft_slo_ms": 0}, "ttft_slo_ms is 0; it must be above 0"),
        ({"slo_scales": {"m0": -1}}, "slo_scales of m0 is -1"),
        ({"slo_scales": {"other": 2}}, "slo_scales names other; served: m0, m1"),
        ({"idle_evict_s": -1}, "idle_evict_s is -1; it must be 0 or more"),
        ({"prompts_at_once": 0}, "a whole number of at least 1"),
    ],
)
def test_bad_options_are_one_line(options, message, tiny_checkpoints):
    with pytest.raises(UserError, match=message):
        registry.create("elastic-placement", options).plan(cpu_cluster(1, 64 << 20), served(tiny_checkpoints), Demand())
