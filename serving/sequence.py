"""A live request on its device: its tokens, how many of them are in the KV cache, and the run they lie in."""

from __future__ import annotations

from dataclasses import dataclass

from serving.memory.kv_pool import Run


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` is the prompt followed by what was generated; the first `cached` of them are in the KV cache."""

    request_id: int
    model: int  # index within its device
    tokens: list[int]
    prompt_tokens: int
    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    run: Run | None = None  # None on the simulated backend, which counts pages and holds none
    cached: int = 0
    in_flight: int = 0  # steps under way that compute it
    rows_in_flight: int = 0  # tokens that those steps compute
    since_ns: int = 0  # when it was submitted, where that is known
    cancelled: bool = False  # nobody waits for it: it ends with its next token

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet: the rest of the prompt, then one at a time."""
        return len(self.tokens) - self.cached

    @property
    def unscheduled(self) -> int:
        """Of the pending tokens, those that no step under way computes."""
        return len(self.tokens) - self.cached - self.rows_in_flight

    @property
    def most_cached(self) -> int:
        """Tokens whose KV will ever be stored; the last generated one's is not."""
        return self.prompt_tokens + self.max_new_tokens - 1

    def append(self, token: int) -> bool:
        """Take a generated token; whether it was the last."""
        self.tokens.append(token)
        enough = self.cancelled or len(self.tokens) - self.prompt_tokens == self.max_new_tokens
        return enough or token in self.stop_ids
