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

def step(elements):
    kept = torch.ones(1000)
    parts = [torch.ones(elements) for _ in range(12)]
    return kept

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = page_faults()
for number in range(8):
    step(300_000 + 50_000 * number)  # 1.2 MB a part, then more than at any step before
print(page_faults() - before)
"""


def faults(*arguments):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_activations_of_a_step_are_no_new_pages():
    """Each step computes more than any before it, as prompts do, and malloc by itself asks the system for all of it; who keeps
    what was freed asks for what was added."""
    pages = [12 * 4 * (300_000 + 50_000 * number) // 4096 for number in range(8)]
    given_back, kept = faults(), faults("keep")
    assert given_back > sum(pages) * 0.8, "else this test shows nothing"
    assert kept < max(pages) * 2
