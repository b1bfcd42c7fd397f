"""Where the real traces lie, and short cuts to a trace."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workloads.columnar import ModelLimits, Trace
from workloads.config import workload_from_dict
from workloads.generate import build_trace


@pytest.fixture(scope="session")
def traces_directory() -> Path:
    """The directory of the real traces: WORKLOAD_TRACES, or ../shared/traces beside the repository."""
    repository = Path(__file__).resolve().parents[2]
    directory = Path(os.environ.get("WORKLOAD_TRACES") or repository.parent / "shared" / "traces")
    if not directory.is_dir():
        pytest.skip("no real traces: WORKLOAD_TRACES is not set and ../shared/traces is not there")
    return directory


@pytest.fixture(scope="session")
def make() -> Callable[..., Trace]:
    """make(models, context=..., **workload): the trace of a workload given as a dict."""

    def built(models: int = 4, context: int = 1 << 18, vocabulary: int = 1000, **content: Any) -> Trace:
        limits = [ModelLimits(f"m{number}", vocabulary, context) for number in range(models)]
        return build_trace(workload_from_dict(content), limits)

    return built


@pytest.fixture(scope="session")
def text_models(tmp_path_factory) -> list[ModelLimits]:
    """Two models whose tokenizers differ: one counts words, one counts letters."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    models = []
    for name, by_letter in (("words", False), ("letters", True)):
        tokens = "abcdefghij" if by_letter else ["ab", "cd", "ef", "gh", "ij"]
        tokenizer = Tokenizer(WordLevel({"?": 0, **{token: index + 1 for index, token in enumerate(tokens)}}, "?"))
        letters = [Split(Regex("."), "isolated")] if by_letter else []
        tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), *letters])
        directory = tmp_path_factory.mktemp(name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(directory)
        models.append(ModelLimits(name, 11, 4096, str(directory)))
    return models
