"""Runs steps of models on cards: decode as graphs captured at warm-up, everything else kernel by kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from kernels.launch import Launch, compile_ahead, recording
from kernels.lm_head import greedy
from serving.batching import StepLimits
from serving.cuda.exchange import ByEvents, Exchange, InPlace, Mailboxes, Residents, bytes_crossed
from serving.cuda.lane import Lane
from serving.cuda.layers import CardAttentionHalf, CardFFNHalf
from serving.cuda.layout import BLOCK_TOKENS, CardLayout, decode_numbers
from serving.memory.kv_pool import ModelKV
from serving.scheduler import StepPlan
from serving.sequence import Sequence


@dataclass(frozen=True)
class CardModel:
    """A model as the runner holds it."""

    attention: CardAttentionHalf
    ffn: CardFFNHalf
    kv: ModelKV
    blocks: torch.Tensor  # 0, 1, 2... of one run, on the attention half's card

    @classmethod
    def of(cls, attention: CardAttentionHalf, ffn: CardFFNHalf, kv: ModelKV) -> CardModel:
        count = -(-kv.geometry.max_context_tokens // BLOCK_TOKENS)
        return cls(attention, ffn, kv, torch.arange(count, device=attention.device))

    def forward(self, layout: CardLayout, exchange: Exchange) -> torch.Tensor:
        """The next token of every row wanted, [rows wanted] int64."""
        half = self.attention
        hidden, ffn_out = half.embed(layout.token_ids), None
        for layer in range(half.spec.num_layers):
            hidden, ffn_in = half.attend(layer, hidden, ffn_out, self.kv.layers[layer], layout)
            ffn_out = exchange(layer, ffn_in)
        return greedy(half.logits(hidden, ffn_out, layout))


@dataclass(frozen=True)
class _Launches:
    """What a decode step of one (lane, model, bucket) is: graphs, in the order of their launch, each with its stream."""

    stages: tuple[tuple[torch.cuda.CUDAGraph, torch.cuda.Stream], ...]
    kept: tuple[torch.Tensor, ...] = ()  # memory that stages hand on


def buckets_up_to(max_batch: int) -> list[int]:
    """Batch sizes that graphs are captured for: powers of two, and `max_batch`."""
    sizes = [1]
    while sizes[-1] * 2 < max_batch:
        sizes.append(sizes[-1] * 2)
    return sizes if max_batch == 1 else [*sizes, max_batch]


class StepRunner:
    """Steps of `models` in `lanes` lanes. `control` is one of :data:`serving.cuda.config.CONTROLS`; with `graphs` off,
    decode runs kernel by kernel too (by events between the pools)."""

    def __init__(
        self,
        models: Seq[CardModel],
        lanes: int,
        limits: StepLimits,
        control: str,
        graphs: bool = True,
    ) -> None:
        self._models, self._control, self._limits = list(models), control, limits
        self.device = models[0].attention.device
        ffn_devices = {model.ffn.device for model in models}
        self.lanes = [Lane(self.device, ffn_devices, limits.max_batch) for _ in range(lanes)]
        self.bytes_crossed = 0
        self._buckets = buckets_up_to(limits.max_batch)
        self._mailboxes: dict[tuple[torch.device, torch.dtype], Mailboxes] = {}
        self._residents: Residents | None = None
        self._launches: dict[tuple[int, int, int], _Launches] = {}
        self._under_way: list[tuple[_Launches, int] | None] = [None] * lanes  # host control: the next stage
        if control == "lowered":
            self._open_mailboxes(ffn_devices)
        if control == "resident":
            self._residents = Residents([m.ffn for m in models], lanes, limits.max_batch, self.device)
        self._warm_up(graphs)

    def _open_mailboxes(self, ffn_devices: set[torch.device]) -> None:
        widest = max(model.attention.spec.hidden_size for model in self._models)
        for ffn_device in ffn_devices:
            for dtype in {model.ffn.dtype for model in self._models}:
                self._mailboxes[ffn_device, dtype] = Mailboxes(
                    len(self.lanes), self._limits.max_batch, widest, dtype, self.device, ffn_device
                )

    # -- steps ---------------------------------------------------------------------------------------------------------
    def launch(self, lane_index: int, model_index: int, plan: StepPlan) -> None:
        """Start a step; what it reads has been mapped. The lane must be free."""
        lane, model = self.lanes[lane_index], self._models[model_index]
        rows = sum(plan.query_lens)
        if self._control != "fused":
            spec, dtype = model.attention.spec, model.attention.dtype
            self.bytes_crossed += bytes_crossed(rows, spec.hidden_size, spec.num_layers, dtype.itemsize)
        decode = all(count == 1 == sequence.pending for sequence, count in plan.items)
        bucket = next(size for size in self._buckets if size >= len(plan.items))
        launches = self._launches.get((lane_index, model_index, bucket)) if decode else None
        lane.wanted = len(plan.logit_rows)
        if launches is None:
            self._run_eagerly(lane, model, plan)
            return
        host, card = lane.numbers_of(bucket)
        decode_numbers(plan, host)
        with torch.cuda.stream(lane.stream):
            card.copy_(host, non_blocking=True)
        if self._control == "host":
            self._under_way[lane_index] = (launches, 0)
            self._next_stage(lane_index)
            return
        for graph, stream in launches.stages:
            with torch.cuda.stream(stream):
                graph.replay()
        self._bring_tokens(lane)

    def done(self, lane_index: int) -> bool:
        """Whether the lane's step is done. Under host control this is where its next stage is launched."""
        lane = self.lanes[lane_index]
        if not lane.done():
            return False
        if self._under_way[lane_index] is None:
            return True
        self._next_stage(lane_index)
        return False

    def result(self, lane_index: int) -> list[int]:
        return self.lanes[lane_index].result()

    def _next_stage(self, lane_index: int) -> None:
        lane = self.lanes[lane_index]
        launches, stage = self._under_way[lane_index]
        graph, stream = launches.stages[stage]
        with torch.cuda.stream(stream):
            graph.replay()
            lane.finished.record(stream)
        last = stage + 1 == len(launches.stages)
        self._under_way[lane_index] = None if last else (launches, stage + 1)
        if last:
            self._bring_tokens(lane)

    def _bring_tokens(self, lane: Lane) -> None:
        with torch.cuda.stream(lane.stream):
            lane.tokens_host.copy_(lane.tokens, non_blocking=True)
            lane.finished.record(lane.stream)

    def _run_eagerly(self, lane: Lane, model: CardModel, plan: StepPlan) -> None:
        exchange = InPlace(model.ffn) if self._control == "fused" else ByEvents(model.ffn, lane)
        with torch.cuda.stream(lane.stream):
            layout = CardLayout.ragged(plan, model.blocks)
            tokens = model.forward(layout, exchange)
            lane.tokens[: len(tokens)].copy_(tokens)
        self._bring_tokens(lane)

    # -- warm-up -------------------------------------------------------------------------------------------------------
    def _warm_up(self, graphs: bool) -> None:
        """Compile what decode steps launch, several kernels at a time, then capture a step of every size and lane."""
        with recording() as calls:
            self._run_every_step(self.lanes[:1])
        compile_ahead(_distinct(calls))
        self._run_every_step(self.lanes)
        if not graphs:
            return
        capture = self._capture_stages if self._control == "host" else self._capture_step
        for lane_index in range(len(self.lanes)):
            for model_index in range(len(self._models)):
                for bucket in reversed(self._buckets):
                    self._launches[lane_index, model_index, bucket] = capture(lane_index, model_index, bucket)
        torch.cuda.synchronize(self.device)
        if self._residents is not None:
            self._residents.start()

    def _run_every_step(self, lanes: Seq[Lane]) -> None:
        """Each model's decode steps, of idle rows, and some of its prefill steps, kernel by kernel."""
        for lane in lanes:
            for model in self._models:
                for bucket in self._buckets:
                    with torch.cuda.stream(lane.stream):
                        layout = self._idle_layout(lane, model, bucket)
                        model.forward(layout, ByEvents(model.ffn, lane))
                self._run_prefill(lane, model)
                torch.cuda.synchronize(self.device)

    def _run_prefill(self, lane: Lane, model: CardModel) -> None:
        most = min(self._limits.prefill_chunk, model.kv.geometry.max_context_tokens)
        run = model.kv.open_run()
        model.kv.grow(run, most)
        for rows in sorted({min(16, most), min(64, most), most}):
            warm = Sequence(0, 0, [0] * rows, rows, 1, run=run)
            self._run_eagerly(lane, model, StepPlan(0, ((warm, rows),)))
        torch.cuda.synchronize(self.device)
        model.kv.close_run(run)

    def _idle_layout(self, lane: Lane, model: CardModel, bucket: int) -> CardLayout:
        host, card = lane.numbers_of(bucket)
        decode_numbers(StepPlan(0, ()), host)
        card.copy_(host)
        return CardLayout.decode(card, model.blocks)

    def _capture_step(self, lane_index: int, model_index: int, bucket: int) -> _Launches:
        lane, model = self.lanes[lane_index], self._models[model_index]
        _, card = lane.numbers_of(bucket)
        self._idle_layout(lane, model, bucket)

        def attention_side(exchange: Exchange) -> Callable[[], None]:
            def run() -> None:
                layout = CardLayout.decode(card, model.blocks)
                lane.tokens[:bucket].copy_(model.forward(layout, exchange))

            return run

        ffn = model.ffn
        if self._control == "lowered":
            mailboxes = self._mailboxes[ffn.device, ffn.dtype]
            exchange = mailboxes.attention_side(lane_index)
            ffn_stream = lane.ffn_streams[ffn.device]
            served = _captured(lane, ffn_stream, lambda: mailboxes.serve_step(lane_index, ffn, bucket))
            return _Launches(
                ((_captured(lane, lane.stream, attention_side(exchange)), lane.stream), (served, ffn_stream)),
            )
        if self._control == "resident":
            exchange = self._residents.attention_side(lane_index, ffn)
        else:
            exchange = InPlace(ffn)
        return _Launches(((_captured(lane, lane.stream, attention_side(exchange)), lane.stream),))

    def _capture_stages(self, lane_index: int, model_index: int, bucket: int) -> _Launches:
        """A graph a stage; rows are handed on in buffers that outlive the capture."""
        lane, model = self.lanes[lane_index], self._models[model_index]
        half, ffn = model.attention, model.ffn
        _, card = lane.numbers_of(bucket)
        self._idle_layout(lane, model, bucket)
        size = (bucket, half.spec.hidden_size)
        rows_out = torch.zeros(size, dtype=half.dtype, device=half.device)
        rows_in, hidden = torch.zeros_like(rows_out), torch.zeros_like(rows_out)
        rows_there = torch.zeros_like(rows_out, device=ffn.device)
        ffn_stream = lane.ffn_streams[ffn.device]
        stages = []

        def attention_stage(layer: int) -> None:
            layout = CardLayout.decode(card, model.blocks)
            before = half.embed(layout.token_ids) if layer == 0 else hidden
            if layer == half.spec.num_layers:
                lane.tokens[:bucket].copy_(greedy(half.logits(before, rows_in, layout)))
                return
            ffn_out = None if layer == 0 else rows_in
            after, ffn_in = half.attend(layer, before, ffn_out, model.kv.layers[layer], layout)
            hidden.copy_(after)
            rows_there.copy_(ffn_in)

        def ffn_stage(layer: int) -> None:
            rows_in.copy_(ffn.forward(layer, rows_there))

        for layer in range(half.spec.num_layers):
            stages.append((_captured(lane, lane.stream, lambda layer=layer: attention_stage(layer)), lane.stream))
            stages.append((_captured(lane, ffn_stream, lambda layer=layer: ffn_stage(layer)), ffn_stream))
        stages.append((_captured(lane, lane.stream, lambda: attention_stage(half.spec.num_layers)), lane.stream))
        return _Launches(tuple(stages), (rows_out, rows_in, hidden, rows_there))

    def close(self) -> None:
        """Wait for everything and let executors end. Raises RuntimeError if one of them gave up."""
        with contextlib.ExitStack() as at_the_end:
            for executor in self._residents.executors if self._residents else ():
                at_the_end.callback(executor.stop)
        for lane in self.lanes:
            lane.stream.synchronize()
        for mailboxes in self._mailboxes.values():
            mailboxes.check()


def _captured(lane: Lane, stream: torch.cuda.Stream, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """`run` as a graph. Graphs of one stream run one after the other, so they share their memory."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(stream.device)
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        graph.capture_begin(pool=lane.pools[stream], capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    return graph


def _distinct(calls: Seq[Launch]) -> list[Launch]:
    """One call of each kind: layers launch the same kernels over and over, and asking for one to be compiled is not cheap."""

    def kind(argument: object) -> object:
        if isinstance(argument, torch.Tensor):
            return argument.dtype, argument.data_ptr() % 16 == 0
        return argument

    found = {(id(c.kernel), tuple(map(kind, c.args)), tuple(c.meta.items())): c for c in calls}
    return list(found.values())
