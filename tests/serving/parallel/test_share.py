"""Shares of a model: their FFN outputs add up to the whole model's, their sizes to a little more, odd cuts are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.checkpoints import open_checkpoint
from serving.errors import UserError
from serving.layers.ffn_half import FFNHalf
from serving.layers.sizes import weight_bytes_attention, weight_bytes_ffn
from serving.parallel.group import GroupPlan, natural_group
from serving.parallel.share import Share, ShareOfWeights, Slice, share_spec
from serving.spec import ARCHITECTURES, load_spec

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ffns_of_the_shares_add_up_to_the_models(architecture, tiny_checkpoints):
    directory = tiny_checkpoints[architecture]
    with open_checkpoint(directory) as weights:
        whole = FFNHalf(weights.spec, weights, torch.float32)
    parts = []
    for rank in range(2):
        with ShareOfWeights(open_checkpoint(directory), Share(width=Slice(rank, 2))) as weights:
            parts.append(FFNHalf(weights.spec, weights, torch.float32))
    rows = torch.randn(7, whole.spec.hidden_size, generator=torch.Generator().manual_seed(1))
    for layer in range(whole.spec.num_layers):
        with torch.inference_mode():
            total = sum(part.forward(layer, rows) for part in parts)
            torch.testing.assert_close(total, whole.forward(layer, rows), rtol=1e-5, atol=1e-5)


@given(st.integers(1, 400), st.integers(1, 9))
def test_uneven_parts_cover_everything_once(size, parts):
    covered = [i for index in range(parts) for i in range(size)[Slice(index, parts).uneven(size)]]
    assert covered == list(range(size))


def test_a_share_is_smaller_and_shares_hold_the_whole(tiny_checkpoints):
    spec = load_spec(tiny_checkpoints["mixtral"])
    group = natural_group(spec, ("a", "b"))
    assert (group.tp, group.dp) == (2, 1)
    shares = [share_spec(spec, group.share(rank)) for rank in range(2)]
    for size in (weight_bytes_ffn, weight_bytes_attention):
        whole, parts = size(spec, "float32"), [size(share, "float32") for share in shares]
        assert max(parts) < whole
        assert sum(share.vocab_size for share in shares) == spec.vocab_size
    assert shares[0].kv_bytes_per_token("float32") == spec.kv_bytes_per_token("float32") // 2


def test_attention_is_data_parallel_beyond_the_kv_heads(tiny_checkpoints):
    """The paper's Fig. 2: GQA with 2 KV heads on four devices is TP2 x DP2, one latent is DP4."""
    devices = ("a", "b", "c", "d")
    gqa, mla = load_spec(tiny_checkpoints["mixtral"]), load_spec(tiny_checkpoints["deepseek_v2"])
    assert [(g.tp, g.dp) for g in (natural_group(gqa, devices), natural_group(mla, devices))] == [(2, 2), (1, 4)]


@pytest.mark.parametrize(
    ("architecture", "share", "words"),
    [
        ("glm4_moe_lite", Share(heads=Slice(0, 2)), "5 attention heads cannot be cut into 2"),
        ("mixtral", Share(heads=Slice(0, 4)), "2 KV heads cannot be cut into 4 parts without copies"),
        ("mixtral", Share(width=Slice(0, 5)), "expert width 96 cannot be cut into 5"),
    ],
)
def test_odd_cuts_are_refused(architecture, share, words, tiny_checkpoints):
    with pytest.raises(UserError, match=words):
        share_spec(load_spec(tiny_checkpoints[architecture]), share)


def test_a_group_must_fill_its_devices():
    with pytest.raises(UserError, match="does not fill the 3 devices"):
        GroupPlan(("a", "b", "c"), tp=2, dp=1)
    with pytest.raises(UserError, match="must differ"):
        GroupPlan(("a", "a"), tp=2)
