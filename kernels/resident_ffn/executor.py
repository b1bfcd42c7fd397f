"""The host's side of the resident FFN executor: its memory, its launch, and the submit and collect that feed it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.launch import launch, next_power_of_2, num_sms
from kernels.mailbox.triton import BLOCK, programs_to_copy
from kernels.resident_ffn.layers import FFNLayer, LayerTable
from kernels.resident_ffn.triton import FIELDS, STOP, collect_kernel, resident_worker_kernel, submit_kernel

# Left to itself the assembler trades a few spilled registers for an occupancy that one program a multiprocessor lacks.
MAX_REGISTERS = 255
MAX_WARPS = 4  # of the worker: 8 warps of 255 registers a thread are all 65,536 registers of a multiprocessor

ERRORS = {
    1: "a mailbox wait gave up",
    2: "no descriptor came in time",
    3: "a program of the worker did not arrive",
    4: "the ring stayed full",
    5: "a result did not come in time",
}


@dataclass(frozen=True)
class Blocks:
    """Block sizes of the worker, of which one program runs on each multiprocessor and must leave room on it: a worker that
    takes all registers lets no kernel start that would feed it."""

    rows: int = 16
    gate_up: int = 32
    down: int = 16
    depth: int = 128
    down_depth: int = 128
    router: int = 512
    num_warps: int = 4
    num_stages: int = 6
    down_stages: int = 9

    def __post_init__(self) -> None:
        if self.num_warps > MAX_WARPS:
            raise ValueError(
                f"{self.num_warps} warps of the resident worker take all registers of a multiprocessor, and nothing could "
                f"submit to it; at most {MAX_WARPS}"
            )


class ResidentFFN:
    """Runs any FFN layer of any of its models without a launch: rows and a descriptor in, rows and a flag out.

    `start` launches the worker on a stream of its own; `submit` and `collect` are kernels on the caller's current stream,
    fit for graph capture; `stop` ends the worker. On the CPU (the interpreter) the worker cannot run beside anything: use
    `run_pending` between submit and collect instead of `start`.
    """

    def __init__(
        self,
        models: Sequence[Sequence[FFNLayer]],
        dtype: torch.dtype,
        device: torch.device,
        num_slots: int,
        max_rows: int,
        capacity: int = 64,
        blocks: Blocks | None = None,
        max_spins: int = 20_000_000,
        results_device: torch.device | None = None,
    ) -> None:
        """`models[m][l]` is layer l of model m; slots hold `max_rows` rows each; the ring holds `capacity` tasks. Results
        and all counts that callers read lie on `results_device`, the caller's device if not the worker's: what a caller
        does towards another card is to write and not to wait for an answer."""
        self.table = LayerTable.build(models, device)
        self.device, self.dtype, self.capacity, self.max_spins = device, dtype, capacity, max_spins
        wide = dtype == torch.float32
        self.blocks = blocks or (
            Blocks(gate_up=16, depth=32, down_depth=32, router=64, num_stages=2) if wide else Blocks()
        )
        layers = self.table.layers
        depth = max(layer.depth for layer in layers)
        self.slot_elements = -(-max_rows * depth // 16) * 16
        self._copy_programs = programs_to_copy(self.slot_elements)
        self.slots_in = torch.zeros(num_slots, self.slot_elements, dtype=dtype, device=device)
        self.results_device = results_device or device
        self.slots_out = torch.zeros_like(self.slots_in, device=self.results_device)
        self.queue = self._counts(capacity * FIELDS.value)
        self.done, self.expected = torch.zeros(2, num_slots, dtype=torch.int32, device=self.results_device)
        self.arrivals = torch.zeros(num_slots, dtype=torch.int64, device=self.results_device)
        self.tickets, self.finished = torch.zeros(2, 1, dtype=torch.int32, device=self.results_device)
        self.error = self._counts(1)
        rows = self.blocks.rows
        self.block_e = max(16, next_power_of_2(max(layer.num_experts for layer in layers)))
        self.logits = torch.zeros(rows, self.block_e, dtype=torch.float32, device=device)
        self.routing = torch.zeros_like(self.logits)
        self.active = self._counts(self.block_e + 1)
        hidden = max(layer.active_experts(rows) * layer.width for layer in layers)
        shared = max(layer.shared_width for layer in layers)
        self.hidden = torch.zeros(max(1, rows * hidden), dtype=dtype, device=device)
        self.shared_hidden = torch.zeros(max(1, rows * shared), dtype=dtype, device=device)
        # Made now: nothing is allocated beside the worker.
        self._stop_row = torch.zeros(1, 1, dtype=dtype, device=self.results_device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.started_tasks = 0  # descriptors before which the running worker began

    def _counts(self, n: int) -> torch.Tensor:
        return torch.zeros(n, dtype=torch.int32, device=self.device)

    def start(self, programs: int | None = None) -> None:
        """Launch the worker, on every multiprocessor or on as many as `programs` says: kernels that need more shared memory
        or registers than the worker leaves can only run where it does not. Everything else that will run on the card must
        have been warmed up: loading a module or allocating memory beside a kernel that never returns can wait for it
        forever."""
        self.started_tasks = int(self.tickets.item())
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.launch_worker(programs or num_sms(self.device), 2**31 - 1)

    def run_pending(self) -> None:
        """Run what was submitted, in one program, and return."""
        count = int(self.tickets.item()) - self.started_tasks
        self.launch_worker(1, count)
        self.started_tasks += count

    def launch_worker(self, programs: int, max_tasks: int) -> None:
        """One launch of the worker over a grid of `programs`, for at most `max_tasks` descriptors."""
        blocks, layers = self.blocks, self.table.layers
        # On cache lines of their own: all poll the gate while some still count themselves in.
        gated, finished_programs, gate = torch.zeros(3, 32, dtype=torch.int64, device=self.device)
        launch(
            resident_worker_kernel,
            (programs,),
            self.queue,
            self.table.entries,
            self.table.scales,
            self.table.first_layer,
            self.slots_in,
            self.slots_out,
            self.done,
            self.finished,
            self.logits,
            self.routing,
            self.active,
            self.hidden,
            self.shared_hidden,
            gated,
            finished_programs,
            gate,
            self.error,
            self.started_tasks,
            max_tasks,
            self.slot_elements,
            self.max_spins,
            CAPACITY=self.capacity,
            ROWS=blocks.rows,
            BLOCK_E=self.block_e,
            GROUPS=next_power_of_2(max(layer.num_groups for layer in layers)),
            BLOCK_N=blocks.gate_up,
            DOWN_N=blocks.down,
            BLOCK_K=blocks.depth,
            DOWN_K=blocks.down_depth,
            DOWN_STAGES=blocks.down_stages,
            BLOCK_R=blocks.router,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            maxnreg=MAX_REGISTERS,
            launch_cooperative_grid=self.device.type == "cuda",
        )
        self._barrier = (gated, finished_programs, gate)  # alive as long as the worker

    def submit(self, model: int, layer: int, slot: int, x: torch.Tensor) -> None:
        """Queue `x` [T, D] for a layer of a model; the slot must have been collected before it is used again."""
        rows, width = x.shape
        launch(
            submit_kernel,
            (self._copy_programs,),
            x,
            self.slots_in,
            self.queue,
            self.tickets,
            self.arrivals,
            self.expected,
            self.finished,
            self.error,
            model,
            layer,
            slot,
            rows,
            width,
            x.stride(0),
            self.slot_elements,
            self.max_spins,
            CAPACITY=self.capacity,
            PROGRAMS=self._copy_programs,
            PACKED=x.is_contiguous(),
            BLOCK=BLOCK,
            num_warps=4,
        )

    def collect(self, slot: int, num_rows: int, width: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """The result [num_rows, width] of the slot's last task, in `out` where given (contiguous); later work of this
        stream waits for it."""
        if out is None:
            out = torch.empty(num_rows, width, dtype=self.dtype, device=self.results_device)
        launch(
            collect_kernel,
            (self._copy_programs,),
            self.slots_out,
            out,
            self.done,
            self.expected,
            self.error,
            slot,
            num_rows,
            width,
            self.slot_elements,
            self.max_spins,
            BLOCK=BLOCK,
            num_warps=4,
        )
        return out

    def stop(self) -> None:
        """Ask the worker to end after what is queued and wait until it has. Raises RuntimeError if anything gave up."""
        self.submit(STOP.value, 0, 0, self._stop_row)
        if self.stream is None:
            self.run_pending()
        else:
            self.stream.synchronize()
        self.check()

    def check(self) -> None:
        """Raise RuntimeError if the worker, a submit or a collect gave up waiting."""
        code = int(self.error.item())
        if code:
            raise RuntimeError(f"resident FFN on {self.device}: {ERRORS[code]}")
