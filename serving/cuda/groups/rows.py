"""How the rows of ranks meet: one-shot exchanges between their cards, or each rank alone while it warms up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from kernels.exchange import Inbox, Outbox, exchange, symmetric
from serving.parallel.group import GroupPlan

End = tuple[Outbox, Inbox]
_PAIR = 2  # a logit and a token


class ExchangedRows:
    """One rank's ends of its group's exchanges; an exchange of one rank alone is None."""

    def __init__(self, heads: End | None, replicas: End | None, width: End | None, pairs: End | None, tp: int) -> None:
        self._heads, self._replicas, self._width, self._pairs = heads, replicas, width, pairs
        self._per_part = tp if replicas else 0

    @property
    def ends(self) -> list[End]:
        return [end for end in (self._heads, self._replicas, self._width, self._pairs) if end]

    def over_heads(self, partial: torch.Tensor) -> torch.Tensor:
        return exchange(*self._heads, partial, True) if self._heads else partial

    def of_all_replicas(self, rows: torch.Tensor) -> torch.Tensor:
        return exchange(*self._replicas, rows, False) if self._replicas else rows

    def over_width(self, partial: torch.Tensor) -> torch.Tensor:
        return exchange(*self._width, partial, True, self._per_part) if self._width else partial

    def of_all_heads(self, pairs: torch.Tensor) -> torch.Tensor:
        return exchange(*self._pairs, pairs, False) if self._pairs else pairs

    def compile(self, device: torch.device, width: int, replicas: int) -> None:
        """Run each exchange once on `device`, waiting for nobody: nothing may compile while a capture is under way, or while a
        kernel of another rank waits. What this leaves in the inboxes is for `forget` to clear."""
        with torch.cuda.device(device):
            for end, total, per_part, parts in (
                (self._heads, True, 0, 1),
                (self._replicas, False, 0, 1),
                (self._width, True, self._per_part, replicas),
                (self._pairs, False, 0, 1),
            ):
                if end:
                    columns = _PAIR if end is self._pairs else width
                    x = torch.zeros(parts, columns, dtype=end[1].slots.dtype, device=device)
                    exchange(*end, x, total, per_part, max_spins=0)
            torch.cuda.synchronize(device)

    def forget(self) -> None:
        """As before the first exchange. No rank may be in one."""
        for end in self.ends:
            for box in end:
                box.forget()

    def check(self) -> None:
        """Raise RuntimeError if this rank gave up waiting for another."""
        if any(int(inbox.error.item()) for _, inbox in self.ends):
            raise RuntimeError("a rank of a group gave up waiting for another")


def exchanged_rows(
    plan: GroupPlan, cards: Sequence[torch.device], max_rows: int, width: int, dtype: torch.dtype
) -> list[ExchangedRows]:
    """The exchanges of a group whose replicas have up to `max_rows` rows of `width`, by rank."""

    def among(groups: Iterator[Sequence[int]], elements: int, kind: torch.dtype) -> Callable[[int], End | None]:
        ends: dict[int, End] = {}
        for ranks in groups:
            if len(ranks) > 1:
                ends |= zip(ranks, symmetric([cards[rank] for rank in ranks], elements, kind), strict=True)
        return ends.get

    replicas = [plan.ranks_of(replica) for replica in range(plan.dp)]
    heads = among(iter(replicas), max_rows * width, dtype)
    columns = among((range(first, plan.ranks, plan.tp) for first in range(plan.tp)), max_rows * width, dtype)
    every = among(iter([range(plan.ranks)]), max_rows * width, dtype)
    pairs = among(iter(replicas), max_rows * _PAIR, torch.float32)
    return [ExchangedRows(heads(r), columns(r), every(r), pairs(r), plan.tp) for r in range(plan.ranks)]


class AloneRows:
    """Shapes as they are in a step, and nobody else's rows: for warming up."""

    def __init__(self, plan: GroupPlan) -> None:
        self._plan = plan

    def over_heads(self, partial: torch.Tensor) -> torch.Tensor:
        return partial

    def of_all_replicas(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.repeat(self._plan.dp, 1)

    def over_width(self, partial: torch.Tensor) -> torch.Tensor:
        return partial.chunk(self._plan.dp)[0]

    def of_all_heads(self, pairs: torch.Tensor) -> torch.Tensor:
        return pairs.repeat(self._plan.tp, 1)
