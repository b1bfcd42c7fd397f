"""Weights as images: halves over copied bytes compute what halves of the checkpoint do, on every architecture."""

import ctypes
import itertools
import mmap

import pytest
import torch

from serving.checkpoints import open_weights
from serving.interface import ServedModel
from serving.layers.ffn_half import FFNHalf
from serving.residency.image import halves_over, image_bytes, num_units, write_image
from serving.residency.tensors import address_of, stored_bytes, tensor_at
from serving.spec import ARCHITECTURES, load_spec

pytestmark = pytest.mark.cpu


def memory(count_bytes):
    """Zeroed memory and its address; the memory must be held on to."""
    held = mmap.mmap(-1, count_bytes)
    return held, ctypes.addressof(ctypes.c_char.from_buffer(held))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_halves_over_a_copied_image_equal_those_of_the_checkpoint(architecture, tiny_checkpoints):
    directory = tiny_checkpoints[architecture]
    model = ServedModel(load_spec(directory), directory, "float32")
    (host, source), (device, target) = memory(image_bytes(model)), memory(image_bytes(model))
    units, used = write_image(model, source)
    attention, ffn = halves_over(model, target)
    assert len(units) == num_units(model)
    assert used <= image_bytes(model)
    for unit in units:
        for start, length in unit:
            ctypes.memmove(target + start, source + start, length)
    judge = FFNHalf(model.spec, open_weights(model), torch.float32)
    rows = torch.randn(3, model.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    for layer in range(model.spec.num_layers):
        assert torch.equal(ffn.forward(layer, rows), judge.forward(layer, rows))
    with open_weights(model) as weights:
        tokens = torch.tensor([0, 5, 17])
        assert torch.equal(attention.embed(tokens), weights.embedding().float()[tokens])
    del host, device


def test_extents_of_units_are_disjoint_and_cover_the_image(tiny_checkpoints):
    directory = tiny_checkpoints["mixtral"]
    model = ServedModel(load_spec(directory), directory, "float32")
    held, address = memory(image_bytes(model))
    units, used = write_image(model, address)
    extents = sorted(extent for unit in units for extent in unit)
    assert extents[0][0] == 0
    assert sum(extents[-1]) == used
    for (start, length), (following, _) in itertools.pairwise(extents):
        assert 0 <= following - (start + length) < 64
    del held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_tensor_over_given_memory_is_the_packed_tensor(dtype):
    packed = torch.ops.mkldnn._reorder_linear_weight(torch.randn(130, 70).to(dtype))
    held, address = memory(stored_bytes(packed))
    ctypes.memmove(address, address_of(packed), stored_bytes(packed))
    placed = tensor_at(address, packed)
    assert address_of(placed) == address
    assert placed.is_mkldnn
    assert placed.shape == packed.shape
    rows = torch.randn(80, 70).to(dtype)
    product = torch.ops.mkldnn._linear_pointwise
    assert torch.equal(*(product(rows, weight, None, "none", [], "") for weight in (placed, packed)))
    del held
