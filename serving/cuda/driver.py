"""The CUDA driver's virtual memory calls through ctypes: no package needed beyond the driver itself.

Names and values are those of `cuda.h` (CUDA 12 and 13 agree on all that is used here).
"""

from __future__ import annotations

import ctypes
import functools

from serving.errors import CapacityError, UserError

GRANULARITY_BYTES = 2 << 20  # what every card of the last years maps in

_PINNED, _LOCATION_DEVICE, _READ_WRITE = 1, 1, 3
_OUT_OF_MEMORY, _PEER_ALREADY_ALLOWED = 2, 704


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _AllocationFlags(ctypes.Structure):
    _fields_ = [
        ("compression_type", ctypes.c_ubyte),
        ("gpu_direct_rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _AllocationProperties(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_metadata", ctypes.c_void_p),
        ("flags", _AllocationFlags),
    ]


class _AccessDescriptor(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UserError(f"virtual KV on a CUDA device needs the driver's libcuda.so.1: {error}") from None
    wide, pointer = ctypes.c_uint64, ctypes.c_void_p
    library.cuMemAddressReserve.argtypes = [pointer, ctypes.c_size_t, ctypes.c_size_t, wide, wide]
    library.cuMemAddressFree.argtypes = [wide, ctypes.c_size_t]
    library.cuMemCreate.argtypes = [pointer, ctypes.c_size_t, pointer, wide]
    library.cuMemRelease.argtypes = [wide]
    library.cuMemMap.argtypes = [wide, ctypes.c_size_t, ctypes.c_size_t, wide, wide]
    library.cuMemUnmap.argtypes = [wide, ctypes.c_size_t]
    library.cuMemSetAccess.argtypes = [wide, ctypes.c_size_t, pointer, ctypes.c_size_t]
    library.cuMemGetAllocationGranularity.argtypes = [pointer, pointer, ctypes.c_int]
    library.cuDeviceCanAccessPeer.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    library.cuDevicePrimaryCtxRetain.argtypes = [pointer, ctypes.c_int]
    library.cuCtxEnablePeerAccess.argtypes = [pointer, ctypes.c_uint]
    library.cuGetErrorName.argtypes = [ctypes.c_int, pointer]
    return library


def _call(name: str, *arguments: object, fine: int = 0) -> None:
    """A driver call by name. Raises CapacityError naming it and what the driver answered, unless that is 0 or `fine`."""
    library = _library()
    code = getattr(library, name)(*arguments)
    if code not in (0, fine):
        text = ctypes.c_char_p()
        library.cuGetErrorName(code, ctypes.byref(text))
        answer = text.value.decode() if text.value else str(code)
        hint = ": the card's memory is taken" if code == _OUT_OF_MEMORY else ""
        raise CapacityError(f"{name} failed with {answer}{hint}")


def _properties(device: int) -> _AllocationProperties:
    return _AllocationProperties(type=_PINNED, location=_Location(_LOCATION_DEVICE, device))


def granularity_bytes(device: int) -> int:
    """The smallest page that `device` maps."""
    size = ctypes.c_size_t()
    _call("cuMemGetAllocationGranularity", ctypes.byref(size), ctypes.byref(_properties(device)), 0)
    return size.value


def reserve(length_bytes: int) -> int:
    """The address of `length_bytes` of address space, a multiple of the granularity."""
    address = ctypes.c_uint64()
    _call("cuMemAddressReserve", ctypes.byref(address), length_bytes, 0, 0, 0)
    return address.value


def free_address(address: int, length_bytes: int) -> None:
    _call("cuMemAddressFree", address, length_bytes)


def create(device: int, size_bytes: int) -> int:
    """The handle of `size_bytes` of `device`'s memory, mapped nowhere."""
    handle = ctypes.c_uint64()
    _call("cuMemCreate", ctypes.byref(handle), size_bytes, ctypes.byref(_properties(device)), 0)
    return handle.value


def release(handle: int) -> None:
    """Give memory back, once nothing maps it any more."""
    _call("cuMemRelease", handle)


def map_memory(address: int, size_bytes: int, handle: int) -> None:
    """Put the memory of `handle` at `address`, without access as yet."""
    _call("cuMemMap", address, size_bytes, 0, handle, 0)


def unmap(address: int, length_bytes: int) -> None:
    """Take away whatever is mapped in [address, address + length)."""
    _call("cuMemUnmap", address, length_bytes)


def allow(device: int, address: int, length_bytes: int) -> None:
    """Let `device` read and write what is mapped in [address, address + length)."""
    access = _AccessDescriptor(_Location(_LOCATION_DEVICE, device), _READ_WRITE)
    _call("cuMemSetAccess", address, length_bytes, ctypes.byref(access), 1)


def allow_peer(device: int, peer: int) -> None:
    """Let kernels of `device`, whose context is current, read and write what is allocated on `peer`. Raises UserError where
    the two cards have no way to each other."""
    able = ctypes.c_int()
    _call("cuDeviceCanAccessPeer", ctypes.byref(able), device, peer)
    if not able.value:
        raise UserError(
            f"card {device} cannot reach the memory of card {peer} (python -m serving.doctor lists peer access); pools on "
            "cards of their own need that"
        )
    context = ctypes.c_void_p()
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), peer)  # for as long as the process lives
    _call("cuCtxEnablePeerAccess", context, 0, fine=_PEER_ALREADY_ALLOWED)
