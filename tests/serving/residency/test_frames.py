"""Pages of an arena and of the host cache: nobody gets another's, whole frames stay whole, and memory moves with its bytes."""

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import CapacityError
from serving.memory.movable import MovableMemory
from serving.memory.streaming import copy
from serving.memory.virtual import FRAME_BYTES, VirtualRange
from serving.residency.cache import HostCache
from serving.residency.frames import FrameLender, joined, total

pytestmark = pytest.mark.cpu

PAGE_BYTES = 65536


def pages_of(runs):
    return [page for first, count in runs for page in range(first, first + count)]


@given(st.integers(0, 40), st.lists(st.one_of(st.integers(1, 20), st.none()), max_size=30))
def test_lent_pages_are_disjoint_and_an_image_takes_whole_frames_while_there_are_any(num_pages, wishes):
    lender, held = FrameLender(num_pages, 4), []
    for wish in wishes:
        if wish is None:
            if held:
                lender.give_back(held.pop(0))
            continue
        taken = {page for runs in held for page in pages_of(runs)}
        whole = [frame for frame in range(num_pages // 4) if taken.isdisjoint(range(4 * frame, 4 * frame + 4))]
        if wish > num_pages - len(taken):
            with pytest.raises(CapacityError):
                lender.lend(wish)
            continue
        runs = lender.lend(wish)
        pages = pages_of(runs)
        assert len(set(pages)) == wish
        assert taken.isdisjoint(pages)
        assert max(pages) < num_pages
        assert runs == joined(runs)
        frames = min(len(whole), wish // 4)
        assert pages[: 4 * frames] == pages_of((4 * frame, 4) for frame in whole[:frames])
        held.append(runs)
    assert lender.free_pages == num_pages - sum(map(total, held))


def test_pages_are_given_back_once():
    lender = FrameLender(8, 4)
    runs = lender.lend(5)
    lender.give_back(runs)
    with pytest.raises(ValueError, match="not all lent"):
        lender.give_back(runs)


@given(
    st.sampled_from(["lru", "cost"]), st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=40), st.data()
)
def test_a_host_cache_never_lends_a_page_twice_and_never_drops_what_is_pinned(eviction, steps, data):
    cache, sizes, pinned = HostCache(12, eviction), [3, 2, 6, 4, 1, 5], []
    for now_ns, (model, took_ns) in enumerate(steps, start=1):
        before = cache.held()
        if pinned and data.draw(st.booleans()):
            cache.unpin(pinned.pop())
        runs = cache.pin(model, now_ns)
        assert (runs is not None) == (model in before)
        if runs is None:
            runs = cache.reserve(model, sizes[model], now_ns)
            if runs is None:
                assert cache.held() == before
                continue
            if data.draw(st.booleans()):
                cache.written(model, took_ns)
            else:
                cache.abandon(model)
                continue
        pinned.append(model)
        assert set(pinned) <= cache.held()
        assert cache.free_pages == 12 - sum(sizes[one] for one in cache.held())


def test_pages_move_to_an_image_and_home_with_their_bytes():
    per_frame = FRAME_BYTES // PAGE_BYTES
    memory = MovableMemory(2 * per_frame, PAGE_BYTES)
    space = VirtualRange(2 * FRAME_BYTES, align_bytes=FRAME_BYTES)
    try:
        assert space.address % FRAME_BYTES == 0
        memory.lend(0, per_frame + 3, space.address)
        ctypes.memset(space.address, 7, (per_frame + 3) * PAGE_BYTES)
        memory.take_back(0, per_frame + 3, space.address)
        space.unmap(0, 2 * FRAME_BYTES)
        memory.lend(per_frame + 1, 5, space.address)  # of frames that were broken, some written and some not
        assert ctypes.string_at(space.address, 2 * PAGE_BYTES) == b"\7" * (2 * PAGE_BYTES)
        assert ctypes.string_at(space.address + 2 * PAGE_BYTES, 3 * PAGE_BYTES) == b"\0" * (3 * PAGE_BYTES)
    finally:
        space.close()
        memory.close()


@pytest.mark.parametrize("length", [0, 64, 8191, 8192, 3 * 8192 + 77])
def test_a_streaming_copy_moves_exactly_what_it_is_asked_to(length):
    source, target = VirtualRange(1 << 16), VirtualRange(1 << 16)
    source.open(), target.open()
    try:
        data = bytes(number % 251 for number in range(length + 64))
        ctypes.memmove(source.address + 64, data, len(data))
        copy(target.address + 128, source.address + 64, length)
        assert ctypes.string_at(target.address + 128, length) == data[:length]
        assert ctypes.string_at(target.address + 128 + length, 64) == bytes(64)
        with pytest.raises(ValueError, match="multiples of 64"):
            copy(target.address + 1, source.address, 64)
    finally:
        source.close()
        target.close()
