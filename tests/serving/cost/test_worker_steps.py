"""What a step costs once, told apart from its layers by the worker's own timeline."""

from __future__ import annotations

import dataclasses
import statistics
import time

import pytest
import torch

from serving.cost.calibrate import load_halves
from serving.cost.worker_steps import CHUNK_ROWS, DECODE_ROWS, measure_steps, spread
from serving.interface import ServedModel
from serving.spec import spec_from_config

pytestmark = pytest.mark.cpu

DELAY_S = 0.02  # far above what a busy machine adds
TINY = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 70,
    "vocab_size": 64,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ServedModel(spec_from_config(TINY, "tiny"), tmp_path_factory.mktemp("tiny"), "float32", dummy=True)


@pytest.fixture(autouse=True)
def one_thread():
    """As a worker has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Late:
    """A half of which one method takes DELAY_S longer."""

    def __init__(self, half, method: str) -> None:
        self._half, self._method = half, method

    def __getattr__(self, name: str):
        found = getattr(self._half, name)
        if name != self._method:
            return found

        def late(*args, **kwargs):
            time.sleep(DELAY_S)
            return found(*args, **kwargs)

        return late


def slowed(model: ServedModel, side: int, method: str) -> dict[str, float]:
    """The median row of each operator, with `method` of one side late."""
    halves = list(load_halves(model))
    halves[side] = Late(halves[side], method)
    found: dict[str, list[float]] = {}
    for row in measure_steps(model, *halves, rounds=1, decode_steps=2, lone_steps=2).once:
        found.setdefault(row.operator, []).append(row.seconds)
    return {operator: statistics.median(seconds) for operator, seconds in found.items()}


def test_what_is_done_once_counts_where_it_is_done_and_layers_count_nowhere(model):
    late_embedding, late_head = slowed(model, 0, "embed"), slowed(model, 0, "logits")
    assert late_embedding["stage_begin"] > DELAY_S > late_embedding["stage_end"]
    assert late_head["stage_end"] > DELAY_S > late_head["stage_begin"]
    for side, method in ((0, "attend"), (1, "forward")):
        assert max(slowed(model, side, method).values()) < DELAY_S


def test_rows_are_those_of_decode_steps_and_of_prompts_that_fit_the_context(model):
    rows = measure_steps(model, *load_halves(model), rounds=2, decode_steps=2, lone_steps=2).once
    begun = [row.columns["rows"] for row in rows if row.operator == "stage_begin"]
    fitting = [count - 0.5 for count in CHUNK_ROWS if count < TINY["max_position_embeddings"]]
    assert begun == [*DECODE_ROWS, *fitting]  # another length in each of both rounds
    assert [row.columns["rows"] for row in rows if row.operator == "stage_end"] == list(DECODE_ROWS)
    assert {row.variant for row in rows} == {"tiny"}


@pytest.mark.parametrize(
    ("side", "method", "late"),
    [(0, "attend", {"stage_decode", "stage_prefill"}), (1, "forward", {"stage_routed", "stage_dense"})],
    ids=["attention", "ffn"],
)
def test_what_a_layer_takes_longer_counts_in_its_own_stage(model, side, method, late):
    spec = dataclasses.replace(model.spec, dense_layers=frozenset({0}))
    halves = list(load_halves(model))
    halves[side] = Late(halves[side], method)
    layers = measure_steps(
        dataclasses.replace(model, spec=spec), *halves, rounds=1, decode_steps=2, lone_steps=2
    ).layers
    assert {row.operator for row in layers} == {f"stage_{name}" for name in ("decode", "prefill", "routed", "dense")}
    assert all((row.seconds > DELAY_S) == (row.operator in late) for row in layers)
    fitting = [count for count in CHUNK_ROWS if count < TINY["max_position_embeddings"]]
    decodes = [row.columns for row in layers if row.operator == "stage_decode"]
    assert [(one["batch_size"], one["context"]) for one in decodes] == [(rows, 12.5) for rows in DECODE_ROWS]
    assert [row.columns["isl"] for row in layers if row.operator == "stage_prefill"] == fitting


def test_a_model_of_one_layer_has_no_other_layer_to_compare_with(model):
    spec = dataclasses.replace(model.spec, num_layers=1)
    one = ServedModel(spec, model.checkpoint, "float32", dummy=True)
    steps = measure_steps(one, *load_halves(one), rounds=1, decode_steps=2, lone_steps=2)
    assert all(0 < row.seconds < 1 for row in steps.once + steps.layers)


@pytest.mark.parametrize(("lone_steps", "context"), [(7, 11 + 8 / 2), (500, 11 + 59 / 2)], ids=["as told", "what fits"])
def test_a_sequence_alone_decodes_for_longer_as_far_as_its_context_has_room(model, lone_steps, context):
    layers = measure_steps(model, *load_halves(model), rounds=1, decode_steps=2, lone_steps=lone_steps).layers
    contexts = [row.columns["context"] for row in layers if row.operator == "stage_decode"]
    assert contexts == [context, *[11 + 3 / 2] * (len(DECODE_ROWS) - 1)]


def test_a_worker_rests_between_batches_for_as_long_as_its_busy_share_says(model):
    halves = load_halves(model)
    halves = (
        Late(halves[0], "embed"),
        halves[1],
    )  # so that what is to be rested for is known: at least 9 steps of DELAY_S
    began_s = time.monotonic()
    measure_steps(model, *halves, rounds=1, decode_steps=1, lone_steps=1, busy_share=0.5)
    assert time.monotonic() - began_s >= 2 * 9 * DELAY_S


def test_the_spread_of_steps_is_that_of_their_times_over_the_mean_of_their_kind():
    assert spread([[1.0, 3.0], [20.0, 20.0]], parts=2) == (0.75, 1.25)
    assert spread([[5.0]], parts=4) == (1.0,)
    many = spread([range(1, 1000)], parts=8)
    assert len(many) == 8 and list(many) == sorted(many) and statistics.fmean(many) == pytest.approx(1.0)
