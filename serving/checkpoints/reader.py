"""Reads Hugging Face checkpoints: config.json and safetensors shards, memory-mapped, a tensor at a time.

Opening checks everything that can be checked without reading weights: that every shard is there and whole, and holds every
tensor the model needs, with its shape. A tensor is a view of the mapped file; its pages are dropped when later tensors
are read, so a load keeps little more resident than what it copies.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from serving.checkpoints.names import NamedWeights, all_shapes
from serving.errors import UserError
from serving.spec import ModelSpec, load_spec

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_libc = ctypes.CDLL(None)
_KEPT_BYTES = 16 << 20  # mapped pages of tensors read lately that may stay resident
_M_MMAP_THRESHOLD = -3  # mallopt's number for it
_LOADING_MMAP_BYTES, _SERVING_MMAP_BYTES = 64 << 10, 32 << 20


def _set_mmap_threshold(count_bytes: int) -> None:
    """While loading, give freed temporaries back to the system at once: kept in the heap, they fragment it and cost 30 % more
    than what is loaded. While serving, keep them: a page fault for every activation costs more."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_MMAP_THRESHOLD, count_bytes)


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: `start` is from the beginning of the file."""

    path: Path
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    start: int
    length: int


class CheckpointWeights(NamedWeights):
    """The tensors of an opened checkpoint directory."""

    def __init__(self, spec: ModelSpec, entries: dict[str, _Entry]) -> None:
        super().__init__(spec)
        self._entries = entries
        self._maps: dict[Path, mmap.mmap] = {}
        self._resident: list[tuple[mmap.mmap, int, int]] = []
        self._resident_bytes = 0

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`, a view of the file: copy it before asking for many more."""
        entry = self._entries[name]
        mapped = self._maps.get(entry.path)
        if mapped is None:
            with entry.path.open("rb") as file:
                # A private mapping is writable, which torch wants; nothing is written, so no page is ever copied.
                mapped = self._maps[entry.path] = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
        self._drop_old_pages(mapped, entry)
        dtype = _DTYPES[entry.dtype]
        count = entry.length // dtype.itemsize
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=entry.start).view(entry.shape)

    def _drop_old_pages(self, mapped: mmap.mmap, entry: _Entry) -> None:
        self._resident.append((mapped, entry.start, entry.length))
        self._resident_bytes += entry.length
        while self._resident_bytes > _KEPT_BYTES and len(self._resident) > 3:
            old, start, length = self._resident.pop(0)
            self._resident_bytes -= length
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            if start + length > first:
                old.madvise(mmap.MADV_DONTNEED, first, start + length - first)

    def __enter__(self) -> Self:
        _set_mmap_threshold(_LOADING_MMAP_BYTES)
        return self

    def __exit__(self, *exception: object) -> None:
        _set_mmap_threshold(_SERVING_MMAP_BYTES)
        super().__exit__(*exception)

    def close(self) -> None:
        """Unmap every shard that no tensor looks into any more."""
        while self._maps:
            _, mapped = self._maps.popitem()
            try:
                mapped.close()
            except BufferError:
                mapped.madvise(mmap.MADV_DONTNEED)


def open_checkpoint(directory: str | Path, name: str | None = None) -> CheckpointWeights:
    """Open the checkpoint in `directory`. Raises UserError, one line, for a missing, truncated or foreign shard, a tensor
    that is missing, has another shape or a dtype that nothing computes from, and an unknown architecture."""
    directory = Path(directory)
    spec = load_spec(directory, name)
    entries: dict[str, _Entry] = {}
    for path in _shards(directory):
        entries |= _read_header(path)
    for tensor, shape in all_shapes(spec).items():
        entry = entries.get(tensor)
        if entry is None:
            raise UserError(f"{directory}: tensor {tensor} is in none of its shards; the checkpoint is incomplete")
        if entry.shape != shape:
            raise UserError(
                f"{entry.path}: tensor {tensor} has shape {list(entry.shape)}, config.json asks for {list(shape)}"
            )
        if entry.dtype not in _DTYPES:
            raise UserError(f"{entry.path}: tensor {tensor} is stored as {entry.dtype}; known: {', '.join(_DTYPES)}")
    return CheckpointWeights(spec, entries)


def _shards(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if not index.exists():
        single = directory / SINGLE_FILE
        if not single.exists():
            raise UserError(f"{directory}: holds neither {INDEX_FILE} nor {SINGLE_FILE}")
        return [single]
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: is not a safetensors index ({error})") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: {file!r} is not the name of a shard beside it")
        if not (directory / file).is_file():
            raise UserError(f"{directory}: shard {file} is missing; {INDEX_FILE} names {len(files)} shards")
    return [directory / file for file in files]


def _read_header(path: Path) -> dict[str, _Entry]:
    """Tensors of one shard. The format: 8 bytes of header length, a JSON header, then the data it gives offsets into, one
    tensor after another without a gap, to the end of the file."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"its header of {length} bytes exceeds the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, info) for name, info in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].length)):
            if entry.start != end:
                raise ValueError(f"tensor {name} begins at byte {entry.start}, the one before it ends at {end}")
            end += entry.length
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is not a whole safetensors file ({error})") from None
    if end > size:
        raise UserError(f"{path}: is truncated, {end - size} of {end} bytes are missing")
    if end < size:
        raise UserError(f"{path}: has {size - end} bytes after its last tensor; it is not the file that was written")
    return entries


def _entry(path: Path, data_start: int, info: dict) -> _Entry:
    begin, end = info["data_offsets"]
    shape = tuple(info["shape"])
    if not all(isinstance(value, int) and value >= 0 for value in (begin, end, *shape)) or end < begin:
        raise ValueError(f"offsets {begin} to {end} and shape {list(shape)} do not describe a tensor")
    dtype = _DTYPES.get(info["dtype"])  # a tensor that no layer here asks for may have any
    if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"a tensor of shape {list(shape)} cannot have {end - begin} bytes")
    return _Entry(path, info["dtype"], shape, data_start + begin, end - begin)
