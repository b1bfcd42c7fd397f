"""Elastic multiplexing with placement (Prism, arXiv 2505.04021): engines side by side as in `elastic`, on the devices where KV
is least scarce, behind one queue a device that is ordered by deadline, with weights that leave when nobody asks for them.

Placement (pressure.py) is decided once, from the rates and lengths that the planner is told. The queue (deadlines.py) holds
requests of all models of a device and lets a few prompts through at once; once in, engines are as uncoordinated as ever. Weights of a model that had no request for
`idle_evict_s` give their bytes to KV of the others, and are copied back from host memory when a request comes (serving/idle.py),
on a card from pinned memory, its first layers running while later ones come: all models of a device fit it together, so that
nothing waits for room for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

from baselines.multiplex.deadlines import DeadlineQueue
from baselines.multiplex.layout import Seated, WeightsBytes
from baselines.multiplex.options import PlacementOptions
from baselines.multiplex.pressure import Pressing, place
from baselines.multiplex.system import Elastic, geometries_of
from serving.admission import AdmissionQueue
from serving.errors import UserError
from serving.interface import Cluster, Demand, Placement, ServedModel
from serving.memory.host import require_available
from serving.memory.kv_pool import KVGeometry
from serving.parallel.capacity import share_workspace_bytes
from serving.parallel.group import GroupPlan
from serving.residency.image import placed_bytes
from serving.workers.messages import Tokens

__all__ = ["ElasticPlacement", "PlacementOptions"]


class ElasticPlacement(Elastic):
    """Engines side by side where KV is least pressed, one queue a device."""

    name = "elastic-placement"
    options: PlacementOptions

    def __init__(self, options: PlacementOptions | None = None) -> None:
        super().__init__(options or PlacementOptions())
        self._without_token: dict[int, str] = {}  # requests that have no token yet, and their model

    def _place(self, cluster: Cluster, models: Sequence[ServedModel], demand: Demand) -> Seated:
        """Each whole, by KV pressure."""
        unknown = set(self.options.slo_scales) - {model.name for model in models}
        if unknown:
            raise UserError(
                f"option slo_scales names {', '.join(sorted(unknown))}; served: {', '.join(m.name for m in models)}"
            )
        weights_bytes = self._weights_bytes_on(cluster)
        kind = cluster.devices[0].kind
        pressing = [self._pressing(model, demand, weights_bytes, kind) for model in models]
        placed = place(pressing, {device.name: device.memory_bytes for device in cluster.devices})
        return [(model, GroupPlan((placed[model.name],))) for model in models]

    def _pressing(self, model: ServedModel, demand: Demand, weights_bytes: WeightsBytes, kind: str) -> Pressing:
        geometry, page_bytes = KVGeometry.of(model.spec, model.dtype), self.options.page_bytes
        lengths = demand.lengths.get(model.name) or [(0, 1)]
        tokens = sum(prompt + output for prompt, output in lengths) / len(lengths)
        rate_rps = demand.rate_rps.get(model.name, 0.0) if demand.rate_rps else 1.0
        slo_s = self.options.tpot_slo_ms / 1e3 * self._slo_scale(model.name)
        return Pressing(
            model.name,
            weights_bytes(model, GroupPlan(("any",)), 0)
            + share_workspace_bytes(model, GroupPlan(("any",)), 0, self.options.limits, kind),
            geometry.pages(1, page_bytes) * page_bytes,
            rate_rps * tokens * geometry.num_layers * geometry.token_bytes / slo_s,
        )

    def _weights_bytes_on(self, cluster: Cluster) -> WeightsBytes:
        """Whole pages, where weights are to leave."""
        if not self._evict_idle_s:
            return super()._weights_bytes_on(cluster)
        kind, page_bytes = cluster.devices[0].kind, self.options.page_bytes
        return lambda model, group, rank: placed_bytes(model, kind, page_bytes)

    def _launch(self, placement: Placement) -> None:
        if self._evict_idle_s and self._backend.name == "real":
            copies_bytes = sum(sum(plan.weights_bytes.values()) for plan in placement.devices)
            require_available("the copies that weights come back from (idle_evict_s 0 makes none)", copies_bytes)
        super()._launch(placement)

    @property
    def _evict_idle_s(self) -> float:
        return self.options.idle_evict_s

    def _slo_scale(self, model: str) -> float:
        return self.options.slo_scales.get(model, 1.0)

    def _admission(self, placement: Placement) -> dict[str, AdmissionQueue | str]:
        rule = "cap" if self.options.admission == "cap" else "open"
        return {
            plan.device.name: DeadlineQueue(
                self._common_limits(plan, rule),
                geometries_of(placement),
                lambda model: self.options.ttft_slo_ms / 1e3 * self._slo_scale(model),
                self.options.prompts_at_once,
            )
            for plan in placement.devices
        }

    def _dispatch(self, request_id: int) -> None:
        super()._dispatch(request_id)
        self._without_token[request_id] = self._live[request_id].request.model

    def _take_tokens(self, message: Tokens) -> bool:
        first = False
        for request_id, _, _ in message.items:
            model = self._without_token.pop(request_id, None)
            if model is not None:
                self._live[request_id].pool.queue.first_token(request_id, model, message.time_ns / 1e9)
                first = True
        return super()._take_tokens(message) or first

    def stop(self) -> None:
        super().stop()
        self._without_token.clear()
