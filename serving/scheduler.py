"""The sequences of a device and what each step does to them. Pure state: both backends run this same object.

`next_step` picks a model and composes its step, `complete` takes the step's tokens. Between the two the step's sequences are
in flight, and no other step touches them but for later chunks of the same prompt, where those may be under way beside earlier
ones. Any number of steps may be under way at once.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from serving.batching import StepLimits, compose_step, least_recently_served
from serving.pairing import StageProfile, best_partner
from serving.sequence import Sequence

Profiles = tuple[StageProfile, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of one model: its sequences, how many rows each contributes, and from which token on."""

    model: int
    items: tuple[tuple[Sequence, int], ...]
    starts: tuple[int, ...]

    @classmethod
    def following(cls, model: int, items: tuple[tuple[Sequence, int], ...]) -> StepPlan:
        """The step of `items` that goes on where their cache, and the steps under way, end."""
        return cls(model, items, tuple([sequence.cached + sequence.rows_in_flight for sequence, _ in items]))

    @property
    def query_lens(self) -> tuple[int, ...]:
        return tuple([rows for _, rows in self.items])

    @property
    def kv_lens(self) -> tuple[int, ...]:
        """Tokens in each sequence's cache once the step has written its rows."""
        return tuple([start + rows for (_, rows), start in zip(self.items, self.starts, strict=True)])

    @property
    def token_ids(self) -> list[int]:
        return [
            token
            for (sequence, rows), start in zip(self.items, self.starts, strict=True)
            for token in sequence.tokens[start : start + rows]
        ]

    @property
    def logit_rows(self) -> tuple[int, ...]:
        """The last row of every sequence that has no more prompt to compute: those get a new token."""
        wanted, end = [], 0
        for (sequence, rows), start in zip(self.items, self.starts, strict=True):
            end += rows
            if start + rows == len(sequence.tokens):
                wanted.append(end - 1)
        return tuple(wanted)


class StepScheduler:
    """Continuous batching over `num_models` models that share a device."""

    def __init__(
        self,
        num_models: int,
        limits: StepLimits,
        profiles: Profiles = (),
        prefill_first: bool = False,
        chunks_in_flight: int = 1,
    ) -> None:
        """With `profiles`, one a model, the next model is the best partner of those in flight; else turns are fair, among
        those with prompts to compute first where `prefill_first`. At most `chunks_in_flight` steps compute chunks of one
        prompt at the same time; more than one want steps that never overtake each other within a layer."""
        self._prefill_first = prefill_first
        self._profiles = profiles
        self._limits = limits
        self._chunks_in_flight = chunks_in_flight
        self._sequences: list[list[Sequence]] = [[] for _ in range(num_models)]  # in order of admission
        self._occupied: list[int] = []  # models that have any, ascending
        self._taken = [0] * num_models  # sequences that no further step can have now
        self._under_way = [0] * num_models  # steps
        self._served_at: dict[int, int] = {}
        self._steps = 0

    @property
    def live(self) -> int:
        """Sequences that have not ended."""
        return sum(len(self._sequences[model]) for model in self._occupied)

    def add(self, sequence: Sequence) -> None:
        if not self._sequences[sequence.model]:
            insort(self._occupied, sequence.model)
        self._sequences[sequence.model].append(sequence)

    def holds(self, sequence: Sequence) -> bool:
        return sequence in self._sequences[sequence.model]

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence that no step has had or has."""
        self._remove(sequence)

    def cancel(self, request_id: int, model: int) -> bool:
        """Let a request end with its next token; False where it is not here (any more). Steps under way finish, so that
        whoever holds its pages frees them as at any other end."""
        for sequence in self._sequences[model]:
            if sequence.request_id == request_id:
                sequence.cancelled = True
                return True
        return False

    def sequences(self, model: int) -> tuple[Sequence, ...]:
        """The sequences of `model` that have not ended, in order of admission."""
        return tuple(self._sequences[model])

    def next_step(self, may_step: Callable[[Sequence], bool] | None = None) -> StepPlan | None:
        """The next step, of sequences that `may_step` where that is given, marked in flight; None when nothing is ready."""
        sequences, taken = self._sequences, self._taken
        most, under_way = self._limits.lanes_of_model or math.inf, self._under_way
        ready = [m for m in self._occupied if len(sequences[m]) > taken[m] and under_way[m] < most]
        if may_step is not None:
            ready = [m for m in ready if any(may_step(one) for one in sequences[m] if self._available(one))]
        if not ready:
            return None
        if self._prefill_first:
            ready = [model for model in ready if self._has_prompt(model, may_step)] or ready
        if self._profiles:
            in_flight = [index for index, count in enumerate(self._under_way) if count]
            model = best_partner(ready, self._served_at, in_flight, self._profiles)
        else:
            model = least_recently_served(ready, self._served_at)
        self._steps += 1
        self._served_at[model] = self._steps
        waiting = [
            sequence
            for sequence in self._sequences[model]
            if self._available(sequence) and (may_step is None or may_step(sequence))
        ]
        chosen = compose_step([sequence.unscheduled for sequence in waiting], self._limits)
        self._under_way[model] += 1
        plan = StepPlan.following(model, tuple([(waiting[index], rows) for index, rows in chosen]))
        for sequence, rows in plan.items:
            sequence.in_flight += 1
            sequence.rows_in_flight += rows
            self._taken[model] += not self._available(sequence)
        return plan

    def _available(self, sequence: Sequence) -> bool:
        """Whether a step may have it: none has, or those that have left prompt to another."""
        return not sequence.in_flight or 0 < sequence.unscheduled and sequence.in_flight < self._chunks_in_flight

    def _has_prompt(self, model: int, may_step: Callable[[Sequence], bool] | None) -> bool:
        return any(
            one.unscheduled > 1 and self._available(one) and (may_step is None or may_step(one))
            for one in self._sequences[model]
        )

    def complete(self, plan: StepPlan, sampled: Iterator[int]) -> list[tuple[Sequence, int, bool]]:
        """Take the step's new tokens, one for each logit row: (sequence, token, whether it ended the sequence)."""
        self._under_way[plan.model] -= 1
        produced = []
        for (sequence, rows), start in zip(plan.items, plan.starts, strict=True):
            self._taken[plan.model] -= not self._available(sequence)
            sequence.in_flight -= 1
            sequence.rows_in_flight -= rows
            sequence.cached += rows
            complete = start + rows == len(sequence.tokens)
            if complete:
                token = next(sampled)
                last = sequence.append(token)
                produced.append((sequence, token, last))
                if last:
                    self._remove(sequence)
                    continue
            self._taken[plan.model] += not self._available(sequence)
        return produced

    def _remove(self, sequence: Sequence) -> None:
        self._sequences[sequence.model].remove(sequence)
        if not self._sequences[sequence.model]:
            self._occupied.remove(sequence.model)

    # -- steps that repeat ---------------------------------------------------------------------------------------------
    def repeats(self, plan: StepPlan) -> int:
        """How often the step `plan`, under way, is sure to be followed by the same one token on, if nothing is added or
        cancelled: it decodes all sequences there are, each past its first token, and so many times none of them ends."""
        if len(plan.items) != self.live or self._chunks_in_flight > 1:
            return 0
        left = []
        for (sequence, rows), start in zip(plan.items, plan.starts, strict=True):
            generated = len(sequence.tokens) - sequence.prompt_tokens
            decodes = rows == 1 and start + 1 == len(sequence.tokens) and generated > 0
            if not decodes or sequence.stop_ids or sequence.cancelled:
                return 0
            left.append(sequence.max_new_tokens - generated)
        return min(left) - 1

    def repeat(self, plan: StepPlan, times: int, token: int) -> StepPlan:
        """The step `plan` and those that followed it are complete, `times` in all, each with `token` for every sequence, and
        the next is under way: its plan. For as many times as `repeats` said."""
        if not times:
            return plan
        for sequence, _ in plan.items:
            sequence.tokens += [token] * times
            sequence.cached += times
        self._steps += times
        self._served_at[plan.model] = self._steps
        return StepPlan(plan.model, plan.items, tuple(start + times for start in plan.starts))
