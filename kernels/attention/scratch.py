"""Memory of a card that attention takes beside its inputs and output: partial results and their log-sum-exps, in float32.

Pure arithmetic, without Triton or a card, so that a plan can charge it before anything runs; the plans of a launch
(:mod:`kernels.attention.split`, :mod:`kernels.attention.shares`) take as many slots as is said here.
"""

from __future__ import annotations

MOST_ROUNDS = (
    4  # of whole tiles over the card up to which tiles are cut: with more, the last round's idle programs are few
)
MOST_LANES = 128  # (row, head) pairs that a multiprocessor works on at once in prefill: BLOCK_M x waves
MOST_WAVES = 4  # programs that a multiprocessor runs at once in decode

_FLOAT32_BYTES = 4


def split_slots(batch: int, programs: int, readers: int) -> int:
    """Chunks of decode at most: sum(ceil(len / chunk)) <= batch + sum(len) / chunk, and chunk >= sum(len) readers / programs."""
    return batch + -(-programs // readers)


def share_slots(tiles: int, programs: int) -> int:
    """Partial results of prefill at most, where `tiles` of all readers are cut among programs; 0 where each program takes one
    whole tile."""
    return tiles + programs if tiles <= MOST_ROUNDS * programs else 0


def decode_scratch_bytes(batch: int, heads: int, readers: int, dim: int, sms: int) -> int:
    """Of one decode of up to `batch` sequences, each token of which is read by `readers` programs: every slot holds a row of all
    heads."""
    return split_slots(batch, MOST_WAVES * sms, readers) * heads * (dim + 1) * _FLOAT32_BYTES


def prefill_scratch_bytes(rows: int, sequences: int, heads: int, readers: int, dim: int, sms: int) -> int:
    """Of one prefill of up to `rows` rows of up to `sequences` chunks, whatever block sizes are chosen: a slot is a tile of lanes,
    and of each chunk and reader one tile may be partly empty."""
    of_programs = MOST_LANES * sms
    of_tiles = min(MOST_ROUNDS * of_programs, rows * heads + sequences * readers * MOST_LANES)
    return (of_programs + of_tiles) * (dim + 1) * _FLOAT32_BYTES
