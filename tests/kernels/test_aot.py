"""Kernels lowered to cubins for real cards, in a process where Triton compiles rather than interprets."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.aot_cases import CASES

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

REPOSITORY = Path(__file__).parents[2]
# One case of every kernel; `python -m kernels.aot` compiles all shapes and types.
SUBSET = (
    "rms_norm_2048",
    "rope_gqa",
    "rope_mla",
    "decode_gqa_32_8_128",
    "prefill_gqa_2048",
    "prefill_gqa_256",
    "decode_mla_16",
    "prefill_mla_16",
    "router_deepseek_v3",
    "decode_ffn_qwen3_1",
    "decode_ffn_qwen3_64",
    "lm_head",
    "mailbox",
    "exchange",
    "resident_ffn",
)


def aot(*arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.aot", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


def test_every_kernel_lowers_to_cubins_that_fit_and_decode_does_not_spill():
    result = aot(*SUBSET, "--arch", "80,90,100")
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert {row[2] for row in rows} == {"80", "90", "100"}
    assert len(rows) == 3 * len({(row[0], row[1]) for row in rows})


def test_the_subset_covers_every_operator():
    assert set(SUBSET) <= set(CASES)
    folders = {path.parent.name for path in (REPOSITORY / "kernels").glob("*/triton.py")}
    named = {
        "rms_norm": "rms_norm",
        "rope": "rope",
        "attention": "gqa",
        "mla": "mla",
        "router": "router",
        "moe_ffn": "decode_ffn",
        "dense_ffn": "decode_ffn",  # its kernels are the routed FFN's
        "lm_head": "lm_head",
        "mailbox": "mailbox",
        "exchange": "exchange",
        "resident_ffn": "resident",
    }
    assert folders == set(named), "an operator has no case in SUBSET"
    assert all(any(part in case for case in SUBSET) for part in named.values())


def test_an_unknown_case_names_the_known_ones():
    result = aot("nosuch")
    assert result.returncode == 2
    assert "unknown case 'nosuch'; known: rms_norm_2048" in result.stderr
