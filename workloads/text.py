"""Text data sets through the `datasets` library: prompts as text, counted in tokens by each model's own tokenizer.

ShareGPT rows have `conversations` of {from, value}: each human turn with the answer after it is a (prompt, answer) pair, the
first pair of a conversation is used, as by vLLM's benchmark. LongAlign rows have `messages` of {role, content}.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workloads.config import Lengths, Source
from workloads.errors import WorkloadError
from workloads.lengths import Drawn, resample
from workloads.prompts import Ragged

if TYPE_CHECKING:
    from workloads.columnar import ModelLimits

_KEYS = {  # of a turn: who speaks, what is said; of a row: where its turns are; the names of the two sides
    "sharegpt": ("conversations", "from", "value", ("human", "user"), ("gpt", "assistant", "chatgpt", "bing", "bard")),
    "longalign": ("messages", "role", "content", ("user",), ("assistant",)),
}
_BATCH = 256


class TextRows:
    """Pairs of prompt and answer as text [R], and their lengths in the tokens of any tokenizer."""

    def __init__(self, source: Source, prompts: list[str], answers: list[str], identity: dict[str, Any]) -> None:
        self._source = source
        self.prompts, self.answers, self.identity = prompts, answers, identity
        self._counts: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def counts(self, tokenizer: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of prompts and answers [R] int64, counted once a tokenizer."""
        if tokenizer not in self._counts:
            self._counts[tokenizer] = (_token_counts(tokenizer, self.prompts), _token_counts(tokenizer, self.answers))
        return self._counts[tokenizer]

    def resample(
        self, lengths: Lengths, models: Sequence[ModelLimits], model: np.ndarray, rng: np.random.Generator
    ) -> Drawn:
        """Pairs drawn with replacement, by the model that each request asks: context bins and lengths are in that model's
        tokens. Where all models count alike, the rows do not depend on who is asked."""
        prompt, output = np.zeros(len(model), dtype=np.int32), np.zeros(len(model), dtype=np.int32)
        rows = np.zeros(len(model), dtype=np.int64)
        tokenizers = [self._tokenizer_of(limits) for limits in models]
        uniform = rng.random(len(model))
        for tokenizer in dict.fromkeys(tokenizers):
            asked = np.flatnonzero(np.isin(model, [i for i, name in enumerate(tokenizers) if name == tokenizer]))
            drawn = resample(lengths, *self.counts(tokenizer), uniform[asked])
            prompt[asked], output[asked], rows[asked] = drawn.prompt, drawn.output, drawn.rows
        return Drawn(prompt, output, {}, rows)

    def prompt_ids(
        self, rows: np.ndarray, models: Sequence[ModelLimits], model: np.ndarray, prompt_tokens: np.ndarray
    ) -> Ragged:
        """Token ids of each request's prompt, cut to `prompt_tokens` where a context clipped it."""
        tokenizers = [self._tokenizer_of(limits) for limits in models]
        ids: dict[tuple[str, int], list[int]] = {}
        parts = []
        for row, index, count in zip(rows.tolist(), model.tolist(), prompt_tokens.tolist(), strict=True):
            key = (tokenizers[index], row)
            if key not in ids:
                ids[key] = _tokenizer(key[0])(self.prompts[row], add_special_tokens=False)["input_ids"]
            if ids[key] and max(ids[key]) >= models[index].vocab_size:
                raise WorkloadError(
                    f"model {models[index].name}: tokenizer {key[0]} gives id {max(ids[key])}, past its vocabulary of "
                    f"{models[index].vocab_size}"
                )
            parts.append(np.array(ids[key][:count], dtype=np.int32))
        offsets = np.concatenate(([0], np.cumsum([len(part) for part in parts]))).astype(np.int64)
        return Ragged(offsets, np.concatenate(parts) if parts else np.empty(0, dtype=np.int32))

    def _tokenizer_of(self, limits: ModelLimits) -> str:
        name = limits.tokenizer or self._source.tokenizer
        if not name:
            raise WorkloadError(
                f"model {limits.name}: no tokenizer to count the tokens of {self._source.path} with; "
                "give workload.source.tokenizer"
            )
        return name


def load_texts(source: Source, path: Path | None) -> TextRows:
    """The pairs of a local JSON file, or of a data set on the hub when there is no such file. Raises WorkloadError."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if path is not None:
            table = datasets.load_dataset("json", data_files=str(path), split="train")
        else:
            table = datasets.load_dataset(source.path, split=source.split)
    except Exception as error:  # noqa: BLE001  the library raises its own, pyarrow's, pandas' and the network's
        where = str(path) if path is not None else f"data set {source.path} (no such file either)"
        raise WorkloadError(f"{where}: cannot be loaded ({str(error).splitlines()[0][:160]})") from None
    name = str(path or source.path)
    prompts, answers, dropped = _pairs(source, table, name)
    if not prompts:
        raise WorkloadError(f"{name}: no row has a {source.format} prompt and answer")
    state = hashlib.sha256()
    for text in (*prompts, *answers):
        state.update(text.encode("utf-8", "surrogatepass") + b"\0")
    identity = {"file": Path(name).name if path else name, "sha256_of_text": state.hexdigest(), "format": source.format}
    return TextRows(source, prompts, answers, identity | {"rows": len(prompts), "dropped_rows": dropped})


def _pairs(source: Source, table: Any, name: str) -> tuple[list[str], list[str], int]:
    turns_key, who, said, askers, answerers = _KEYS[source.format]
    if turns_key not in table.column_names:
        raise WorkloadError(
            f"{name}: no column {turns_key}, which {source.format} has; columns: {', '.join(table.column_names)}"
        )
    prompts, answers, dropped = [], [], 0
    for number, turns in enumerate(table[turns_key], 1):
        try:
            pair = _first_pair([(turn[who], turn[said]) for turn in turns or ()], askers, answerers)
        except (KeyError, TypeError):
            raise WorkloadError(f"{name}: row {number}: {turns_key} must be a list of {{{who}, {said}}}") from None
        if pair is None:
            dropped += 1
            continue
        prompts.append(pair[0])
        answers.append(pair[1])
        if source.max_rows and len(prompts) == source.max_rows:
            break
    return prompts, answers, dropped


def _first_pair(
    turns: list[tuple[str, str]], askers: tuple[str, ...], answerers: tuple[str, ...]
) -> tuple[str, str] | None:
    for (speaker, prompt), (next_speaker, answer) in itertools.pairwise(turns):
        if speaker in askers and next_speaker in answerers and prompt and answer:
            return prompt, answer
    return None


@cache
def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # noqa: BLE001  transformers raises many kinds, with long messages
        raise WorkloadError(f"tokenizer {name}: cannot be loaded ({str(error).splitlines()[0][:160]})") from None


def _token_counts(name: str, texts: list[str]) -> np.ndarray:
    tokenizer = _tokenizer(name)
    counts: list[int] = []
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(texts[start : start + _BATCH], add_special_tokens=False, verbose=False)
        counts += [len(ids) for ids in batch["input_ids"]]
    return np.array(counts, dtype=np.int64)
