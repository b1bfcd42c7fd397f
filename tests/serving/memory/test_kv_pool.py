"""The KV pool: models of different geometry share pages, keep their own values, and give everything back."""

import dataclasses
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import CapacityError, UserError
from serving.memory.kv_pool import KVGeometry, KVPool
from serving.memory.lent import LentShape, SharedPageLender
from serving.memory.virtual import HostMemory, PhysicalPages, VirtualRange
from serving.shm.region import SharedRegion
from serving.spec import spec_from_config

pytestmark = pytest.mark.cpu

PAGE_BYTES = 4096


def mha_spec(name="gqa", layers=3, kv_heads=2, head_dim=10, context=200):
    return spec_from_config(
        {
            "model_type": "mixtral", "num_hidden_layers": layers, "hidden_size": 40, "vocab_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": kv_heads, "head_dim": head_dim, "num_local_experts": 4, "num_experts_per_tok": 2,
            "intermediate_size": 32, "max_position_embeddings": context,
        },
        name,
    )  # fmt: skip


def mla_spec(name="mla", context=333):
    return spec_from_config(
        {
            "model_type": "deepseek_v2", "num_hidden_layers": 2, "hidden_size": 40, "vocab_size": 64, "num_attention_heads": 4,
            "kv_lora_rank": 28, "qk_rope_head_dim": 6, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 32, "max_position_embeddings": context,
        },
        name,
    )  # fmt: skip


def open_pool(num_pages, max_runs=4):
    return KVPool(num_pages, PAGE_BYTES, [(mha_spec(), "float32"), (mla_spec(), "bfloat16")], max_runs)


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["gqa", "mla"]), st.integers(0, 3), st.integers(0, 180)), max_size=40))
def test_runs_keep_their_values_and_pages_are_conserved(actions):
    pool = open_pool(num_pages=40)
    runs, written = {}, {}
    for model, key, tokens in actions:
        kv = pool.models[model]
        if tokens == 0 and (model, key) in runs:
            kv.close_run(runs.pop((model, key)))
            written.pop((model, key), None)
            continue
        run = runs.setdefault((model, key), None) or kv.open_run()
        runs[model, key] = run
        before = pool.lender.free_pages
        try:
            kv.grow(run, tokens)
        except CapacityError:
            assert pool.lender.free_pages == before
            continue
        value = float(len(written) + 1)
        for layer, cache in enumerate(kv.layers):
            cache[run.start_slot : run.start_slot + tokens] = value + layer
        if tokens:
            written[model, key] = (tokens, value)
    for (model, key), (tokens, value) in written.items():
        run, kv = runs[model, key], pool.models[model]
        for layer, cache in enumerate(kv.layers):
            assert torch.all(cache[run.start_slot : run.start_slot + tokens] == value + layer)
        assert run.num_pages >= kv.geometry.pages(tokens, PAGE_BYTES)
    assert pool.lender.lent_pages == sum(run.num_pages for run in runs.values())
    for (model, _), run in runs.items():
        pool.models[model].close_run(run)
    assert pool.lender.free_pages == pool.num_pages
    kv = None
    pool.close()


class Watched(VirtualRange):
    """Which places of it are mapped, and that nothing is mapped over anything or unmapped twice."""

    def __init__(self, length_bytes):
        super().__init__(length_bytes)
        self.mapped = {}

    def map(self, offset_bytes, physical, first_page, count):
        for number in range(count):
            place = offset_bytes // physical.page_bytes + number
            assert place not in self.mapped
            self.mapped[place] = first_page + number
        super().map(offset_bytes, physical, first_page, count)

    def unmap(self, offset_bytes, length_bytes):
        for place in range(offset_bytes // PAGE_BYTES, (offset_bytes + length_bytes) // PAGE_BYTES):
            del self.mapped[place]
        super().unmap(offset_bytes, length_bytes)


class WatchedMemory(HostMemory):
    def __init__(self, fds, most_kept):
        self.fds, self.most_kept = fds, most_kept

    def pages(self, num_pages, page_bytes):
        made = PhysicalPages(num_pages, page_bytes, next(self.fds))
        if self.most_kept is not None:
            made.most_kept = self.most_kept
        return made

    def reserve(self, length_bytes):
        return Watched(length_bytes)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1), st.sampled_from(["gqa", "mla"]), st.integers(0, 2), st.sampled_from(["grow", "close", "release"]),
            st.integers(1, 180),
        ),
        max_size=60,
    ),
    st.sampled_from([None, 0, 7]),
)  # fmt: skip
def test_pages_stay_mapped_until_somebody_else_has_them(actions, most_kept):
    """Two engines over one ledger: what a request has is mapped in its place, page by page, and nothing twice; no page is two
    requests', and values last, whatever was kept, taken again or taken away in between."""
    num_pages = 30
    shape = LentShape(num_pages, 2, 0)
    region, made = SharedRegion(shape.region_bytes), PhysicalPages(num_pages, PAGE_BYTES)
    models = [(mha_spec(), "float32"), (mla_spec(), "bfloat16")]
    fds = iter([os.dup(made.fd), os.dup(made.fd)])
    memory = WatchedMemory(fds, most_kept)
    pools = [
        KVPool(num_pages, PAGE_BYTES, models, 3, memory, SharedPageLender(region, shape, engine)) for engine in (0, 1)
    ]
    runs, written = {}, {}
    for engine, model, place, action, tokens in actions:
        kv, key = pools[engine].models[model], (engine, model, place)
        if action == "grow":
            run = runs[key] = runs.get(key) or kv.open_run()
            had, free = run.num_pages, pools[0].lender.free_pages
            try:
                mapped = kv.grow(run, tokens)
            except CapacityError:
                assert (run.num_pages, pools[0].lender.free_pages) == (had, free)
                continue
            assert 0 <= mapped <= run.num_pages - had == free - pools[0].lender.free_pages
            written[key] = (tokens, float(len(written) + 1))
            for layer in kv.layers:
                layer[run.start_slot : run.start_slot + tokens] = written[key][1]
        elif key in runs:
            written.pop(key, None)
            if action == "close":
                kv.close_run(runs.pop(key))
            else:
                kv.release(runs[key])
        held = [page for run in runs.values() for column in run.columns for page in column]
        assert len(held) == len(set(held)) == num_pages - pools[0].lender.free_pages
        if most_kept is not None:
            for which, pool in enumerate(pools):
                its = sum(run.num_pages for (engine, *_), run in runs.items() if engine == which)
                mapped = sum(len(kv._range.mapped) for kv in pool.models.values())
                assert its <= mapped <= its + most_kept
    for (engine, model, place), (tokens, value) in written.items():
        kv, run = pools[engine].models[model], runs[engine, model, place]
        assert all(torch.all(layer[run.start_slot : run.start_slot + tokens] == value) for layer in kv.layers)
        for number, column in enumerate(run.columns):
            for layer, page in enumerate(column):
                at = (layer * kv._layer_bytes + run.index * kv._run_bytes) // PAGE_BYTES + number
                assert kv._range.mapped[at] == page
    for pool in pools:
        pool.unmap_kept()
        its = sum(run.num_pages for (engine, *_), run in runs.items() if pools[engine] is pool)
        assert sum(len(kv._range.mapped) for kv in pool.models.values()) == its
        kv = layer = None
        pool.close()
    made.close()
    region.close()


def test_what_a_request_left_is_there_for_the_next_one_and_free_for_all():
    pool = open_pool(num_pages=12)
    kv, other = pool.models["gqa"], pool.models["mla"]
    run = kv.open_run()
    assert kv.grow(run, 76) == 9
    kv.close_run(run)
    assert pool.lender.free_pages == 12
    run = kv.open_run()
    assert kv.grow(run, 26) == 0, "all that it needs was still mapped"
    assert pool.lender.lent_pages == pool.pages_by_model()["gqa"] == 6
    long = other.open_run()
    assert other.grow(long, 180) == 6, "the three that were kept behind them are free"
    with pytest.raises(CapacityError, match="3 pages asked for, 0 of 12 are free"):
        kv.grow(run, 76)
    pool.close()


@pytest.mark.parametrize("num_pages", [0, 1, 4, 5, 13, 40])
def test_the_first_requests_find_pages_mapped_too(num_pages):
    pool = open_pool(num_pages)
    gqa, mla = pool.models["gqa"], pool.models["mla"]
    pool.map_first_pages(3)
    assert pool.lender.free_pages == num_pages and gqa.free_runs == mla.free_runs == 4
    left = num_pages
    for number in range(4):
        for kv in (gqa, mla):
            if left >= kv.geometry.num_layers:
                found = number < 3
                assert kv.grow(kv.open_run(), 1) == (0 if found else kv.geometry.num_layers)
                left -= kv.geometry.num_layers
    pool.close()


@pytest.mark.parametrize("num_pages", [3, 5, 6, 11, 12])
def test_first_pages_of_tokens_larger_than_a_page_are_mapped_whole_or_not(num_pages):
    pool = KVPool(num_pages, PAGE_BYTES, [(mha_spec(kv_heads=4, head_dim=200), "float32")], 4)
    kv = pool.models["gqa"]
    pool.map_first_pages(4)
    assert pool.lender.free_pages == num_pages
    for _ in range(num_pages // 6):
        assert kv.grow(kv.open_run(), 1) == 0
    with pytest.raises(CapacityError, match="6 pages asked for"):
        kv.grow(kv.open_run(), 1)
    pool.close()


def test_growth_maps_exactly_the_pages_that_admission_counts():
    pool = open_pool(num_pages=64)
    kv = pool.models["gqa"]
    run = kv.open_run()
    for tokens in (1, 25, 26, 77, 150):
        kv.grow(run, tokens)
        assert run.num_pages == kv.geometry.pages(tokens, PAGE_BYTES)
        assert run.mapped_tokens >= tokens
    pool.close()


def test_growing_past_the_pool_or_the_context_is_refused_and_maps_nothing():
    pool = open_pool(num_pages=5)
    kv = pool.models["gqa"]
    run = kv.open_run()
    with pytest.raises(CapacityError, match="6 pages asked for, 5 of 5 are free"):
        kv.grow(run, 40)
    with pytest.raises(CapacityError, match="context of 200"):
        kv.grow(run, 201)
    assert pool.lender.free_pages == 5
    pool.close()


def test_close_leaves_no_descriptor_and_no_mapping():
    before = open_descriptors()
    pool = open_pool(num_pages=16)
    run = pool.models["mla"].open_run()
    pool.models["mla"].grow(run, 100)
    pool.close()
    assert open_descriptors() == before


def test_page_size_must_be_a_multiple_of_the_systems():
    with pytest.raises(UserError, match="multiple"):
        KVPool(4, 1000, [(mha_spec(), "float32")], 1)


@given(st.integers(1, 5000), st.integers(1, 9), st.integers(1, 5000))
def test_pages_never_undercount_and_round_at_most_one_page_a_layer(tokens, layers, token_bytes):
    geometry = KVGeometry("m", layers, token_bytes, 10_000)
    pages = geometry.pages(tokens, PAGE_BYTES)
    needed_bytes = layers * tokens * token_bytes
    assert needed_bytes <= pages * PAGE_BYTES < needed_bytes + layers * PAGE_BYTES


def test_geometry_follows_the_spec():
    assert KVGeometry.of(mha_spec(), "float32").token_bytes == 2 * 2 * 10 * 4
    assert KVGeometry.of(mla_spec(), "bfloat16").token_bytes == (28 + 6) * 2
    assert dataclasses.asdict(KVGeometry.of(mla_spec(), "bfloat16"))["num_layers"] == 2


def test_anchored_memory_keeps_the_first_bytes_of_every_layer_mapped():
    """Where tensors must begin on a mapped page, one page beyond the pool's lies under all of them and no run does."""

    class Anchored(HostMemory):
        anchored = True

    pool = KVPool(8, PAGE_BYTES, [(mha_spec(layers=2), "float32")], max_runs=2, memory=Anchored())
    kv = pool.models["gqa"]
    assert all(layer[0].sum() == 0 for layer in kv.layers)
    runs = [kv.open_run() for _ in range(2)]
    for run in runs:
        kv.grow(run, 1)
        assert run.start_slot > 0
        for layer in kv.layers:
            layer[run.start_slot] = 1.0
    assert pool.lender.lent_pages == 4
    for run in runs:
        kv.close_run(run)
    assert all(layer[0].sum() == 0 for layer in kv.layers)
    layer = None
    pool.close()
