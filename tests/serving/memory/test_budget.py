"""The ledger of a device: charges add up, too much is refused with the missing bytes named."""

import pytest

from serving.errors import CapacityError
from serving.memory.budget import MemoryBudget, format_bytes

pytestmark = pytest.mark.cpu


def test_charges_add_up_and_come_back():
    budget = MemoryBudget("cpu:0", 1000)
    budget.charge("weights", 300)
    budget.charge("weights", 100)
    budget.charge("kv", 500)
    assert (budget.used_bytes, budget.free_bytes) == (900, 100)
    assert budget.by_purpose() == {"weights": 400, "kv": 500}
    assert budget.release("kv") == 500
    assert budget.free_bytes == 600


def test_too_much_names_the_device_and_the_missing_bytes():
    budget = MemoryBudget("cpu:1", 1000)
    budget.charge("kv", 900)
    with pytest.raises(CapacityError, match=r"cpu:1: weights needs 300 bytes but 100 of 1000 are free; 200 bytes"):
        budget.charge("weights", 300)
    assert budget.used_bytes == 900


@pytest.mark.parametrize("count, text", [(0, "0 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5.0 TiB")])
def test_bytes_are_printed_with_a_binary_unit(count, text):
    assert format_bytes(count) == text
