"""Tensors over memory that somebody else owns, plain and packed: what lets halves be built once, over addresses that stay.

A packed tensor is opaque, so torch has no call to put one at an address; its C interface has, which compiled models use for
their constants (`aoti_torch_create_tensor_from_blob_v2`, an exported and versioned function of libtorch).
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from serving.errors import UserError

_CPU, _NO_INDEX = 0, 0  # torch's numbers for the device


def address_of(tensor: torch.Tensor) -> int:
    """Where the data of a plain or packed tensor lies."""
    return torch.ops.mkldnn.data_ptr(tensor) if tensor.is_mkldnn else tensor.data_ptr()


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the data of a plain or packed tensor, what packing pads included."""
    return torch.ops.mkldnn._nbytes(tensor) if tensor.is_mkldnn else tensor.nbytes


def tensor_at(address: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor of the kind, shape and dtype of `like` (contiguous where it is plain) over the memory at `address`, which
    nothing touches here and which must outlive it."""
    if like.is_mkldnn:
        return _packed_at(address, like)
    buffer = (ctypes.c_char * like.nbytes).from_address(address)
    return torch.frombuffer(buffer, dtype=like.dtype).view(like.shape)


def _packed_at(address: int, like: torch.Tensor) -> torch.Tensor:
    create, layout, dtypes = _torch_c()
    layout_of_data = torch.ops.mkldnn._get_mkldnn_serialized_md(like).numpy().tobytes()
    sizes = (ctypes.c_int64 * like.dim())(*like.shape)
    strides = (ctypes.c_int64 * like.dim())(*torch.empty(like.shape, device="meta").stride())
    handle = ctypes.c_void_p()
    failed = create(
        address, like.dim(), sizes, strides, 0, dtypes[like.dtype], _CPU, _NO_INDEX, ctypes.byref(handle), layout,
        layout_of_data, len(layout_of_data),
    )  # fmt: skip
    if failed:
        raise RuntimeError(f"torch made no packed tensor of shape {list(like.shape)} over given memory")
    capsule = ctypes.pythonapi.PyCapsule_New(handle.value, None, None)
    return torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule)


@functools.cache
def _torch_c():
    """The C function, torch's number for the packed layout, and its numbers for dtypes."""
    ctypes.pythonapi.PyCapsule_New.restype = ctypes.py_object
    ctypes.pythonapi.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        create = library.aoti_torch_create_tensor_from_blob_v2
        numbers = {name: getattr(library, f"aoti_torch_{name}")() for name in ("layout__mkldnn",)}
        dtypes = {
            dtype: getattr(library, f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}")()
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        }
    except (OSError, AttributeError) as error:
        raise UserError(f"this torch ({torch.__version__}) cannot put packed weights at an address: {error}") from None
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    create.argtypes = [pointer, count, pointer, pointer, count, number, number, number, pointer, number, pointer, count]
    create.restype = number
    return create, numbers["layout__mkldnn"], dtypes
