"""Made checkpoints load in `transformers` and here; broken ones are refused with one clear line; loading is lean."""

import json
import os
import subprocess
import sys

import judges
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from serving.checkpoints import DummyWeights, open_checkpoint
from serving.checkpoints.__main__ import main
from serving.checkpoints.make import make_checkpoint
from serving.checkpoints.names import all_shapes
from serving.checkpoints.reader import INDEX_FILE
from serving.errors import UserError
from serving.spec import ARCHITECTURES, load_spec

pytestmark = pytest.mark.cpu


@pytest.fixture
def sharded(tmp_path):
    """A tiny checkpoint in several shards."""
    return make_checkpoint("mixtral", "tiny", tmp_path / "model", shard_bytes=200_000, progress=False)


def shards(directory):
    return sorted(directory.glob("*.safetensors"))


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "deepseek"])
def test_transformers_finds_every_tensor_and_no_other(architecture, tiny_checkpoints):
    directory = tiny_checkpoints[architecture]
    _, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == load_spec(directory).vocab_size
    assert tokenizer.decode(tokenizer("cold models")["input_ids"]) == "cold models"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_outputs_are_not_degenerate(architecture, tiny_checkpoints):
    directory = tiny_checkpoints[architecture]
    distinct = [len(set(judges.greedy_reference(directory, (7 * seed + 1, 5, 11 + seed), 24))) for seed in range(4)]
    assert min(distinct) >= 4 and sum(distinct) / len(distinct) >= 9
    top = judges.reference_logits(directory, tuple(range(1, 40))).topk(2).values
    assert (top[:, 0] - top[:, 1]).median() > 0.05


def test_shards_hold_the_same_as_one_file(sharded, tmp_path):
    assert len(shards(sharded)) > 3
    whole = make_checkpoint("mixtral", "tiny", tmp_path / "whole", progress=False)
    with open_checkpoint(sharded) as many, open_checkpoint(whole) as one:
        for name in all_shapes(many.spec):
            assert torch.equal(many.tensor(name), one.tensor(name)), name


def test_making_again_changes_nothing_and_never_overwrites_another(sharded):
    before = {path: path.stat().st_mtime_ns for path in sharded.iterdir()}
    assert make_checkpoint("mixtral", "tiny", sharded, shard_bytes=200_000, progress=False) == sharded
    assert {path: path.stat().st_mtime_ns for path in sharded.iterdir()} == before
    with pytest.raises(UserError, match="is not this checkpoint"):
        make_checkpoint("mixtral", "tiny", sharded, seed=5, progress=False)
    assert [path.name for path in sharded.parent.iterdir()] == [sharded.name]


def test_dummy_weights_do_not_depend_on_the_order_of_reading(tiny_checkpoints):
    spec = load_spec(tiny_checkpoints["glm4_moe_lite"])
    first, second = DummyWeights(spec, seed=3), DummyWeights(spec, seed=3)
    forward = [first.expert(1, index)[0] for index in range(3)]
    backward = [second.expert(1, index)[0] for index in (2, 1, 0)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(forward[0], DummyWeights(spec, seed=4).expert(1, 0)[0])


def test_large_dummy_tensors_are_filled_and_do_not_repeat_rows():
    from serving.checkpoints.dummy import seeded_tensor

    tensor = seeded_tensor("model.layers.0.mlp.experts.0.up_proj.weight", (3000, 1024), 4, 0, torch.bfloat16)
    assert 0.02 < tensor.float().std() < 0.05
    assert len(torch.unique(tensor[:, 0])) > 100
    assert not torch.equal(tensor[:1024], tensor[1024:2048])


def break_missing(directory):
    shards(directory)[1].unlink()
    return "shard model-00002-of-.* is missing"


def break_truncated(directory):
    path = shards(directory)[0]
    os.truncate(path, path.stat().st_size - 100)
    return "is truncated, 100 of"


def break_garbage(directory):
    shards(directory)[2].write_bytes(b"\xff" * 300)
    return "is not a whole safetensors file"


def break_index(directory):
    (directory / INDEX_FILE).write_text("{}")
    return "is not a safetensors index"


def break_tensor(directory):
    index = json.loads((directory / INDEX_FILE).read_text())
    gone = {file: None for name, file in index["weight_map"].items() if "layers.2" not in name}
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file in gone}
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    return "tensor model.layers.3.* is in none of its shards"


def break_shape(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": 385}))
    return r"has shape \[384, 64\], config.json asks for \[385, 64\]"


def break_architecture(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    return "unknown architecture 'llama'; known: mixtral, deepseek"


def break_config(directory):
    (directory / "config.json").unlink()
    return "config.json: no such file"


def rewrite_header(path, change):
    """Let `change` edit the header of one shard in place; the data stays where the new header ends."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


def break_dtype(directory):
    def to_fp8(header):
        info = next(info for name, info in header.items() if name != "__metadata__")
        info |= {"dtype": "F8_E4M3"}

    rewrite_header(shards(directory)[0], to_fp8)
    return "is stored as F8_E4M3; known: F32, BF16, F16"


def break_offsets(directory):
    def negative(header):
        next(info for name, info in header.items() if name != "__metadata__")["data_offsets"][0] = -4

    rewrite_header(shards(directory)[0], negative)
    return "do not describe a tensor"


def break_gap(directory):
    """Two tensors over the same bytes."""

    def overlap(header):
        infos = [info for name, info in header.items() if name != "__metadata__"]
        first, second = next(
            (one, other)
            for one in infos
            for other in infos
            if one is not other and one["shape"] == other["shape"] and one["dtype"] == other["dtype"]
        )
        second["data_offsets"] = first["data_offsets"]

    rewrite_header(shards(directory)[1], overlap)
    return "the one before it ends at"


def break_trailing(directory):
    with shards(directory)[0].open("ab") as file:
        file.write(b"rest")
    return "has 4 bytes after its last tensor"


def break_elsewhere(directory):
    index = json.loads((directory / INDEX_FILE).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps(index))
    return "is not the name of a shard beside it"


BREAKAGES = [
    break_missing, break_truncated, break_garbage, break_index, break_tensor, break_shape, break_architecture, break_config,
    break_dtype, break_offsets, break_gap, break_trailing, break_elsewhere,
]  # fmt: skip


@pytest.mark.parametrize("damage", BREAKAGES, ids=lambda f: f.__name__)
def test_a_broken_checkpoint_is_one_clear_line(damage, sharded, capsys):
    expected = damage(sharded)
    with pytest.raises(UserError, match=expected):
        open_checkpoint(sharded)
    assert main(["inspect", str(sharded)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "weights are quantised"),
        ({"attention_bias": True}, "attention_bias is set"),
        ({"sliding_window": 128}, "sliding_window is 128"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"rope_parameters": 7}, "a value is not of the kind"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_layer_computes_is_refused(change, message, sharded, capsys):
    path = sharded / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        open_checkpoint(sharded)
    assert main(["inspect", str(sharded)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("content", [b"[1, 2]", b"\xff\xfe", b"{", b"null"])
def test_a_config_that_is_none_is_one_clear_line(content, sharded):
    (sharded / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json"):
        open_checkpoint(sharded)


def test_a_window_that_is_switched_off_or_covers_the_context_is_none(sharded):
    path = sharded / "config.json"
    config = json.loads(path.read_text())
    for change in ({"sliding_window": 64, "use_sliding_window": False}, {"sliding_window": 10**6}):
        path.write_text(json.dumps({**config, **change}))
        open_checkpoint(sharded).close()


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("serving.checkpoints.make.save_file", full)
    with pytest.raises(UserError, match="cannot be written .*No space left"):
        make_checkpoint("mixtral", "tiny", tmp_path / "model", progress=False)
    assert not list(tmp_path.iterdir())


PEAK_PROGRAM = """
import resource, sys, torch
from kernels import native
from serving.checkpoints import open_checkpoint
from serving.layers.attention_half import AttentionHalf
from serving.layers.ffn_half import FFNHalf
torch.set_num_threads(1)
def resident(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024
native.available(torch.float32)  # compiles
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins here
before = resident("VmRSS")
with open_checkpoint(sys.argv[1]) as weights:
    halves = [half(weights.spec, weights, torch.float32) for half in (AttentionHalf, FFNHalf)]
kept = sum(half.weight_bytes for half in halves)
print((resident("VmHWM") - before) / kept)
"""


def test_loading_keeps_little_more_resident_than_what_it_keeps(tmp_path):
    """Peak resident memory while loading at most 1.15 times the bytes kept, in a process of its own, 440 MB of weights."""
    directory = make_checkpoint("mixtral", "100m", tmp_path / "model", progress=False)
    done = subprocess.run(
        [sys.executable, "-c", PEAK_PROGRAM, str(directory)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
    assert float(done.stdout) <= 1.15
