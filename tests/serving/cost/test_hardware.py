"""Hardware descriptions: complete, sourced, capped."""

from __future__ import annotations

import pytest
import yaml

from serving.cost.hardware import HARDWARE_DIRECTORY, NUMBERS, hardware_from_mapping, known_hardware, load_hardware
from serving.errors import CapacityError, UserError

pytestmark = pytest.mark.cpu

REQUIRED = {"a100-40gb", "a100-80gb", "h100", "h200", "h20", "l40s", "cpu2"}


def test_the_required_cards_are_known():
    assert REQUIRED <= set(known_hardware())


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_every_number_has_a_source(name):
    card = load_hardware(name)
    assert card.name == name
    assert all(card.sources[number] for number in NUMBERS if number != "interference")
    assert card.sources["interference_of" if card.kind == "cuda" else "interference"]


def test_an_unknown_card_lists_the_known_ones():
    with pytest.raises(UserError, match="unknown hardware 'b300'.*a100-40gb.*h200"):
        load_hardware("b300")


def test_a_cap_stands_for_a_smaller_card_and_cannot_exceed_it():
    card = load_hardware("h200").capped(40 * 2**30)
    assert card.memory_bytes == 40 * 2**30
    assert "capped" in card.sources["memory_bytes"]
    assert card.device(3).memory_bytes == 40 * 2**30
    with pytest.raises(CapacityError, match="h200: a cap of .* more than the card's memory"):
        load_hardware("h200").capped(2**40)


def test_only_memory_and_bandwidth_tell_the_two_a100s_apart():
    small, large = load_hardware("a100-40gb"), load_hardware("a100-80gb")
    differing = {number for number in NUMBERS if getattr(small, number) != getattr(large, number)}
    assert differing == {"memory_bytes", "memory_bandwidth"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_bandwidth": "fast"}, "memory_bandwidth is 'fast', a number is needed"),
        ({"memory_bandwidth": -1.0}, "memory_bandwidth is -1.0, it must be positive"),
        ({"kind": "tpu"}, "kind 'tpu' is not one of: cuda, cpu"),
        (
            {"interference_of": {"decode": {"decode": 0.5}}},
            "interference_of needs decode and prompt of each, for cards only",
        ),
        ({"kind": "cpu"}, "missing keys \\['interference'\\], unknown keys \\['interference_of'\\]"),
        ({"colour": "green"}, "unknown keys \\['colour'\\]"),
    ],
)
def test_a_wrong_description_is_named(change, message):
    values = yaml.safe_load((HARDWARE_DIRECTORY / "h200.yaml").read_text())
    with pytest.raises(UserError, match=message):
        hardware_from_mapping({**values, **change})


def test_a_number_without_a_source_is_refused():
    values = yaml.safe_load((HARDWARE_DIRECTORY / "h200.yaml").read_text())
    del values["sources"]["relay_s"]
    with pytest.raises(UserError, match="relay_s has no entry under sources"):
        hardware_from_mapping(values)
