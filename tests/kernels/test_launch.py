"""How kernels are launched, or only compiled."""

import gc
import weakref

import pytest
import torch

from kernels.launch import compiling_ahead, launch

pytest.importorskip("triton")

pytestmark = pytest.mark.cpu


class _Kernel:
    """Stands for a compiled function: notes what it is asked for."""

    def __init__(self) -> None:
        self.compiled, self.ran = [], 0

    def run(self, *args, grid, warmup, **meta) -> None:
        assert warmup
        self.compiled.append((args[1], meta))

    def __getitem__(self, grid):
        return lambda *args, **meta: setattr(self, "ran", self.ran + 1)


def test_what_would_be_launched_is_compiled_once_a_kind_and_nothing_of_it_is_kept():
    kernel, alive = _Kernel(), []
    with compiling_ahead():
        for rows in (3, 5):
            for _layer in range(4):
                out = torch.empty(rows, 7)
                alive.append(weakref.ref(out))
                launch(kernel, (rows,), out, rows, BLOCK=16)
        del out
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 2, "layers of one kind are kept"
        assert not kernel.compiled
    assert sorted(kernel.compiled, key=str) == [(3, {"BLOCK": 16}), (5, {"BLOCK": 16})]
    assert kernel.ran == 0
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    launch(kernel, (1,), torch.empty(1), 1, BLOCK=16)
    assert kernel.ran == 1


def test_what_fails_to_compile_says_so_only_when_it_is_launched():
    class Refused(_Kernel):
        def run(self, *args, **meta) -> None:
            raise RuntimeError("not for this card")

        def __getitem__(self, grid):
            raise RuntimeError("not for this card")

    with compiling_ahead():
        launch(Refused(), (1,), torch.empty(1), 1)
    with pytest.raises(RuntimeError, match="not for this card"):
        launch(Refused(), (1,), torch.empty(1), 1)
