"""What Triton's interpreter cannot judge (kernels/README.md lists it), on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import reference as attention_reference
from kernels.launch import num_sms
from kernels.moe_ffn import ExpertWeights
from kernels.moe_ffn import reference as moe_reference
from kernels.paged_kv import PagedKV

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def weights(device) -> ExpertWeights:
    gate_up = torch.randn(32, 2 * 768, 1024, device=device, dtype=torch.bfloat16) / 32
    return ExpertWeights(gate_up, torch.randn(32, 1024, 768, device=device, dtype=torch.bfloat16) / 28)


def routing(rows: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(rows, 4, device=device), torch.rand(rows, 32, device=device).argsort(-1)[:, :4].contiguous()


@pytest.mark.parametrize("rows", [1, 5, 16, 40, 3000])
def test_routed_ffn_is_right_and_the_same_bits_every_time(rows, weights, device, check):
    """Programs that really run at once: arrivals, the last program's sum, and no race in either."""
    from kernels.moe_ffn import moe_ffn

    x = torch.randn(rows, 1024, device=device, dtype=torch.bfloat16)
    chosen = routing(rows, device)
    first = moe_ffn(x, weights, *chosen)
    check("out", first, moe_reference.moe_ffn(x, weights, *chosen))
    for _ in range(100):
        assert moe_ffn(x, weights, *chosen).equal(first)


def test_graphs_of_two_streams_keep_their_own_descriptors(weights, device, check):
    """Two captured FFNs by descriptor, over other rows and other weights, replayed at once on two streams."""
    from kernels import tuning
    from kernels.moe_ffn import moe_ffn

    layers = weights, ExpertWeights(weights.gate_up.flip(0).contiguous(), weights.down.flip(0).contiguous())
    rows = [torch.randn(3000, 1024, device=device, dtype=torch.bfloat16) for _ in layers]
    chosen = [routing(3000, device) for _ in layers]
    graphs, outs = [torch.cuda.CUDAGraph() for _ in layers], []
    tuning.set_override("moe_ffn", {"TMA": 1, "DOWN_TMA": 1})
    try:
        moe_ffn(rows[0], layers[0], *chosen[0])
        torch.cuda.synchronize()
        for graph, x, layer, choice in zip(graphs, rows, layers, chosen, strict=True):
            with torch.cuda.graph(graph):
                outs.append(moe_ffn(x, layer, *choice))
    finally:
        tuning.set_override("moe_ffn", None)
    streams = [torch.cuda.Stream() for _ in layers]
    for _ in range(3):
        for x in rows:
            x.normal_()
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for out, x, layer, choice in zip(outs, rows, layers, chosen, strict=True):
            check("out", out, moe_reference.moe_ffn(x, layer, *choice))


def test_one_graph_serves_any_lengths(device, check):
    """Splits are computed on the device: a captured decode is right after the lengths have changed under it."""
    from kernels.attention import decode_gqa

    table = torch.randperm(3 * 128, device=device).int().view(3, 128)
    lens = torch.tensor([1, 5000, 64], dtype=torch.int32, device=device)
    cache = torch.randn(3 * 128 * 64, 2, 8, 128, device=device, dtype=torch.bfloat16)
    kv = PagedKV(cache, 64, table, lens)
    q = torch.randn(3, 32, 128, device=device, dtype=torch.bfloat16)
    decode_gqa(q, kv, 0.09)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_gqa(q, kv, 0.09)
    for lengths in ([1, 5000, 64], [8192, 1, 8192], [300, 257, 256]):
        lens.copy_(torch.tensor(lengths))
        graph.replay()
        check(f"lengths {lengths}", out, attention_reference.decode_gqa(q, kv, 0.09))


def test_one_graph_serves_chunks_after_any_prefix(device, check):
    """The same of prompt chunks: tiles are cut among programs after long prefixes only, in one captured graph."""
    from kernels.attention import prefill_gqa
    from kernels.mla import prefill_mla
    from kernels.mla import reference as mla_reference

    table = torch.randperm(2 * 512, device=device).int().view(2, 512)
    lens = torch.tensor([100, 64], dtype=torch.int32, device=device)
    cache = torch.randn(2 * 512 * 64, 2, 4, 128, device=device, dtype=torch.bfloat16)
    latents = torch.randn(2 * 512 * 64, 576, device=device, dtype=torch.bfloat16)
    kv, latent_kv = PagedKV(cache, 64, table, lens), PagedKV(latents, 64, table, lens)
    q = torch.randn(80, 32, 128, device=device, dtype=torch.bfloat16)
    q_latent = torch.randn(80, 20, 512, device=device, dtype=torch.bfloat16)
    q_rope = torch.randn(80, 20, 64, device=device, dtype=torch.bfloat16)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return prefill_gqa(q, kv, (16, 64), 0.09), prefill_mla(q_latent, q_rope, latent_kv, (16, 64), 0.04)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gqa, mla = run()
    for lengths in ([100, 64], [32768, 70], [16, 20000], [3000, 2500]):
        lens.copy_(torch.tensor(lengths))
        graph.replay()
        check(f"GQA, {lengths}", gqa, attention_reference.prefill_gqa(q, kv, (16, 64), 0.09))
        right = mla_reference.prefill_mla(q_latent, q_rope, latent_kv, (16, 64), 0.04)
        check(f"MLA, {lengths}", mla, right)


def test_slots_beyond_two_to_the_31_elements(device, check):
    from kernels.attention import decode_gqa, prefill_gqa

    slots = (1 << 31) // (2 * 8 * 128) + 4096
    cache = torch.zeros(slots, 2, 8, 128, device=device, dtype=torch.bfloat16)
    cache[-2048:].normal_()
    table = torch.arange(slots // 64 - 16, slots // 64, device=device, dtype=torch.int32).view(1, -1)
    kv = PagedKV(cache, 64, table, torch.tensor([1000], dtype=torch.int32, device=device))
    q = torch.randn(70, 32, 128, device=device, dtype=torch.bfloat16)
    check("decode", decode_gqa(q[:1], kv, 0.09), attention_reference.decode_gqa(q[:1], kv, 0.09))
    check("prefill", prefill_gqa(q, kv, (70,), 0.09), attention_reference.prefill_gqa(q, kv, (70,), 0.09))


def test_float32_products_are_not_tf32(device, check):
    from kernels.moe_ffn import moe_ffn

    x = torch.randn(8, 4096, device=device)
    weights = ExpertWeights(
        torch.randn(4, 256, 4096, device=device) / 64, torch.randn(4, 4096, 128, device=device) / 11
    )
    chosen = torch.ones(8, 1, device=device), torch.arange(8, device=device).view(8, 1) % 4
    check("out", moe_ffn(x, weights, *chosen), moe_reference.moe_ffn(x, weights, *chosen), 5e-6)


@pytest.mark.parametrize("rows", [1, 16, 500])
def test_mailbox_between_two_streams(rows, device):
    """Release and acquire between kernels that run at once, fifty times there and back."""
    from kernels.bench.crossing import crossing_seconds

    assert crossing_seconds(rows, 2048, device, torch.bfloat16) < 1e-3


@pytest.mark.parametrize("rows", [1, 16, 40])
def test_resident_ffn_of_a_whole_card(rows, device):
    """Gates and arrivals among all multiprocessors' programs, fed by graphs while the worker stays."""
    from kernels.bench.crossing import resident_seconds

    seconds, error = resident_seconds(rows, device, torch.bfloat16)
    assert error < 1.2e-2
    assert seconds < 5e-3


def test_resident_ffn_of_two_callers(device, check):
    """Tasks of two streams queue up: programs that are done with one begin the next while others still work, and each caller
    must get the answers to its own."""
    from kernels.bench.measure import capture
    from kernels.resident_ffn import FFNLayer, ResidentFFN, ffn_layer

    def layer() -> FFNLayer:
        gate_up = torch.randn(16, 2 * 256, 512, device=device, dtype=torch.bfloat16) / 22
        experts = ExpertWeights(gate_up, torch.randn(16, 512, 256, device=device, dtype=torch.bfloat16) / 16)
        router = torch.randn(16, 512, device=device, dtype=torch.bfloat16)
        return FFNLayer(router, experts, top_k=2, rule="softmax_topk_renorm")

    layers = [layer() for _ in range(8)]
    executor = ResidentFFN([layers], torch.bfloat16, device, num_slots=2, max_rows=4, max_spins=500_000)
    inputs = torch.randn(2, 3, 512, device=device, dtype=torch.bfloat16)
    expected = [[ffn_layer(one, rows) for one in layers] for rows in inputs]
    answers: list[list[torch.Tensor]] = [[], []]

    def ask(slot: int, number: int) -> None:
        executor.submit(0, number, slot, inputs[slot])
        answers[slot].append(executor.collect(slot, 3, 512))

    for slot in range(2):
        executor.submit(0, 0, slot, inputs[slot])
        executor.run_pending()
        executor.collect(slot, 3, 512)
    torch.cuda.synchronize(device)
    graphs = [capture([lambda s=slot, n=n: ask(s, n) for n in range(8)]) for slot in range(2)]
    streams = [torch.cuda.Stream(device) for _ in graphs]
    executor.start(num_sms(device) // 2)
    try:
        for _ in range(50):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            for stream in streams:
                stream.synchronize()
    finally:
        executor.stop()
    for slot in range(2):
        for number, (answer, right) in enumerate(zip(answers[slot], expected[slot], strict=True)):
            check(f"caller {slot}, layer {number}", answer, right)
