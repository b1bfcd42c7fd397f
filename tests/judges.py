"""Independent judges of what a checkpoint computes: `transformers` in float32, and a plain reference for `deepseek`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from reference_deepseek import ReferenceDeepseek
from warm_workers import PARENT

from serving.spec import load_spec


@functools.cache
def _model(directory: str):
    if load_spec(directory).architecture == "deepseek":
        return ReferenceDeepseek(directory)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@torch.inference_mode()
def reference_logits(directory: str | Path, ids: tuple[int, ...]) -> torch.Tensor:
    """Logits [len(ids), V] float32 of the whole sequence at once."""
    model = _model(str(directory))
    tokens = torch.tensor([ids])
    return model(tokens) if isinstance(model, ReferenceDeepseek) else model(tokens, use_cache=False).logits[0].float()


@functools.cache
def _greedy(directory: str, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = prompt
    for _ in range(count):
        ids = (*ids, int(reference_logits(directory, ids)[-1].argmax()))
    return ids[len(prompt) :]


def greedy_reference(directory: str | Path, prompt: tuple[int, ...], count: int) -> list[int]:
    """The `count` greedy tokens after `prompt`, each from a fresh forward pass over everything before it."""
    return list(_greedy(str(directory), tuple(prompt), count))


def greedy_agrees(directory: str | Path, prompt: tuple[int, ...], tokens: Sequence[int]) -> bool:
    """Whether `tokens` are the greedy ones after `prompt`, by one forward pass over all: the first is right if it is what the
    judge would add to the prompt, and each further one if the same holds after those before it, which are right."""
    ids = (*prompt, *tokens)
    chosen = reference_logits(directory, ids[:-1])[len(prompt) - 1 :].argmax(dim=-1).tolist()
    return chosen == list(tokens)


def worker_processes() -> list[psutil.Process]:
    """Workers that this process has started and that still live; other children (of test tools) are none of ours."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "serving.workers" in child.cmdline() or PARENT.has_forked(child):
                found.append(child)
        except psutil.Error:
            continue  # gone meanwhile
    return found
