"""What the card's halves compute, judged on the CPU: the same layers over the operators' CPU forms, KV read through block
tables. A card runs the same code over the CUDA forms (tests/serving/cuda/test_card_systems.py)."""

import judges
import pytest
import torch

from serving.checkpoints import open_checkpoint
from serving.cuda.exchange import InPlace
from serving.cuda.layers import CardAttentionHalf, CardFFNHalf
from serving.cuda.layout import IDLE_SLOT, CardLayout, decode_numbers
from serving.cuda.runner import CardModel, buckets_up_to
from serving.memory.kv_pool import KVPool
from serving.scheduler import StepPlan
from serving.sequence import Sequence
from serving.spec import ARCHITECTURES, load_spec

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
PAGE_BYTES = 1 << 16  # runs begin on whole blocks


@pytest.fixture
def card_model(request, tiny_checkpoints):
    directory = tiny_checkpoints[request.param]
    spec = load_spec(directory)
    with open_checkpoint(directory, spec.name) as weights:
        halves = [half(spec, weights, torch.float32, CPU) for half in (CardAttentionHalf, CardFFNHalf)]
    pool = KVPool(200, PAGE_BYTES, [(spec, "float32")], max_runs=4)
    model = CardModel.of(*halves, pool.models[spec.name])
    yield directory, model
    model.kv.layers.clear()
    pool.close()


def open_sequence(model, prompt, new_tokens):
    run = model.kv.open_run()
    model.kv.grow(run, len(prompt) + new_tokens)
    return Sequence(0, 0, list(prompt), len(prompt), new_tokens, run=run)


@torch.inference_mode()
def step(model, rows_of):
    plan = StepPlan(0, tuple(rows_of))
    tokens = model.forward(CardLayout.ragged(plan, model.blocks), InPlace(model.ffn)).tolist()
    for sequence, rows in plan.items:
        wanted = rows == sequence.pending
        sequence.cached += rows
        if wanted:
            sequence.append(tokens.pop(0))


@pytest.mark.parametrize("card_model", ARCHITECTURES, indirect=True)
def test_tokens_equal_the_judge(card_model):
    """Two sequences: one prefilled in chunks while the other decodes, then both decode."""
    directory, model = card_model
    prompts = [(5, 9, 2, 7, 1, 3, 8), (4, 6)]
    long, short = (open_sequence(model, prompt, 6) for prompt in prompts)
    step(model, [(short, 2)])
    step(model, [(short, 1), (long, 4)])
    step(model, [(short, 1), (long, 3)])
    while long.pending and len(long.tokens) < len(prompts[0]) + 6:
        step(model, [(long, 1)])
    for sequence, prompt in zip((long, short), prompts, strict=True):
        new = sequence.tokens[len(prompt) :]
        assert new == judges.greedy_reference(directory, prompt, len(new))
    assert len(long.tokens) == len(prompts[0]) + 6


@pytest.mark.parametrize("card_model", ["deepseek_v2"], indirect=True)
def test_decode_numbers_make_the_same_layout(card_model):
    """What a graph makes of its array of numbers is what the eager path makes of the plan; rows beyond it are idle."""
    _, model = card_model
    sequences = [open_sequence(model, (1, 2, 3), 4), open_sequence(model, (7,) * 70, 4)]
    for sequence in sequences:
        sequence.cached = len(sequence.tokens) - 1
    plan = StepPlan(0, tuple((sequence, 1) for sequence in sequences))
    numbers = torch.zeros(5, 4, dtype=torch.int64)
    decode_numbers(plan, numbers)
    fixed, eager = CardLayout.decode(numbers, model.blocks), CardLayout.ragged(plan, model.blocks)
    for name in ("token_ids", "positions", "slots", "kv_lens", "block_table"):
        assert torch.equal(getattr(fixed, name)[:2], getattr(eager, name)), name
    assert fixed.slots[2:].tolist() == [IDLE_SLOT] * 2
    assert fixed.kv_lens[2:].tolist() == [0, 0]


def test_buckets_are_powers_of_two_and_the_largest_batch():
    assert buckets_up_to(1) == [1]
    assert buckets_up_to(4) == [1, 2, 4]
    assert buckets_up_to(6) == [1, 2, 4, 6]
