"""Our own machine code for packed weights against plain torch: every count of rows, widths that are no whole blocks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import native
from kernels.dense_ffn import reference as dense_reference
from kernels.linear import cpu, linear, pack
from kernels.moe_ffn import ExpertWeights, PackedExperts, moe_ffn
from kernels.moe_ffn import reference as moe_reference
from kernels.native import code

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not native.available(torch.float32), reason="oneDNN packs weights in another way here"),
]
DTYPES = [
    dtype for dtype in (torch.float32, torch.bfloat16) if native.available(dtype)
]  # AMX has bfloat16 in other blocks
BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
# Activations are rounded, and results, of which one may be nearly all.
BOUND_OF_ROUTED = BOUND | {torch.bfloat16: 2 * 2**-8}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def near(actual, expected, dtype, usual_norm=1e-20, bounds=BOUND):
    """`usual_norm`: of such results, so that few values whose terms happen to cancel are not held to their own smallness."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    gap = (actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(usual_norm)
    assert gap <= bounds[dtype], f"relative error {gap:.1e}"


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 140), outputs=st.integers(2, 200), pairs=st.integers(1, 70), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_linear_of_any_size(rows, outputs, pairs, dtype, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, 2 * pairs).to(dtype), torch.randn(outputs, 2 * pairs).to(dtype)
    near(native.linear(x, pack(weight)), x.float() @ weight.float().t(), dtype)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 17), pairs=st.integers(1, 70), depth=st.integers(1, 60), experts=st.integers(1, 9),
    data=st.data(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_routed_ffn_of_any_size(rows, pairs, depth, experts, data, dtype):
    torch.manual_seed(rows)
    width, depth, top_k = 2 * pairs, 2 * depth, data.draw(st.integers(1, experts))
    plain = ExpertWeights(
        (torch.randn(experts, 2 * width, depth) / depth**0.5).to(dtype),
        (torch.randn(experts, depth, width) / width**0.5).to(dtype),
    )
    x, share = torch.randn(rows, depth).to(dtype), torch.rand(rows, top_k)
    chosen = torch.stack([torch.randperm(experts)[:top_k] for _ in range(rows)])
    expected = moe_reference.moe_ffn(x.float(), ExpertWeights(*(part.float() for part in plain)), share, chosen)
    gate, up = torch.einsum("rd,rkwd->rkw", x.float(), plain.gate_up.float()[chosen]).chunk(2, dim=-1)
    terms = share[..., None] * torch.nn.functional.silu(gate) * up  # each weighed by N(0, 1 / width) in every column
    # The same where gate and up are as large as x usually makes them: theirs are sums that may cancel, too.
    usual_terms = share * x.float().square().mean(dim=1, keepdim=True) / 2
    usual_norm = float(max(terms.norm(), usual_terms.norm() * width**0.5) * (depth / width) ** 0.5)
    near(moe_ffn(x, PackedExperts.pack(plain), share, chosen), expected, dtype, usual_norm, BOUND_OF_ROUTED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_contiguous_and_gates_that_saturate(dtype):
    weight = torch.eye(64).to(dtype)
    x = (torch.linspace(-300, 300, 3 * 128).view(3, 128)[:, ::2]).to(dtype)
    gate_up, down = torch.cat([weight, weight]), torch.eye(64).to(dtype)
    expected = dense_reference.dense_ffn(x.float(), gate_up.float(), down.float())
    near(native.dense_ffn(x, pack(gate_up), pack(down)), expected, dtype)
    near(native.linear(x, pack(weight)), x, dtype)


def test_it_is_left_alone_where_it_does_not_serve(monkeypatch):
    assert not native.available(torch.float16)
    assert not native.serves(torch.bfloat16, (64, 33)) and not native.serves(torch.float32, (1, 64))
    torch.set_num_threads(2)
    assert not native.serves(torch.float32, (64, 64))

    def unwanted(*_):
        raise AssertionError("called all the same")

    monkeypatch.setattr(native, "linear", unwanted)
    x, weight = torch.randn(2, 33).bfloat16(), torch.randn(5, 33).bfloat16()
    near(linear(x, pack(weight)), x.float() @ weight.float().t(), torch.bfloat16)
    torch.set_num_threads(1)
    many = torch.randn(cpu._MOST_NATIVE_ROWS[torch.bfloat16] + 1, 32).bfloat16()
    weight = torch.randn(5, 32).bfloat16()
    near(linear(many, pack(weight)), many.float() @ weight.float().t(), torch.bfloat16)
    x, weight = torch.randn(3, 32), torch.randn(1, 32)
    near(linear(x, pack(weight)), x @ weight.t(), torch.float32)


def test_without_numba_the_other_forms_serve():
    program = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch; from kernels import native; from kernels.linear import linear, pack\n"
        "torch.set_num_threads(1); x = torch.randn(2, 64); w = torch.randn(64, 64)\n"
        "print(native.available(torch.float32), torch.allclose(linear(x, pack(w)), x @ w.t(), atol=1e-4))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_a_machine_without_a_place_for_compiled_code_compiles_anew(tmp_path):
    """The package is read-only and so is the home directory: slower to start, and just as right."""
    program = (
        "import torch, kernels.native.code as c; print(c.works(torch.float32), c._linear._cache.__class__.__name__)"
    )
    package = tmp_path / "kernels" / "native"
    source = Path(code.__file__).parent
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    for name in ("__init__.py", "layout.py", "code.py"):
        (package / name).write_bytes((source / name).read_bytes())
    (package / "__pycache__").write_text("in the way")  # where compiled code would be kept
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.split() == ["True", "NullCache"], done.stderr
