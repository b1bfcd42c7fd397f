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

before = 0
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*arguments):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_activations_of_a_step_are_no_new_pages():
    page_faults_of_12_mb = 12 * 1_000_000 // 4096
    assert faults() > page_faults_of_12_mb / 2, "without it the memory went back: else this test shows nothing"
    assert faults("keep") < page_faults_of_12_mb / 20
