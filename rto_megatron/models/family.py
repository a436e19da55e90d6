"""What differs between model families."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import MappedParameter


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
        not_run: why no model of this family can be built here; null: it runs.

    Example:
        FAMILIES["llama"].architectures[False]
    """

    architectures: dict[bool, str]
    layer: Callable[[ModelShape, int], tuple[MappedParameter, ...]]
    holds: Callable[[ModelShape], bool]
    required: tuple[str, ...] = ()
    read: Callable[[HfConfig, ModelShape], ModelShape] = lambda config, shape: shape
    config: Callable[[ModelShape], dict[str, object]] = lambda shape: {}
    left_aside: Callable[[ModelShape], dict[re.Pattern[str], str]] = lambda shape: {}
    not_run: str | None = None
