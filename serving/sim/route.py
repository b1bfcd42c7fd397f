"""Where the rows of one model go in each layer, and what that costs: the simulator's form of the FFN ports."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serving.cost.stages import ModelStages
from serving.cost.transfers import crossing
from serving.sim.pipeline import Pipeline
from serving.spec import element_bytes
from serving.workers.config import ModelWorkerConfig

if TYPE_CHECKING:
    from serving.sim.workers import SimulatedFFNWorker


class Route:
    """`legs` are the workers that rows of each layer go to, with the model's number there; `kept` is where a pipeline keeps the kinds
    of its layers (those that go to the same devices with the same shape are of one kind); `parts` is how many a layer has."""

    def __init__(
        self, role: ModelWorkerConfig, model: int, workers: Sequence[SimulatedFFNWorker], pipeline: Pipeline
    ) -> None:
        served, spread = role.models[model], role.ffn_legs.get(model)
        spec = served.spec
        only = ((role.ffn_ports[model], role.ffn_indices[model]),)
        legs = spread or (only,) * spec.num_layers
        shapes = [(legs[layer], spec.is_dense(layer)) for layer in range(spec.num_layers)]
        firsts = {shape: layer for layer, shape in reversed(list(enumerate(shapes)))}
        numbers = {shape: number for number, shape in enumerate(firsts)}
        self._pipeline, self._kinds = pipeline, [numbers[shape] for shape in shapes]
        self.parts = max(len(one) for one in legs)
        self.row_bytes = self.parts * spec.hidden_size * element_bytes(served.dtype)
        self.legs = [[(workers[port], index) for port, index in one] for one in legs]
        self._firsts = tuple(firsts.values())
        self._lowered = role.mailboxes[legs[0][0][0]].bells is None
        self._inline = role.stages == 2
        self._same_node = {workers[port].node for one in legs for port, _ in one} == {role.device.node}
        self.jobs = functools.cache(self._jobs)
        self._cross_ns: dict[int, int] = {}

    @functools.cached_property
    def kept(self) -> int:
        return self._pipeline.keep_route(self._kinds)

    @classmethod
    def of(
        cls, role: ModelWorkerConfig, model: int, workers: Sequence[SimulatedFFNWorker], pipeline: Pipeline
    ) -> Route | None:
        """None where the FFN is in place."""
        remote = model in role.ffn_legs or role.ffn_ports[model] >= 0
        return cls(role, model, workers, pipeline) if remote else None

    def inline_ns(self, stages: ModelStages, rows: int) -> int:
        """For how long a device is held up by rows that leave it: while they do, unless transfers are stages of their own."""
        return self.one_way_ns(stages, rows) if self._inline else 0

    def _jobs(self, stages: ModelStages, rows: int, passes: tuple[int, ...], factor: float) -> int:
        """Where the pipeline keeps, by kind of layer, the devices and their nanoseconds for so many rows in so many passes,
        `factor` times what they usually are."""
        inline_ns = self.inline_ns(stages, rows)
        return self._pipeline.keep_jobs(
            [
                (worker.device, round(worker.times[index].ffn_ns(layer, passes) * factor) + inline_ns)
                for worker, index in self.legs[layer]
            ]
            for layer in self._firsts
        )

    def cross_ns(self, stages: ModelStages, rows: int) -> int:
        """How long rows are on their way, one way, beside what the devices do."""
        return 0 if self._inline else self.one_way_ns(stages, rows)

    def one_way_ns(self, stages: ModelStages, rows: int) -> int:
        """The parts' rows share the attention device's link, so the last of them is there after all of them."""
        if rows not in self._cross_ns:
            cost = crossing(stages.hardware, rows * self.row_bytes, self._lowered, self._same_node)
            self._cross_ns[rows] = round(cost.latency_s * 1e9)
        return self._cross_ns[rows]
