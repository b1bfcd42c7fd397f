"""The sequences of a device and what each step does to them. Pure state: both backends run this same object.

`next_step` picks a model and composes its step, `complete` takes the step's tokens. Between the two the step's sequences are
in flight and no other step touches them, so any number of steps may be under way at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from serving.batching import StepLimits, compose_step, least_recently_served
from serving.pairing import StageProfile, best_partner
from serving.sequence import Sequence

Profiles = tuple[StageProfile, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of one model: its sequences and how many rows each contributes."""

    model: int
    items: tuple[tuple[Sequence, int], ...]

    @property
    def query_lens(self) -> tuple[int, ...]:
        return tuple(rows for _, rows in self.items)

    @property
    def kv_lens(self) -> tuple[int, ...]:
        """Tokens in each sequence's cache once the step has written its rows. Valid until the step completes."""
        return tuple(sequence.cached + rows for sequence, rows in self.items)

    @property
    def token_ids(self) -> list[int]:
        return [
            token
            for sequence, rows in self.items
            for token in sequence.tokens[sequence.cached : sequence.cached + rows]
        ]

    @property
    def logit_rows(self) -> tuple[int, ...]:
        """The last row of every sequence that has no more prompt to compute: those get a new token."""
        wanted, end = [], 0
        for sequence, rows in self.items:
            end += rows
            if rows == sequence.pending:
                wanted.append(end - 1)
        return tuple(wanted)


class StepScheduler:
    """Continuous batching over `num_models` models that share a device."""

    def __init__(self, num_models: int, limits: StepLimits, profiles: Profiles = ()) -> None:
        """With `profiles`, one a model, the next model is the best partner of those in flight; else turns are fair."""
        self._profiles = profiles
        self._limits = limits
        self._sequences: list[list[Sequence]] = [[] for _ in range(num_models)]  # in order of admission
        self._in_flight = [0] * num_models
        self._served_at: dict[int, int] = {}
        self._steps = 0

    @property
    def live(self) -> int:
        """Sequences that have not ended."""
        return sum(map(len, self._sequences))

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence.model].append(sequence)

    def holds(self, sequence: Sequence) -> bool:
        return sequence in self._sequences[sequence.model]

    def sequences(self, model: int) -> tuple[Sequence, ...]:
        """The sequences of `model` that have not ended, in order of admission."""
        return tuple(self._sequences[model])

    def next_step(self, may_step: Callable[[Sequence], bool] | None = None) -> StepPlan | None:
        """The next step, of sequences that `may_step` where that is given, marked in flight; None when nothing is ready."""
        ready = [
            model
            for model, sequences in enumerate(self._sequences)
            if len(sequences) > self._in_flight[model]
            and (may_step is None or any(may_step(one) for one in sequences if not one.in_flight))
        ]
        if not ready:
            return None
        if self._profiles:
            in_flight = [index for index, count in enumerate(self._in_flight) if count]
            model = best_partner(ready, self._served_at, in_flight, self._profiles)
        else:
            model = least_recently_served(ready, self._served_at)
        self._steps += 1
        self._served_at[model] = self._steps
        waiting = [
            sequence
            for sequence in self._sequences[model]
            if not sequence.in_flight and (may_step is None or may_step(sequence))
        ]
        chosen = compose_step([sequence.pending for sequence in waiting], self._limits)
        items = tuple((waiting[index], rows) for index, rows in chosen)
        for sequence, _ in items:
            sequence.in_flight = True
        self._in_flight[model] += len(items)
        return StepPlan(model, items)

    def complete(self, plan: StepPlan, sampled: Iterator[int]) -> list[tuple[Sequence, int, bool]]:
        """Take the step's new tokens, one for each logit row: (sequence, token, whether it ended the sequence)."""
        self._in_flight[plan.model] -= len(plan.items)
        produced = []
        for sequence, rows in plan.items:
            sequence.in_flight = False
            complete = rows == sequence.pending
            sequence.cached += rows
            if complete:
                token = next(sampled)
                last = sequence.append(token)
                produced.append((sequence, token, last))
                if last:
                    self._sequences[plan.model].remove(sequence)
        return produced
