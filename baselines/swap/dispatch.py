"""Which device takes a request where every device may serve every model. Pure.

ServerlessLLM sends a request where its model is, unless waiting there would take longer than loading it elsewhere. Both are
counted in bytes that must move: a token of backlog reads a model's active weights, a load copies its image.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from serving.interface import ServedModel
from serving.spec import element_bytes


class Believed:
    """What a dispatcher thinks is resident on a device of `arena_bytes`: the models that it last sent requests for."""

    def __init__(self, arena_bytes: int, image_bytes: Mapping[str, int], resident: Sequence[str]) -> None:
        self._arena_bytes, self._image_bytes = arena_bytes, image_bytes
        self._order: OrderedDict[str, None] = OrderedDict.fromkeys(reversed(resident))  # the last used last

    def __contains__(self, model: str) -> bool:
        return model in self._order

    def use(self, model: str) -> None:
        """A request of `model` goes there."""
        self._order[model] = None
        self._order.move_to_end(model)
        while len(self._order) > 1 and sum(map(self._image_bytes.__getitem__, self._order)) > self._arena_bytes:
            self._order.popitem(last=False)


def choose(backlog_bytes: Sequence[float], there: Sequence[bool], load_bytes: float) -> int:
    """The device with the least to move before the request is served, ties to where its model is, then to the first."""
    costs = [
        backlog + (0.0 if resident else load_bytes) for backlog, resident in zip(backlog_bytes, there, strict=True)
    ]
    return min(range(len(costs)), key=lambda index: (costs[index], not there[index], index))


def token_bytes(model: ServedModel) -> int:
    """Weights that one token reads: attention, head, and the experts it is routed to."""
    spec = model.spec
    resting = sum(not spec.is_dense(layer) for layer in range(spec.num_layers)) * (
        (spec.moe.num_experts - spec.moe.top_k) * spec.expert_elements
    )
    return (spec.total_elements - resting) * element_bytes(model.dtype)
