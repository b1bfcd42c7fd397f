"""Routing by the four rules, with and without groups, and the sort by expert, against their references."""

from __future__ import annotations

import pytest
import torch

from kernels.router import reference

pytestmark = pytest.mark.cpu

GROUPS = {"one_group": (1, 1), "best_2_of_4": (4, 2), "best_1_of_2": (2, 1)}


@pytest.mark.parametrize("rule", reference.RULES)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize(("rows", "num_experts", "top_k"), [(1, 8, 2), (7, 12, 3), (3, 60, 6)])
def test_route(rule, groups, rows, num_experts, top_k, device, check):
    from kernels.router import triton as form

    logits = torch.randn(rows, num_experts, device=device) * 2
    bias = torch.randn(num_experts, device=device) if rule == "sigmoid_bias" else None
    actual = form.route(logits, top_k, rule, bias, 2.5, *groups)
    expected = reference.route(logits, top_k, rule, bias, 2.5, *groups)
    check("experts", actual[1], expected[1])
    check("weights", actual[0], expected[0])


def test_route_many_rows(device, check):
    from kernels.router import triton as form

    logits = torch.randn(514, 5, device=device)
    actual, expected = (f.route(logits, 2, "softmax", None, 1.0, 1, 1) for f in (form, reference))
    check("experts", actual[1], expected[1])
    check("weights", actual[0], expected[0])


@pytest.mark.parametrize("module", ["reference", "triton"])
def test_unknown_rule_names_the_known_ones(module, device):
    form = __import__(f"kernels.router.{module}", fromlist=["route"])
    with pytest.raises(ValueError, match="'argmax'; known: softmax_topk_renorm"):
        form.route(torch.zeros(1, 4, device=device), 1, "argmax", None, 1.0, 1, 1)


@pytest.mark.parametrize(
    ("rows", "top_k", "num_experts", "used"),
    [(1, 1, 3, 3), (5, 2, 8, 8), (6, 3, 40, 4), (2100, 2, 5, 5), (16500, 2, 5, 5)],
    ids=["one_row", "few", "empty_experts", "chunks", "chunks_of_several_steps"],
)
def test_sort_by_expert(rows, top_k, num_experts, used, device, check):
    from kernels.router import triton as form

    experts = torch.randint(used, (rows, top_k), device=device)
    actual, expected = (f.sort_by_expert(experts, num_experts) for f in (form, reference))
    check("offsets", actual[1], expected[1])
    check("order", actual[0], expected[0])


@pytest.mark.parametrize(
    ("tile_rows", "tiles"),
    [
        (8, [(0, 0, 8), (0, 8, 11), (2, 11, 19), (2, 19, 27), (2, 27, 28), (3, 28, 29)]),
        (16, [(0, 0, 11), (2, 11, 27), (2, 27, 28), (3, 28, 29)]),
    ],
)
def test_sort_into_tiles(tile_rows, tiles, device, check):
    """Experts of 11, no, 17 and 1 rows."""
    from kernels.router import triton as form

    experts = torch.repeat_interleave(torch.arange(4), torch.tensor([11, 0, 17, 1]))[torch.randperm(29)].view(29, 1)
    order, listed = form.sort_into_tiles(experts.to(device), 4, tile_rows, 8)
    check("order", order.long(), reference.sort_by_expert(experts.to(device), 4)[0])
    assert [tuple(tile) for tile in listed[:, :3].tolist()][: len(tiles)] == tiles
    assert all(expert >= 4 for expert in listed[len(tiles) :, 0].tolist())
