"""Searched placement, after AlpaServe (OSDI '23, section 4.2): enumerate how devices form groups, place greedily, keep the
best. It knows the true rates. Pure and deterministic.

For every way to cut the devices into groups: models are placed one at a time, the heaviest load first, each in the group
where the predicted score of everything placed is best; models in one group share its compute and its memory. Then replicas
are added, to the model that is served worst, as long as they help. Deviations: the score comes from a cost model rather than
a simulation (serving/cost, see predict.py); a group is tensor and data parallel over its devices as the model's KV heads
allow (no pipeline parallelism) and within a node; many devices are cut into groups of one size only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from baselines.static.layout import Seated, equal_groups, lay_out
from baselines.static.predict import Predictor, Score, kv_demand
from serving.errors import CapacityError, UserError
from serving.interface import Cluster, Device, ServedModel
from serving.memory.budget import format_bytes
from serving.options import EngineOptions
from serving.parallel.capacity import share_weights_bytes
from serving.parallel.group import GroupPlan, natural_group
from serving.parallel.host import Instance

_MOST_DEVICES_IN_ALL_PARTITIONS = 8


@dataclass(frozen=True)
class Found:
    """A placement with what is predicted of it, and by what weights each device's KV is divided."""

    seated: Seated
    kv_weight: Mapping[str, float] | None
    score: Score


class PlacementSearch:
    """Searches placements of `models` on `cluster`, scored by `predictor`."""

    def __init__(
        self, cluster: Cluster, models: Sequence[ServedModel], options: EngineOptions, predictor: Predictor
    ) -> None:
        self._cluster, self._models, self._options, self._predictor = cluster, models, options, predictor
        self._demand = kv_demand(models, predictor.loads)
        self._problem = (0, "")  # models placed before it, and what did not fit

    def run(self) -> Found:
        """The best placement found. Raises :class:`CapacityError`, saying what is missing, when no cut places all models."""
        best = self._equal()
        for groups in cuts(self._cluster.devices):
            found = self._place(groups)
            if found is not None and (best is None or found.score.key > best.score.key):
                best = found
        if best is None:
            self._raise_infeasible()
        return best

    def _equal(self) -> Found | None:
        """The naive placement, if it fits: what is searched must not be worse."""
        seated = equal_groups(self._cluster, self._models)
        try:
            return Found(seated, None, self._predictor.score(self._instances(seated, None)))
        except CapacityError:
            return None

    def _place(self, groups: Sequence[tuple[str, ...]]) -> Found | None:
        seated: list[tuple[ServedModel, GroupPlan]] = []
        found: Found | None = None
        for model in sorted(self._models, key=self._weight, reverse=True):
            found = self._best_of(seated, model, groups)
            if found is None:
                return None
            seated = list(found.seated)
        return self._with_replicas(found, groups)

    def _with_replicas(self, found: Found, groups: Sequence[tuple[str, ...]]) -> Found:
        """Add replicas of whichever model is served worst while that makes the whole better."""
        done: set[str] = set()
        while len(done) < len(self._models):
            served = self._predictor.served_by_model(self._instances(found.seated, found.kv_weight))
            left = [model for model in self._models if model.name not in done]
            model = min(left, key=lambda m: (round(served[m.name][0], 3), -served[m.name][1]))
            better = self._best_of(found.seated, model, groups)
            if better is not None and better.score.key > found.score.key:
                found = better
            else:
                done.add(model.name)
        return found

    def _best_of(self, seated: Seated, model: ServedModel, groups: Sequence[tuple[str, ...]]) -> Found | None:
        """The best of adding `model` to each group that does not serve it; KV divided by demand or equally, as is better."""
        best: Found | None = None
        taken = [group.devices for placed, group in seated if placed.name == model.name]
        for devices in groups:
            if devices in taken:
                continue
            try:
                candidate = [*seated, (model, natural_group(model.spec, devices))]
            except UserError:
                continue  # this model cannot be cut into so many shares
            for weight in (self._demand, None):
                try:
                    score = self._predictor.score(self._instances(candidate, weight))
                except CapacityError as error:
                    self._problem = max(self._problem, (len(seated), f"{model.name}: {error}"))
                    continue
                if best is None or score.key > best.score.key:
                    best = Found(candidate, weight, score)
        return best

    def _instances(self, seated: Seated, weight: Mapping[str, float] | None) -> list[Instance]:
        return lay_out(self._cluster, seated, self._options, weight)[1]

    def _weight(self, model: ServedModel) -> tuple[float, str]:
        return _whole_bytes(model), model.name

    def _raise_infeasible(self) -> None:
        have_bytes, want_bytes = self._cluster.memory_bytes, sum(map(_whole_bytes, self._models))
        if want_bytes > have_bytes:
            raise CapacityError(
                f"infeasible: weights of {len(self._models)} models need {format_bytes(want_bytes)}, the cluster has "
                f"{format_bytes(have_bytes)}; {want_bytes - have_bytes} bytes are missing before any KV"
            )
        placed, problem = self._problem
        raise CapacityError(
            f"infeasible: no placement of {len(self._models)} models on {len(self._cluster.devices)} devices; at best "
            f"{placed} fit, then {problem}"
        )


def _whole_bytes(model: ServedModel) -> int:
    return share_weights_bytes(model, GroupPlan(("any",)), 0)


def cuts(devices: Sequence[Device]) -> Iterator[list[tuple[str, ...]]]:
    """Ways to cut devices into groups, as names. Groups stay within a node, whose links they need; devices of most memory come
    first, so that groups are of alike devices. Of one node of few devices all partitions are tried, else groups of one size."""
    nodes: dict[int, list[str]] = {}
    for device in sorted(devices, key=lambda device: -device.memory_bytes):
        nodes.setdefault(device.node, []).append(device.name)
    if len(nodes) == 1 and len(devices) <= _MOST_DEVICES_IN_ALL_PARTITIONS:
        (names,) = nodes.values()
        yield from _partitions(names, len(names))
        return
    for size in range(1, max(map(len, nodes.values())) + 1):
        yield [tuple(names[first : first + size]) for names in nodes.values() for first in range(0, len(names), size)]


def _partitions(names: Sequence[str], most: int) -> Iterator[list[tuple[str, ...]]]:
    """All cuts of `names`, in order, into groups of descending sizes of at most `most`."""
    if not names:
        yield []
    for size in range(min(len(names), most), 0, -1):
        for others in _partitions(names[size:], size):
            yield [tuple(names[:size]), *others]
