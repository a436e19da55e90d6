"""What differs between model families."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.shape import Activation, ModelShape
from rto_megatron.models.weight_map import MappedParameter

if TYPE_CHECKING:  # `rto check` reads shapes without Megatron, which takes seconds to load
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import ModuleSpec

    LayerSpec = Callable[[ModelShape, TransformerConfig, int | None], ModuleSpec]


@dataclass(frozen=True)
class Family:
    """One model type of transformers.

    Attributes:
        architectures: has_scalar_head -> class name in config.json.
        layer: (shape, index) -> parameters of one decoder layer, in the order of the forward pass.
        holds: whether a model with the parts of a shape can be of this type; the shape's own family does not count.
        required: the family's own keys of config.json that have no safe default.
        defaults: what absent keys mean in transformers, where that is not what they mean in most families.
        refused: switches of config.json that must be off.
        ropes: kinds of rotation in config.json beside the plain one; see `rope_config.py`.
        read: (config.json, sizes that all families share) -> the shape; refuses what Megatron cannot express.
        config: the family's own keys of config.json; `read` undoes it.
        left_aside: names of tensors that are not weights of the model, with the reason.
        activations: its name in config.json -> what the gate computes; the first is that of an absent key, others are
            refused.
        activation_key: under which config.json has it.
        layer_spec: (shape, Megatron's configuration, experts of a layer) -> the layer's modules; null:
            `layer_specs.layer_spec`, which follows the shape that `read` makes: norms, windows, scales, rotation.
        not_run: why no model of this family can be built here; null: it runs.

    Example:
        family.architectures[False]
    """

    architectures: dict[bool, str]
    layer: Callable[[ModelShape, int], tuple[MappedParameter, ...]]
    holds: Callable[[ModelShape], bool]
    required: tuple[str, ...] = ()
    defaults: Mapping[str, object] = field(default_factory=dict)
    refused: tuple[str, ...] = ("attention_bias", "mlp_bias")
    ropes: frozenset[str] = frozenset({"llama3"})
    read: Callable[[HfConfig, ModelShape], ModelShape] = lambda config, shape: shape
    config: Callable[[ModelShape], dict[str, object]] = lambda shape: {}
    left_aside: Callable[[ModelShape], dict[re.Pattern[str], str]] = lambda shape: {}
    activations: Mapping[str, Activation] = field(default_factory=lambda: {"silu": "silu"})
    activation_key: str = "hidden_act"
    layer_spec: "LayerSpec | None" = None
    not_run: str | None = None
