"""What a step frees is taken again by the next one, without new pages of the system."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from serving.memory.heap import keep_freed_memory

if "keep" in sys.argv:
    keep_freed_memory()

def step():
    kept = torch.ones(1000)
    parts = [torch.ones(250_000) for _ in range(12)]  # 1 MB each
    return kept

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

step()
before = page_faults()
for _ in range(5):
    step()
print(page_faults() - before)
"""


def faults(*arguments):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_activations_of_a_step_are_no_new_pages():
    """Five steps of 12 MB after a first one: malloc by itself gives them back at least once before it learns to keep them."""
    pages_of_a_step = 12 * 1_000_000 // 4096
    given_back, kept = faults(), faults("keep")
    assert given_back > pages_of_a_step * 0.9, "else this test shows nothing"
    assert kept < given_back / 2
