"""What a checkpoint's `config.json` says about a model. Everything that must know a model's shape (layers, loader, planner,
cost model) reads a :class:`ModelSpec` from here; nothing else reads `config.json`."""

from serving.spec.config_json import ARCHITECTURES, load_spec, spec_from_config
from serving.spec.shapes import (
    BYTES_PER_ELEMENT,
    ROUTING_RULES,
    GQASpec,
    MLASpec,
    ModelSpec,
    MoESpec,
    RopeSpec,
    element_bytes,
    yarn_mscale,
    yarn_softmax_factor,
)

__all__ = [
    "ARCHITECTURES",
    "BYTES_PER_ELEMENT",
    "ROUTING_RULES",
    "GQASpec",
    "MLASpec",
    "MoESpec",
    "ModelSpec",
    "RopeSpec",
    "element_bytes",
    "load_spec",
    "spec_from_config",
    "yarn_mscale",
    "yarn_softmax_factor",
]
