"""What one in-flight batch has of its own on the cards: streams, the numbers of its step, the tokens that come back."""

from __future__ import annotations

import torch

from serving.cuda.layout import ROW_FIELDS, SEQUENCE_FIELDS

_FIELDS = ROW_FIELDS + SEQUENCE_FIELDS


class Lane:
    """Buffers for steps of up to `max_batch` sequences on `device`, and a stream there and on each of `ffn_devices`."""

    def __init__(self, device: torch.device, ffn_devices: set[torch.device], max_batch: int) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.ffn_streams = {other: torch.cuda.Stream(other) for other in ffn_devices}
        self.numbers_host = torch.zeros(_FIELDS * max_batch, dtype=torch.int64, pin_memory=True)
        self.numbers = torch.zeros(_FIELDS * max_batch, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.tokens_host = torch.zeros(max_batch, dtype=torch.int64, pin_memory=True)
        self.finished = torch.cuda.Event()
        self.pools = {stream: torch.cuda.graph_pool_handle() for stream in (self.stream, *self.ffn_streams.values())}
        self.wanted = 0  # tokens that the step under way gives

    def numbers_of(self, bucket: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first [5, bucket] of the buffers on the host and on the card."""
        return tuple(buffer[: _FIELDS * bucket].view(_FIELDS, bucket) for buffer in (self.numbers_host, self.numbers))

    def done(self) -> bool:
        return self.finished.query()

    def result(self) -> list[int]:
        """The tokens of the step that is done."""
        return self.tokens_host[: self.wanted].tolist()
