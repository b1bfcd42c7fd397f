"""What one in-flight batch has of its own on the cards: streams, the numbers of its step, the tokens that come back."""

from __future__ import annotations

import torch

from serving.cuda.layout import Shape


class Lane:
    """Buffers for steps of up to `max_batch` sequences of `shapes` on `device`, a stream there and on each of `ffn_devices`."""

    def __init__(
        self, device: torch.device, ffn_devices: set[torch.device], max_batch: int, shapes: list[Shape]
    ) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.ffn_streams = {other: torch.cuda.Stream(other) for other in ffn_devices}
        self.pools = {stream: torch.cuda.graph_pool_handle() for stream in (self.stream, *self.ffn_streams.values())}
        most, parts = max(shape.numbers for shape in shapes), max_batch + 1
        self.numbers_host = torch.zeros(parts, most, dtype=torch.int64, pin_memory=True)  # a row a part of the step
        self.numbers = torch.zeros(most, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(
            max_batch + 1, dtype=torch.int64, device=device
        )  # of a decode part; of a prefill part
        self.tokens_host = torch.zeros(2 * max_batch + 1, dtype=torch.int64, pin_memory=True)
        self._events = {stream: torch.cuda.Event() for stream in self.pools}
        self._last = [self._events[self.stream]]
        self.places: list[int] = []  # in tokens_host, of the tokens that the step under way gives

    def tokens_of(self, shape: Shape) -> torch.Tensor:
        """Where a part of `shape` leaves its tokens."""
        return self.tokens[-1:] if shape.prefill else self.tokens[: shape.rows]

    def mark(self, *streams: torch.cuda.Stream) -> None:
        """What has been launched on `streams` is now what the lane waits for."""
        self._last = [self._events[stream] for stream in streams]
        for event, stream in zip(self._last, streams, strict=True):
            event.record(stream)

    def done(self) -> bool:
        return all(event.query() for event in self._last)

    def result(self) -> list[int]:
        """The tokens of the step that is done."""
        tokens = self.tokens_host.tolist()
        return [tokens[place] for place in self.places]
