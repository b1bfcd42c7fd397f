"""Who takes part in `serving.bench_decode`: systems of this project, the two halves alone, and `transformers`.

All decode the same prompts greedily and answer in the same two numbers, so that a bench can let them take turns.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import torch

from serving import registry
from serving.checkpoints import open_weights
from serving.errors import UserError
from serving.generate import cpu_cluster
from serving.interface import Demand, Request, ServedModel
from serving.layers.batch import BatchLayout
from serving.memory.kv_pool import cache_shape
from serving.residency.staying import load_attention, load_ffn

_MEMORY_BYTES = 6 << 30


class Side(Protocol):
    """One contestant, on `cores` cores in `dtype`: `run` decodes and returns (decode tokens/s, prefill seconds)."""

    name: str
    cores: int
    dtype: str

    def run(self, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> tuple[float, float]: ...

    def close(self) -> None: ...


class EngineSide:
    """A system of this project. `batches` batches of the same size are kept in flight, one a lane."""

    def __init__(self, system: str, devices: int, model: ServedModel, options: dict[str, object], batches: int) -> None:
        self.name = f"{system}, {devices} device{'s' if devices > 1 else ''}"
        self.cores, self.dtype = devices, model.dtype
        self._model, self._batches = model, batches
        self._system = registry.create(system, options)
        self._system.start(self._system.plan(cpu_cluster(devices, _MEMORY_BYTES), [model], Demand()))
        self._next_id = 0

    def run(self, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> tuple[float, float]:
        wanted = list(prompts) * self._batches
        first_id, self._next_id = self._next_id, self._next_id + len(wanted)
        started_ns = time.monotonic_ns()
        for number, prompt in enumerate(wanted):
            self._system.submit(Request(first_id + number, self._model.name, prompt, new_tokens))
        times: dict[int, list[int]] = {first_id + number: [] for number in range(len(wanted))}
        left = len(wanted)
        while left:
            for event in self._system.poll():
                if event.tokens:
                    times[event.request_id].append(event.time_ns)
                if event.kind.terminal:
                    left -= 1
                    if event.reason:
                        raise UserError(f"{self.name}: {event.reason}")
            time.sleep(0.002)
        begin, end = max(t[0] for t in times.values()), min(t[-1] for t in times.values())
        if begin >= end:
            raise UserError(
                f"{self.name}: sequences never decode all at once with {new_tokens} new tokens; ask for more"
            )
        decoded = sum(begin < moment <= end for moments in times.values() for moment in moments)
        return decoded / (end - begin) * 1e9, (begin - started_ns) / 1e9

    def close(self) -> None:
        self._system.stop()


class HalvesSide:
    """The two halves of a model in this process, on its first core: what layers and kernels give without an engine.

    A prompt is prefilled `chunk` tokens at a time, the whole batch together; the KV cache is one run a sequence.
    """

    cores = 1

    def __init__(self, model: ServedModel, chunk: int) -> None:
        self.name, self.dtype = "halves, 1 thread", model.dtype
        self._spec, self._chunk = model.spec, chunk
        with open_weights(model) as weights:
            self._attention, self._ffn = load_attention(weights, model.dtype), load_ffn(weights, model.dtype)
        self._caches: list[torch.Tensor] = []

    @torch.inference_mode()
    def run(self, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> tuple[float, float]:
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        try:
            return self._run(prompts, new_tokens)
        finally:
            os.sched_setaffinity(0, cores)

    def _run(self, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> tuple[float, float]:
        batch, length = len(prompts), len(prompts[0])
        self._room = length + new_tokens
        shape = cache_shape(self._spec, batch * self._room)
        if not self._caches or self._caches[0].shape != shape:
            kind = getattr(torch, self.dtype)
            self._caches = [torch.zeros(shape, dtype=kind) for _ in range(self._spec.num_layers)]
        started = time.perf_counter()
        for done in range(0, length, self._chunk):
            chunk = [prompt[done : done + self._chunk] for prompt in prompts]
            tokens = self._step(chunk, done + len(chunk[0]))
        first = time.perf_counter()
        for position in range(length + 1, length + new_tokens):
            tokens = self._step([(token,) for token in tokens], position)
        return batch * (new_tokens - 1) / (time.perf_counter() - first), first - started

    def _step(self, rows: Sequence[tuple[int, ...]], length: int) -> list[int]:
        """One step of all sequences, each `length` tokens long with these `rows`: the next token of each."""
        batch, count = len(rows), len(rows[0])
        layout = BatchLayout(
            query_lens=(count,) * batch,
            kv_lens=(length,) * batch,
            run_starts=tuple(range(0, batch * self._room, self._room)),
            logit_rows=tuple(range(count - 1, batch * count, count)),
        )
        hidden, ffn_out = self._attention.embed(torch.tensor([token for row in rows for token in row])), None
        for layer, cache in enumerate(self._caches):
            hidden, ffn_in = self._attention.attend(layer, hidden, ffn_out, cache, layout)
            ffn_out = self._ffn.forward(layer, ffn_in)
        return self._attention.logits(hidden, ffn_out, layout).argmax(dim=-1).tolist()

    def close(self) -> None:
        del self._attention, self._ffn, self._caches


class TransformersSide:
    """`generate` of `transformers`, in a process of its own with `threads` threads on as many cores."""

    def __init__(self, checkpoint: Path, threads: int, dtype: str, mode: str) -> None:
        self.name = f"transformers ({mode}), {threads} thread{'s' if threads > 1 else ''}"
        self.cores, self.dtype = threads, dtype
        context = multiprocessing.get_context("spawn")
        self._connection, far = context.Pipe()
        self._process = context.Process(target=_transformers_server, args=(far, str(checkpoint), threads, dtype, mode))
        self._process.start()
        far.close()
        self._receive()

    def _receive(self) -> object:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise UserError(f"{self.name}: its process ended") from None
        if isinstance(answer, str):
            raise UserError(f"{self.name}: {answer}")
        return answer

    def run(self, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> tuple[float, float]:
        self._connection.send((list(prompts), new_tokens))
        return self._receive()

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def _transformers_server(connection: Connection, checkpoint: str, threads: int, dtype: str, mode: str) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(cores[:threads]))
    torch.set_num_threads(threads)
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    class Clock(StoppingCriteria):
        """Never stops; notes when each token was there."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), attn_implementation="sdpa", experts_implementation=mode
        ).eval()
    except (ValueError, OSError) as error:
        connection.send(str(error).splitlines()[0])
        return
    connection.send((0.0, 0.0))
    with torch.inference_mode():
        while True:
            try:
                prompts, new_tokens = connection.recv()
            except EOFError:
                return
            clock = Clock()
            ids = torch.tensor(prompts)
            started = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
            decoded = len(prompts) * (len(clock.times) - 1)
            connection.send((decoded / (clock.times[-1] - clock.times[0]), clock.times[0] - started))
