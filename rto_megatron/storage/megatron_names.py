"""What a parameter is called in Megatron's torch_dist checkpoints.

Megatron-LM stacks equal layers and experts: one entry `decoder.layers.mlp.linear_fc2.weight` of shape [layers, ...].
Where layers differ, each has an entry of its own. Norms that TransformerEngine fuses into the next linear layer are
named after it; checkpoints of this program's runs and of other local layers name them by themselves.
Source: megatron-core 0.19.2, transformer/transformer_block.py, moe/experts.py and models/gpt/gpt_layer_specs.py.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import MappedParameter, VocabRows, padded_vocab

VOCABULARY_MULTIPLE = 128  # Megatron-LM's make_vocab_size_divisible_by
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.*\.)?experts\.local_experts\.(\d+)\.(.+)")
# Beside weights: what Megatron keeps in a checkpoint of a run, and this converter has no use for.
NOT_WEIGHTS = re.compile(
    r"(optimizer\.|chained_\d+\.|common_state|rng_state|rerun_state_machine_state|opt_param_scheduler|dataloader"
    r"|.*\._extra_state(/|$)|mtp\.)"
)


@dataclass(frozen=True)
class CheckpointSlot:
    """A place in a checkpoint: an entry, and the leading indices (layer, expert) of the parameter inside it.

    Example:
        CheckpointSlot("decoder.layers.mlp.linear_fc1.weight", index=(3,), sizes=(24,))
    """

    key: str
    index: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


def slots(parameter: MappedParameter, shape: ModelShape) -> tuple[CheckpointSlot, ...]:
    """The places where a parameter may be; the first is where Megatron-LM with TransformerEngine puts it."""
    return tuple(dict.fromkeys(_slots(parameter, shape)))


def _slots(parameter: MappedParameter, shape: ModelShape) -> Iterator[CheckpointSlot]:
    match = _LAYER.fullmatch(parameter.megatron)
    if match is None:
        yield CheckpointSlot(parameter.megatron)
        return
    layer, rest = int(match[1]), match[2]
    stacked = CheckpointSlot("decoder.layers", (layer,), (shape.num_layers,))
    single = CheckpointSlot(f"decoder.layers.{layer}")
    for base in (stacked, single) if shape.is_uniform else (single, stacked):
        for name in (_fused(rest, shape, layer), rest, _always_fused(rest)):
            yield from _experts(base, name, shape)


def _experts(base: CheckpointSlot, name: str, shape: ModelShape) -> Iterator[CheckpointSlot]:
    match = _EXPERT.fullmatch(name)
    if match is None:
        yield CheckpointSlot(f"{base.key}.{name}", base.index, base.sizes)
        return
    assert shape.experts is not None
    before, expert, rest = match[1] or "", int(match[2]), match[3]
    index, sizes = (*base.index, expert), (*base.sizes, shape.experts.num)
    yield CheckpointSlot(f"{base.key}.{before}experts.experts.{rest}", index, sizes)


def _fused(name: str, shape: ModelShape, layer: int) -> str:
    is_sparse = shape.experts is not None and layer in shape.experts.layers
    if name.startswith("pre_mlp_layernorm.") and is_sparse:
        return name
    if name.startswith("input_layernorm.") and shape.latent is not None:
        return name
    if shape.latent is not None:
        name = re.sub(
            r"self_attention\.(q|kv)_layernorm\.", r"self_attention.linear_\1_up_proj.layer_norm_", name
        )
    return _always_fused(name)


def _always_fused(name: str) -> str:
    name = re.sub(r"^input_layernorm\.", "self_attention.linear_qkv.layer_norm_", name)
    return re.sub(r"^pre_mlp_layernorm\.", "mlp.linear_fc1.layer_norm_", name)


def stored_shape(parameter: MappedParameter) -> tuple[int, ...]:
    """The whole parameter as Megatron-LM stores it, the vocabulary padded for one tensor rank."""
    first = parameter.hf_shapes[0]
    rows = sum(size[0] for size in parameter.hf_shapes)
    if isinstance(parameter.layout, VocabRows):
        rows = padded_vocab(parameter.layout.vocab_size, VOCABULARY_MULTIPLE)
    return (rows, *first[1:])


def extra_state(parameter: MappedParameter, shape: ModelShape) -> str | None:
    """The entry that Megatron's linear layers and TransformerEngine's norms have beside their weight, and miss."""
    slot = slots(parameter, shape)[0]
    module, _, last = slot.key.rpartition(".")
    if last != "weight" or not re.fullmatch(r"linear_\w+|\w+_layernorm", module.rpartition(".")[2]):
        return None
    index, sizes = slot.index or (0,), slot.sizes or (1,)
    return f"{module}._extra_state/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, sizes))}"
