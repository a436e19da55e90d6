"""The model families. To add one: a file in families/ and a line here."""

from dataclasses import dataclass

from rto_megatron.models.families import llama, mixtral
from rto_megatron.models.weight_map import WeightMap


@dataclass(frozen=True)
class Family:
    """What differs between families: the weight map and the names of the Hugging Face classes."""

    weight_map: WeightMap
    architectures: dict[bool, str]  # has_scalar_head -> class name in config.json


FAMILIES = {
    "llama": Family(llama.weight_map, llama.ARCHITECTURES),
    "mixtral": Family(mixtral.weight_map, mixtral.ARCHITECTURES),
}
