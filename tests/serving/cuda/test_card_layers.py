"""What the card's halves compute, judged on the CPU: the same layers over the operators' CPU forms, KV read through block
tables. A card runs the same code over the CUDA forms (tests/serving/cuda/test_card_systems.py)."""

from pathlib import Path
from types import SimpleNamespace

import judges
import pytest
import torch

from serving.checkpoints import open_checkpoint
from serving.cost.table1 import published_spec
from serving.cuda.capture import CardModel
from serving.cuda.exchange import InPlace
from serving.cuda.ffn_parts import FFNParts
from serving.cuda.layers import CardAttentionHalf, CardFFNHalf
from serving.cuda.layout import BLOCK_TOKENS, IDLE_SLOT, CardLayout, fill_numbers
from serving.interface import ServedModel
from serving.memory.kv_pool import KVPool
from serving.parallel.share import Share, ShareOfWeights, Slice, share_spec
from serving.part_shapes import Part, Shape
from serving.residency.image import ShapesOnly, placed_bytes
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
        attention = CardAttentionHalf(spec, weights, torch.float32, CPU)
        odd = range(1, spec.num_layers, 2)  # on a second device, as where layers are dealt out
        dealt = [set(range(spec.num_layers)) - set(odd), odd]
        ffn = FFNParts(*(CardFFNHalf(spec, weights, torch.float32, CPU, layers) for layers in dealt))
    pool = KVPool(200, PAGE_BYTES, [(spec, "float32")], max_runs=4)
    model = CardModel.of(attention, ffn, pool.models[spec.name])
    yield directory, model
    model.kv.layers.clear()
    pool.close()


def open_sequence(model, prompt, new_tokens):
    run = model.kv.open_run()
    model.kv.grow(run, len(prompt) + new_tokens)
    return Sequence(0, 0, list(prompt), len(prompt), new_tokens, run=run)


def layout_of(model, part, shape):
    numbers = torch.zeros(shape.numbers, dtype=torch.int64)
    fill_numbers(part, shape, numbers)
    return CardLayout.of(shape, numbers, model.blocks)


@torch.inference_mode()
def run(model, *decoding, prompt=None, rows=0):
    """One part, in the shape that it fills: sequences that decode, and the next `rows` tokens of a prompt."""
    part, shape = Part(decoding, prompt, rows), Shape(len(decoding), rows)
    tokens = model.forward(layout_of(model, part, shape), InPlace(model.ffn)).tolist()
    assert len(tokens) == shape.sequences
    wanted = part.wanted(shape)
    for sequence, count in [*((each, 1) for each in decoding), *([(prompt, rows)] if prompt else [])]:
        sequence.cached += count
    for place in wanted:
        (decoding[place] if place < len(decoding) else prompt).append(tokens[place])


@pytest.mark.parametrize("card_model", ARCHITECTURES, indirect=True)
def test_tokens_equal_the_judge(card_model):
    """Two sequences: one prefilled in chunks, alone and beside the other's decode row, then both decode."""
    directory, model = card_model
    prompts = [(5, 9, 2, 7, 1, 3, 8), (4, 6)]
    long, short = (open_sequence(model, prompt, 6) for prompt in prompts)
    run(model, prompt=short, rows=2)
    run(model, short)
    run(model, prompt=long, rows=2)
    run(model, short, prompt=long, rows=3)
    run(model, short, prompt=long, rows=2)
    while len(short.tokens) < len(prompts[1]) + 6:
        run(model, short, long)
    while len(long.tokens) < len(prompts[0]) + 6:
        run(model, long)
    for sequence, prompt in zip((long, short), prompts, strict=True):
        new = sequence.tokens[len(prompt) :]
        assert new == judges.greedy_reference(directory, prompt, len(new))
    assert len(long.tokens) == len(prompts[0]) + 6


@pytest.mark.parametrize("card_model", ["deepseek_v2"], indirect=True)
def test_rows_that_fill_up_a_decode_shape_are_idle(card_model):
    _, model = card_model
    sequences = [open_sequence(model, (1, 2, 3), 4), open_sequence(model, (7,) * 70, 4)]
    for sequence in sequences:
        sequence.cached = len(sequence.tokens) - 1
    layout = layout_of(model, Part(tuple(sequences)), Shape(4, 0))
    starts = [sequence.run.start_slot for sequence in sequences]
    assert layout.slots.tolist() == [starts[0] + 2, starts[1] + 69, IDLE_SLOT, IDLE_SLOT]
    assert layout.positions[:2].tolist() == [2, 69]
    assert layout.kv_lens.tolist() == [3, 70, 0, 0]
    assert (layout.block_table[:2, 0] * BLOCK_TOKENS).tolist() == starts


@pytest.mark.parametrize("card_model", ["deepseek_v2"], indirect=True)
def test_rows_that_fill_up_a_chunk_come_first(card_model):
    """So that the last row is the last token's; their places before the first token are taken as the first."""
    _, model = card_model
    sequence = open_sequence(model, tuple(range(10, 20)), 4)
    sequence.cached = 3
    layout = layout_of(model, Part((), sequence, 5), Shape(0, 16))
    start = sequence.run.start_slot
    assert layout.token_ids.tolist() == [0] * 11 + [13, 14, 15, 16, 17]
    assert layout.positions.tolist() == [0] * 8 + list(range(8))
    assert layout.slots.tolist() == [IDLE_SLOT] * 11 + [start + place for place in range(3, 8)]
    assert layout.kv_lens.tolist() == [8]
    assert layout.logit_rows.tolist() == [15]


@pytest.mark.parametrize("card_model", ["mixtral"], indirect=True)
def test_decode_rows_come_before_a_chunk(card_model):
    _, model = card_model
    short, long = open_sequence(model, (1, 2, 3), 4), open_sequence(model, tuple(range(10, 20)), 4)
    short.cached, long.cached = 2, 3
    layout = layout_of(model, Part((short,), long, 7), Shape(3, 8))
    starts = [sequence.run.start_slot for sequence in (short, long)]
    assert layout.token_ids.tolist() == [3, 0, 0, 0, 13, 14, 15, 16, 17, 18, 19]
    assert layout.slots.tolist() == [starts[0] + 2, *[IDLE_SLOT] * 3, *range(starts[1] + 3, starts[1] + 10)]
    assert layout.kv_lens.tolist() == [3, 0, 0, 10] and layout.logit_rows.tolist() == [0, 1, 2, 10]
    cache = model.kv.layers[0]
    assert layout.decode_kv(cache).kv_lens.tolist() == [3, 0, 0] and layout.chunk_kv(cache).kv_lens.tolist() == [10]
    assert (layout.chunk_kv(cache).block_table[:, 0] * BLOCK_TOKENS).tolist() == starts[1:]


def test_every_layer_has_one_holder(tiny_checkpoints):
    spec = load_spec(tiny_checkpoints["mixtral"])
    cards = [torch.device("cuda", index) for index in range(2)]

    def half(card, *layers):
        return SimpleNamespace(spec=spec, dtype=torch.float32, device=card, layers=layers)

    first, *others, last = range(spec.num_layers)
    parts = FFNParts(half(cards[1], first, last), half(cards[0], *others))
    assert parts.cards == (cards[1], cards[0])
    assert parts.layers_on(cards[1]) == [first, last]
    assert parts.half(last).device == cards[1]
    for wrong in ((half(cards[0], first, *others),), (half(cards[0], first), half(cards[1], first, *others, last))):
        with pytest.raises(ValueError, match="hold layers"):
            FFNParts(*wrong)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "glm-4.7-flash", "deepseek-v2-lite", "mixtral-8x7b"])
def test_an_image_holds_what_the_halves_keep_unit_by_unit(name):
    """Shapes alone, as on a card: every tensor has a place in its unit, and all of them fit into what was planned."""
    spec, used, units = published_spec(name), 0, []

    def keep(unit, tensor):
        nonlocal used
        used = -(-used // 256) * 256 + tensor.nbytes
        units.append(unit)
        return tensor

    meta = torch.device("meta")
    for half in (CardAttentionHalf, CardFFNHalf):
        half(spec, ShapesOnly(spec), torch.bfloat16, meta, keep=keep)
    planned = placed_bytes(ServedModel(spec, Path(), "bfloat16", dummy=True), "cuda")
    assert planned - 0.02 * planned < used <= planned
    assert set(units) == set(range(spec.num_layers + 1))


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v2"])
def test_slices_of_every_layer_add_up(architecture, tiny_checkpoints):
    """Each rank reads its slice of the stored tensors; what they compute from the same rows adds up to the whole."""
    spec, cards = load_spec(tiny_checkpoints[architecture]), (CPU, torch.device("cpu", 0))
    with open_checkpoint(tiny_checkpoints[architecture], spec.name) as weights:
        whole = CardFFNHalf(spec, weights, torch.float32, CPU)
        slices = []
        for number, place in enumerate(cards):
            share = Share(width=Slice(number, 2))
            slices.append(
                CardFFNHalf(share_spec(spec, share), ShareOfWeights(weights, share), torch.float32, place)
            )  # fmt: skip
    parts = FFNParts(*slices, cut=True)
    rows = torch.randn(5, spec.hidden_size)
    for layer in range(spec.num_layers):
        added = sum(half.forward(layer, rows) for half in parts.halves_of(layer))
        torch.testing.assert_close(added, whole.forward(layer, rows), rtol=1e-5, atol=1e-5)
    assert parts.layers_on(cards[1]) == list(range(spec.num_layers))
    with pytest.raises(ValueError, match="2 slices of .* lie on 1 cards"):
        FFNParts(slices[0], slices[0], cut=True)
