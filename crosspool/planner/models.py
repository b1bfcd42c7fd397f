"""From model specs and lengths to the plain numbers of the planner: shared by the engine's `plan` and the command."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crosspool.planner.demand import ModelDemand
from crosspool.planner.from_trace import ServiceModel
from crosspool.planner.layout import ModelBytes
from crosspool.planner.parallelism import best_plan, kv_heads
from serving.errors import UserError
from serving.spec import ModelSpec, element_bytes


def model_demand(
    spec: ModelSpec,
    dtype: str,
    rate_rps: float,
    prompt_tokens: Sequence[int] | np.ndarray,
    output_tokens: Sequence[int] | np.ndarray,
    service: ServiceModel,
    kv_devices: int = 1,
    layers_per_run: int = 1,
) -> ModelDemand:
    """The load of one model on a KV pool of `kv_devices`, from joint length samples [S] and a model of service times.

    A request has one run a layer (or a group of `layers_per_run`) on each tensor-parallel rank, which holds its heads.
    """
    tensor, layers = best_plan(kv_heads(spec), kv_devices).tensor, min(layers_per_run, spec.num_layers)
    prompt, output = np.asarray(prompt_tokens, dtype=np.int64), np.asarray(output_tokens, dtype=np.int64)
    return ModelDemand(
        name=spec.name,
        rate_rps=rate_rps,
        prompt_tokens=prompt,
        output_tokens=output,
        service_s=service.service_s(prompt, output),
        num_runs=-(-spec.num_layers // layers) * tensor,
        run_token_bytes=layers * spec.kv_bytes_per_token_layer(dtype) // tensor,
    )


def model_bytes(spec: ModelSpec, dtype: str, request_kv_bytes: int = 0) -> ModelBytes:
    """`spec`'s bytes by part, derived from its shape (norm vectors, some parts in 100,000, are left out)."""
    size = element_bytes(dtype)
    return ModelBytes(
        name=spec.name,
        attention_bytes=(spec.attention_elements + spec.embedding_elements) * size,
        ffn_layer_bytes=tuple(spec.ffn_layer_elements(layer) * size for layer in range(spec.num_layers)),
        num_kv_heads=kv_heads(spec),
        request_kv_bytes=request_kv_bytes,
    )


def promised_output_tokens(models: Sequence[ModelDemand], quantile: float) -> dict[str, int]:
    """By model, the output tokens that a share `quantile` of its *arriving* requests does not exceed: what admission by
    planned quantile promises. Raises UserError for a quantile outside (0, 1)."""
    if not 0 < quantile < 1:
        raise UserError(f"quantile {quantile} is outside (0, 1); 0.95 and 0.99 are usual")
    return {m.name: int(np.quantile(m.output_tokens, quantile, method="inverted_cdf")) for m in models}
