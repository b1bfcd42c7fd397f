"""The two halves against the judge: logits of whole prompts, chunks and single tokens, ragged batches, other dtypes."""

import json
import random

import judges
import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.native.layout import packed_as_read
from serving.checkpoints import open_checkpoint
from serving.checkpoints.make import make_checkpoint
from serving.layers.attention_half import AttentionHalf
from serving.layers.batch import BatchLayout
from serving.layers.ffn_half import FFNHalf
from serving.memory.kv_pool import cache_shape
from serving.spec import ARCHITECTURES

pytestmark = pytest.mark.cpu

RUN_SLOTS = 80


class Model:
    """Both halves of a checkpoint over a plain cache whose unused slots are NaN, so that reading one shows."""

    def __init__(self, directory, dtype=torch.float32, runs=8):
        with open_checkpoint(directory) as weights:
            self.spec = weights.spec
            self.attention = AttentionHalf(self.spec, weights, dtype)
            self.ffn = FFNHalf(self.spec, weights, dtype)
        shape = cache_shape(self.spec, RUN_SLOTS * runs)
        self.caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(self.spec.num_layers)]

    @torch.inference_mode()
    def step(self, pieces):
        """Logits of all rows of `pieces`: (run, tokens cached before, new token ids) each."""
        query_lens = tuple(len(ids) for _, _, ids in pieces)
        layout = BatchLayout(
            query_lens=query_lens,
            kv_lens=tuple(cached + len(ids) for _, cached, ids in pieces),
            run_starts=tuple(run * RUN_SLOTS + 3 for run, _, _ in pieces),
            logit_rows=tuple(range(sum(query_lens))),
        )
        hidden = self.attention.embed(torch.tensor([token for _, _, ids in pieces for token in ids]))
        ffn_out = None
        for layer, cache in enumerate(self.caches):
            hidden, ffn_in = self.attention.attend(layer, hidden, ffn_out, cache, layout)
            ffn_out = self.ffn.forward(layer, ffn_in)
        return self.attention.logits(hidden, ffn_out, layout).split(query_lens)


def random_ids(model, count, seed=0):
    rng = random.Random(seed)
    return tuple(rng.randrange(model.spec.vocab_size) for _ in range(count))


def assert_close(actual, expected, tolerance=2e-5):
    assert torch.allclose(actual, expected, atol=tolerance * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("chunks", [(41,), (16, 16, 9), (1,) * 12, (1, 30, 1, 1, 8)], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_the_judges_however_the_prompt_is_cut(architecture, chunks, tiny_checkpoints):
    model = Model(tiny_checkpoints[architecture])
    ids = random_ids(model, sum(chunks))
    done, parts = 0, []
    for count in chunks:
        parts += model.step([(0, done, ids[done : done + count])])
        done += count
    assert_close(torch.cat(parts), judges.reference_logits(tiny_checkpoints[architecture], ids))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ragged_batches_of_prefill_and_decode_do_not_touch_each_other(architecture, tiny_checkpoints):
    model = Model(tiny_checkpoints[architecture])
    prompts = [random_ids(model, count, seed=count) for count in (5, 1, 23, 12, 3, 40, 2, 17)]
    model.step([(run, 0, ids[:-1]) for run, ids in enumerate(prompts) if len(ids) > 1])
    rows = model.step([(run, len(ids) - 1, ids[-1:]) for run, ids in enumerate(prompts)])
    for ids, row in zip(prompts, rows, strict=True):
        assert_close(row[0], judges.reference_logits(tiny_checkpoints[architecture], ids)[-1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_stays_near_float32(architecture, tiny_checkpoints):
    model = Model(tiny_checkpoints[architecture], torch.bfloat16)
    ids = random_ids(model, 24)
    (actual,) = model.step([(0, 0, ids)])
    expected = judges.reference_logits(tiny_checkpoints[architecture], ids)
    error = (actual - expected).norm() / expected.norm()
    assert error < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_halves_hold_the_bytes_that_plans_charge(architecture, dtype, tiny_checkpoints):
    """Exactly, where oneDNN packs in the blocks that plans reckon with; in narrower ones (bfloat16 with AMX) they hold less."""
    model = Model(tiny_checkpoints[architecture], dtype)
    held = tensor_bytes(model.attention) - rotary_bytes(model), tensor_bytes(model.ffn)
    charged = model.attention.weight_bytes, model.ffn.weight_bytes
    if packed_as_read(dtype):
        assert held == charged
    assert all(0.8 * most < own <= most for own, most in zip(held, charged, strict=True))


def test_tied_heads_use_the_embedding(tmp_path):
    directory = make_checkpoint("qwen3_moe", "tiny", tmp_path / "tied", progress=False)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    (shard,) = directory.glob("*.safetensors")
    save_file({name: tensor for name, tensor in load_file(shard).items() if name != "lm_head.weight"}, shard)
    model = Model(directory)
    ids = random_ids(model, 9)
    (actual,) = model.step([(0, 0, ids)])
    assert_close(actual, judges.reference_logits(directory, ids))


def test_linear_rope_scaling(tmp_path):
    directory = make_checkpoint("mixtral", "tiny", tmp_path / "linear", progress=False)
    config = json.loads((directory / "config.json").read_text())
    config["rope_scaling"] = {"type": "linear", "factor": 4.0}
    (directory / "config.json").write_text(json.dumps(config))
    model = Model(directory)
    ids = random_ids(model, 30)
    (actual,) = model.step([(0, 0, ids)])
    assert_close(actual, judges.reference_logits(directory, ids))


def tensor_bytes(thing, seen=None):
    """Bytes of every tensor that an object of ours holds, packed ones by what oneDNN says they take."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return torch.ops.mkldnn._nbytes(thing) if thing.is_mkldnn else thing.nbytes
    if isinstance(thing, dict):
        return sum(tensor_bytes(value, seen) for value in thing.values())
    if isinstance(thing, list | tuple):
        return sum(tensor_bytes(value, seen) for value in thing)
    return tensor_bytes(vars(thing), seen) if hasattr(thing, "__dict__") else 0


def rotary_bytes(model):
    return tensor_bytes(model.attention._rotary)
