"""DeepSeek-MoE (arXiv 2401.06066) written out plainly: the judge of an architecture that `transformers` does not have.

Whole sequences, no cache, one expert at a time, float32, straight from the safetensors files. It shares no code
with the engine.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open


class ReferenceDeepseek:
    """Multi-head attention with rotate-half RoPE; dense first layers; afterwards shared experts plus the top k of a softmax
    over all routed experts, weighted by their probabilities as they are."""

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        self.config = json.loads((directory / "config.json").read_text())
        self.tensors: dict[str, torch.Tensor] = {}
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  not a mapping
                    self.tensors[name] = shard.get_tensor(name).float()

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] of `tokens` [1, T]."""
        x = self.tensors["model.embed_tokens.weight"][tokens[0]]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x = x + self.attention(self.norm(x, prefix + "input_layernorm.weight"), prefix + "self_attn.")
            normed = self.norm(x, prefix + "post_attention_layernorm.weight")
            if layer < self.config["first_k_dense_replace"]:
                x = x + self.mlp(normed, prefix + "mlp.")
            else:
                x = x + self.moe(normed, prefix + "mlp.")
        return self.norm(x, "model.norm.weight") @ self.tensors["lm_head.weight"].T

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * self.tensors[name]

    def attention(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        heads = self.config["num_attention_heads"]
        length, hidden = x.shape
        dim = hidden // heads
        q, k, v = (
            (x @ self.tensors[f"{prefix}{name}_proj.weight"].T).view(length, heads, dim).transpose(0, 1)
            for name in "qkv"
        )
        frequency = 1.0 / self.config["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
        angle = torch.arange(length)[:, None] * frequency[None]  # [T, dim / 2]
        q, k = self.rotate(q, angle), self.rotate(k, angle)
        scores = q @ k.transpose(1, 2) / dim**0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return (weights @ v).transpose(0, 1).reshape(length, hidden) @ self.tensors[f"{prefix}o_proj.weight"].T

    @staticmethod
    def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def mlp(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        gate, up = (x @ self.tensors[f"{prefix}{name}_proj.weight"].T for name in ("gate", "up"))
        return (gate * torch.sigmoid(gate) * up) @ self.tensors[f"{prefix}down_proj.weight"].T

    def moe(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        probabilities = (x @ self.tensors[f"{prefix}gate.weight"].T).softmax(-1)
        out = self.mlp(x, f"{prefix}shared_experts.")
        best = probabilities.sort(dim=-1, descending=True).indices[:, : self.config["num_experts_per_tok"]]
        for expert in best.unique().tolist():
            rows = (best == expert).any(dim=-1)
            out[rows] += probabilities[rows, expert, None] * self.mlp(x[rows], f"{prefix}experts.{expert}.")
        return out
