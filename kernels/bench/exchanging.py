"""What rows between several cards cost: a sum over all of them, and a question to several whose answers are added up.

CUDA only, cards that reach each other's memory. Spins are bounded, so a failure ends in an error code within seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from kernels.bench.measure import capture
from kernels.exchange import Inbox, Outbox, collect, exchange, post, symmetric

MAX_SPINS = 500_000  # some tenths of a second
ROUNDS = 50


def sum_seconds(rows: int, width: int, cards: Sequence[torch.device], dtype: torch.dtype) -> float:
    """One sum of `rows` rows that every one of `cards` has: they are on all when it ends. Raises RuntimeError if a card gave up
    or a sum is wrong."""
    ends = symmetric(cards, rows * width, dtype)
    sent = [torch.randn(rows, width, device=card).to(dtype) for card in cards]
    results = list(sent)

    def side(number: int) -> Callable[[], None]:
        def add_up() -> None:
            results[number] = exchange(*ends[number], sent[number], True, 0, MAX_SPINS)

        return add_up

    for number, card in enumerate(cards):  # compiles and loads while nobody waits
        with torch.cuda.device(card):
            exchange(*ends[number], sent[number], True, 0, 0)
            torch.cuda.synchronize(card)
    for outbox, inbox in ends:
        _reset([outbox], [inbox])
    seconds = _rounds([side(number) for number in range(len(cards))], cards)
    expected = torch.stack([x.cpu() for x in sent]).float().sum(0).to(dtype)
    _check([inbox for _, inbox in ends], all(torch.equal(result.cpu(), expected) for result in results))
    return seconds


def question_seconds(
    rows: int, width: int, asking: torch.device, answering: Sequence[torch.device], dtype: torch.dtype
) -> float:
    """One question of `rows` rows from `asking` to all of `answering` at once, and the sum of what they give back, which is what
    they were asked. Raises RuntimeError as :func:`sum_seconds`."""
    elements = rows * width
    asked = [Inbox.allocate(1, elements, dtype, card) for card in answering]
    answered = Inbox.allocate(len(answering), elements, dtype, asking)
    ask = Outbox.into(asked, [0] * len(asked), asking)
    answers = [Outbox.into([answered], [place], card) for place, card in enumerate(answering)]
    x = torch.randn(rows, width, device=asking).to(dtype)
    results = []

    def question() -> None:
        results.append(exchange(ask, answered, x, True, 0, MAX_SPINS))

    def answer(place: int) -> Callable[[], None]:
        return lambda: post(answers[place], collect(asked[place], rows, width, False, MAX_SPINS))

    with torch.cuda.device(asking):
        exchange(ask, answered, x, True, 0, 0)
        torch.cuda.synchronize(asking)
    for place, card in enumerate(answering):
        with torch.cuda.device(card):
            answer(place)()
            torch.cuda.synchronize(card)
    _reset([ask, *answers], [answered, *asked])
    seconds = _rounds([question, *(answer(place) for place in range(len(answering)))], [asking, *answering])
    expected = (len(answering) * x.cpu().float()).to(dtype)
    _check([answered, *asked], torch.equal(results[-1].cpu(), expected))
    return seconds


def _reset(outboxes: Sequence[Outbox], inboxes: Sequence[Inbox]) -> None:
    for box, held in (*((outbox, outbox.sent) for outbox in outboxes), *((inbox, inbox.slots) for inbox in inboxes)):
        box.forget()
        torch.cuda.synchronize(held.device)


def _rounds(sides: Sequence[Callable[[], None]], cards: Sequence[torch.device]) -> float:
    """Median seconds of a round in which each side does its part, control lowered into graphs."""
    graphs = [capture([side] * ROUNDS, card) for side, card in zip(sides, cards, strict=True)]
    streams = [torch.cuda.Stream(card) for card in cards]
    times = []
    for _ in range(5):
        for card in cards:
            torch.cuda.synchronize(card)
        start = time.perf_counter()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        for card in cards:
            torch.cuda.synchronize(card)
        times.append((time.perf_counter() - start) / ROUNDS)
    return sorted(times)[len(times) // 2]


def _check(inboxes: Sequence[Inbox], right: bool) -> None:
    if any(int(inbox.error.item()) for inbox in inboxes):
        raise RuntimeError("a wait gave up: the cards did not run at once")
    if not right:
        raise RuntimeError("the rows that came are not those that were sent")
