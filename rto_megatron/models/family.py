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

    LayerSpec = Callable[[TransformerConfig, int | None], ModuleSpec]


@dataclass(frozen=True)
class Family:
    """One model type of transformers.

    Attributes:
        architectures: has_scalar_head -> class name in config.json.
        layer: (shape, index) -> parameters of one decoder layer, in the order of the forward pass.
        holds: whether a model with the parts of a shape can be of this type; the shape's own family does not count.
        required: the family's own keys of config.json that have no safe default.
        read: (config.json, sizes that all families share) -> the shape; refuses what Megatron cannot express.
        config: the family's own keys of config.json; `read` undoes it.
        left_aside: names of tensors that are not weights of the model, with the reason.
        activations: hidden_act of config.json -> what the gate computes; others are refused.
        layer_spec: (Megatron's configuration, experts of a layer) -> the layer's modules; null: `build.layer_spec`.
            Window, activation and embedding scale are of the shape, which `read` makes.
        not_run: why no model of this family can be built here; null: it runs.

    Example:
        family.architectures[False]
    """

    architectures: dict[bool, str]
    layer: Callable[[ModelShape, int], tuple[MappedParameter, ...]]
    holds: Callable[[ModelShape], bool]
    required: tuple[str, ...] = ()
    read: Callable[[HfConfig, ModelShape], ModelShape] = lambda config, shape: shape
    config: Callable[[ModelShape], dict[str, object]] = lambda shape: {}
    left_aside: Callable[[ModelShape], dict[re.Pattern[str], str]] = lambda shape: {}
    activations: Mapping[str, Activation] = field(default_factory=lambda: {"silu": "silu"})
    layer_spec: "LayerSpec | None" = None
    not_run: str | None = None
