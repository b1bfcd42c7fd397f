"""Writes small seeded checkpoints in Hugging Face format: real files for the real loader, where no hub can be reached.

The directory appears whole or not at all, and making it again with the same seed and configuration does nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

from serving.checkpoints.dummy import seeded_tensor
from serving.checkpoints.names import all_shapes
from serving.checkpoints.reader import INDEX_FILE
from serving.checkpoints.sizes import config_of
from serving.errors import UserError
from serving.spec import element_bytes, spec_from_config

DEFAULT_SHARD_BYTES = 256 << 20
_STAMP_FILE = "made.json"


def make_checkpoint(
    architecture: str,
    size: str,
    out: str | Path,
    seed: int = 0,
    dtype: str = "float32",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Write the checkpoint to directory `out` unless the same one is there. Raises UserError where something else is."""
    out = Path(out)
    element_bytes(dtype)
    config = config_of(architecture, size, dtype)
    stamp = {"architecture": architecture, "size": size, "seed": seed, "dtype": dtype, "config": config}
    if out.exists():
        if _read_stamp(out) == stamp:
            return out
        raise UserError(f"{out}: exists and is not this checkpoint; remove it or choose another directory")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    try:
        _write_weights(partial, config, seed, dtype, shard_bytes, progress)
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False})
        _write_tokenizer(partial, config["vocab_size"])
        _write_json(partial / _STAMP_FILE, stamp)
        partial.chmod(0o755)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        if out.exists() and _read_stamp(out) == stamp:
            return out  # another process made it meanwhile
        raise UserError(f"{out}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _read_stamp(directory: Path) -> dict | None:
    try:
        return json.loads((directory / _STAMP_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        return None


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _write_weights(directory: Path, config: dict, seed: int, dtype: str, shard_bytes: int, progress: bool) -> None:
    spec = spec_from_config(config, directory.name)
    shapes = all_shapes(spec)
    shards = _shards(shapes, element_bytes(dtype), shard_bytes)
    weight_map = {}
    total_bytes = 0
    with tqdm(total=len(shapes), unit="tensor", desc=f"make {spec.architecture}", disable=not progress) as bar:
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name in names:
                tensor = seeded_tensor(name, shapes[name], spec.num_layers, seed, getattr(torch, dtype))
                # Published checkpoints keep the routers' correction bias in float32 and everything else in one dtype.
                tensors[name] = tensor
                total_bytes += tensor.nbytes
                bar.update()
            save_file(tensors, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
    _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _shards(shapes: dict[str, tuple[int, ...]], item_bytes: int, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled_bytes = 0
    for name, shape in shapes.items():
        count = item_bytes
        for size in shape:
            count *= size
        if shards[-1] and filled_bytes + count > shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(name)
        filled_bytes += count
    return shards


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level tokenizer whose vocabulary has exactly the model's size: bytes, then words that stand for themselves."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = special + alphabet
    words = (words + [f"<word{number}>" for number in range(vocab_size)])[:vocab_size]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([word for word in special if word in vocabulary])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    _write_json(directory / "tokenizer_config.json", settings)


def default_directory(architecture: str, size: str) -> Path:
    """Where checkpoints are made when no place is named: `$CROSSPOOL_CHECKPOINTS`, or `checkpoints/` of the repository."""
    root = os.environ.get("CROSSPOOL_CHECKPOINTS") or Path(__file__).resolve().parents[2] / "checkpoints"
    return Path(root) / f"{architecture}-{size}"
