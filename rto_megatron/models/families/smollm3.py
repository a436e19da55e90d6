"""SmolLM3: Llama's layers, some of which do not rotate heads (NoPE)."""

from dataclasses import replace

from rto_megatron.models.families import llama, qwen2
from rto_megatron.models.family import Family
from rto_megatron.models.hf_config import HfConfig
from rto_megatron.models.shape import ModelShape


def _read(config: HfConfig, shape: ModelShape) -> ModelShape:
    qwen2.refuse_window(config)
    rotates = config.values.get("no_rope_layers")  # despite its name 1 where a layer rotates
    if rotates is None:
        every = config.values.get("no_rope_layer_interval") or 4
        rotates = [(i + 1) % every for i in range(shape.num_layers)]
    if len(rotates) != shape.num_layers:
        config.refuse(
            f"no_rope_layers has {len(rotates)} entries; expected one for each of {shape.num_layers} layers"
        )
    unrotated = tuple(i for i, does_rotate in enumerate(rotates) if not does_rotate)
    return replace(shape, rotation=replace(shape.rotation, unrotated_layers=unrotated))


def _holds(shape: ModelShape) -> bool:
    rotation = replace(shape.rotation, unrotated_layers=())
    has_layers = bool(shape.rotation.unrotated_layers) and shape.rope_scaling_factor is None
    return has_layers and llama.FAMILY.holds(replace(shape, rotation=rotation))


FAMILY = Family(
    architectures={False: "SmolLM3ForCausalLM", True: "SmolLM3ForSequenceClassification"},
    layer=llama.layer,
    holds=_holds,
    # A layer that does not rotate has no scaling: an amplitude would be no part of its scores.
    ropes=frozenset(),
    defaults={"rope_theta": 2e6, "tie_word_embeddings": True},
    read=_read,
    config=lambda shape: {
        "no_rope_layers": [int(i not in shape.rotation.unrotated_layers) for i in range(shape.num_layers)],
        "use_sliding_window": False,
        "pad_token_id": None,  # transformers' own is of the published vocabulary
        "attention_bias": False,
        "mlp_bias": False,
    },
)
