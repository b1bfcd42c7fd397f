"""The package's name: `transformers` must work with this `kernels` on the path, and importing it must be cheap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

REPOSITORY = Path(__file__).parents[2]
GENERATE = """
import kernels, torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.utils import is_kernels_available
assert not is_kernels_available(), "our package was taken for Hugging Face's"
config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=1, num_local_experts=2)
model = MixtralForCausalLM(config).eval()
print(model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1])
"""


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_transformers_generates_beside_it():
    pytest.importorskip("transformers")
    result = python(GENERATE)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == "5"


def test_importing_it_imports_nothing_heavy():
    result = python("import sys, kernels; print(kernels.__version__, {'torch', 'triton'} & set(sys.modules))")
    assert result.stdout.strip() == "0.1.0 set()", result.stderr[-2000:]


def test_entry_points_do_not_import_triton_for_the_cpu():
    result = python(
        "import sys, torch\n"
        "from kernels import attention, dense_ffn, lm_head, mailbox, mla, moe_ffn, resident_ffn, rms_norm, rope, router\n"
        "rms_norm.rms_norm(torch.ones(1, 4), torch.ones(4), 1e-6)\n"
        "print('triton' in sys.modules)"
    )
    assert result.stdout.strip() == "False", result.stderr[-2000:]
