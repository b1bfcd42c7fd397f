"""What one in-flight batch has of its own on the cards: streams, the numbers of its step, the tokens that come back."""

from __future__ import annotations

import torch

from serving.part_shapes import Shape


class Lane:
    """Buffers for steps of up to `max_batch` sequences of `shapes` on `device`, a stream there and on each of `ffn_devices`."""

    def __init__(
        self, device: torch.device, ffn_devices: set[torch.device], max_batch: int, shapes: list[Shape]
    ) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.ffn_streams = {other: torch.cuda.Stream(other) for other in ffn_devices}
        self.pools = {stream: torch.cuda.graph_pool_handle() for stream in (self.stream, *self.ffn_streams.values())}
        numbers, tokens = (
            max(each) for each in zip(*((shape.numbers, shape.sequences) for shape in shapes), strict=True)
        )
        self.numbers_host = torch.zeros(
            max_batch, numbers, dtype=torch.int64, pin_memory=True
        )  # a row a part of the step
        self.numbers = torch.zeros(numbers, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._tokens_host = torch.zeros(max_batch, tokens, dtype=torch.int64, pin_memory=True)
        self._events = {stream: torch.cuda.Event() for stream in self.pools}
        self._last = [self._events[self.stream]]
        self._wanted: list[tuple[int, int]] = []  # part and sequence of each token that the step under way gives

    def tokens_of(self, shape: Shape) -> torch.Tensor:
        """Where a part of `shape` leaves its tokens, one a sequence."""
        return self._tokens[: shape.sequences]

    def begin(self) -> None:
        """A new step: none of its tokens is wanted so far."""
        self._wanted = []

    def bring_numbers(self, part: int, shape: Shape) -> None:
        """Have the numbers of part number `part`, which are written, come to the card before what the stream is given next."""
        with torch.cuda.stream(self.stream):
            self.numbers[: shape.numbers].copy_(self.numbers_host[part, : shape.numbers], non_blocking=True)

    def bring_tokens(self, part: int, shape: Shape, wanted: list[int]) -> None:
        """Have the tokens of those sequences of part number `part`, launched last, come to the host; after those of earlier parts."""
        if wanted:
            with torch.cuda.stream(self.stream):
                self._tokens_host[part, : shape.sequences].copy_(self.tokens_of(shape), non_blocking=True)
            self._wanted.extend((part, sequence) for sequence in wanted)

    def mark(self, *streams: torch.cuda.Stream) -> None:
        """What has been launched on `streams` is now what the lane waits for."""
        self._last = [self._events[stream] for stream in streams]
        for event, stream in zip(self._last, streams, strict=True):
            event.record(stream)

    def done(self) -> bool:
        return all(event.query() for event in self._last)

    def result(self) -> list[int]:
        """The tokens of the step that is done."""
        tokens = self._tokens_host.tolist()
        return [tokens[part][sequence] for part, sequence in self._wanted]
