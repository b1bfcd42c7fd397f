"""KV in host memory: what comes back is what went, pages and host bytes balance, and a full host refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.checkpoints.sizes import config_of
from serving.errors import CapacityError
from serving.memory.kv_pool import KVGeometry, KVPool
from serving.memory.offload import HostKV, saved_bytes
from serving.spec import spec_from_config

pytestmark = pytest.mark.cpu

SPECS = {name: spec_from_config(config_of(name, "tiny", "float32"), name) for name in ("mixtral", "deepseek_v2")}


def fill(kv, run, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    kv.grow(run, tokens)
    for layer in kv.layers:
        part = layer[run.start_slot : run.start_slot + tokens]
        part.copy_(torch.randn(part.shape, generator=generator))


def contents(kv, run, tokens):
    return torch.stack([layer[run.start_slot : run.start_slot + tokens].clone() for layer in kv.layers])


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.sampled_from(sorted(SPECS)), st.integers(1, 40)), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_kv_comes_back_as_it_went_wherever_its_pages_are(lengths, order):
    pool = KVPool(400, 4096, [(spec, "float32") for spec in SPECS.values()], max_runs=8)
    host = HostKV(1 << 30)
    held = []
    for number, (name, tokens) in enumerate(lengths):
        kv = pool.models[name]
        run = kv.open_run()
        fill(kv, run, tokens, number)
        held.append((number, kv, run, tokens, contents(kv, run, tokens)))
    for number, kv, run, tokens, _ in held:
        assert host.save(number, kv, run, tokens) == saved_bytes(kv, tokens)
    assert pool.lender.lent_pages == 0
    assert host.used_bytes == sum(saved_bytes(kv, tokens) for _, kv, _, tokens, _ in held)
    order.shuffle(held)
    for number, kv, run, tokens, before in held:
        assert number in host
        host.restore(number, kv, run)
        assert torch.equal(contents(kv, run, tokens), before)
    assert host.used_bytes == 0
    for _, kv, run, _, _ in held:
        kv.close_run(run)
    assert pool.lender.lent_pages == 0
    pool.close()


def test_a_full_host_and_a_full_pool_refuse_and_change_nothing():
    spec = SPECS["mixtral"]
    pool = KVPool(pages_of(spec, 10), 4096, [(spec, "float32")], max_runs=4)
    kv = pool.models[spec.name]
    host = HostKV(saved_bytes(kv, 10))
    one, other = kv.open_run(), kv.open_run()
    fill(kv, one, 10, 1)
    before = contents(kv, one, 10)
    host.save("one", kv, one, 10)
    fill(kv, other, 10, 2)
    assert not host.fits(kv, 1)
    with pytest.raises(CapacityError, match="in host memory 0 B are free"):
        host.save("other", kv, other, 10)
    with pytest.raises(CapacityError, match="pages asked for"):
        host.restore("one", kv, one)
    assert "one" in host
    kv.close_run(other)
    host.restore("one", kv, one)
    assert torch.equal(contents(kv, one, 10), before)
    host.drop("one")
    assert host.used_bytes == 0


def pages_of(spec, tokens):
    return KVGeometry.of(spec, "float32").pages(tokens, 4096)
