"""Llama 2 and 3: the names of Hugging Face's LlamaForCausalLM and LlamaForSequenceClassification."""

from collections.abc import Callable

from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import GateUpRows, MappedParameter, QkvRows, Replicated, Split, VocabRows


def attention(shape: ModelShape, index: int) -> tuple[MappedParameter, ...]:
    """One layer but for its feed-forward part."""
    hf, mg = f"model.layers.{index}", f"decoder.layers.{index}"
    hidden = shape.hidden_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    qkv = QkvRows(shape.num_heads, shape.num_kv_heads, shape.head_dim)
    return (
        MappedParameter(
            f"{mg}.input_layernorm.weight",
            (f"{hf}.input_layernorm.weight",),
            ((hidden,),),
            Replicated(),
            index,
        ),
        MappedParameter(
            f"{mg}.self_attention.linear_qkv.weight",
            tuple(f"{hf}.self_attn.{name}_proj.weight" for name in "qkv"),
            ((q, hidden), (kv, hidden), (kv, hidden)),
            qkv,
            index,
        ),
        MappedParameter(
            f"{mg}.self_attention.linear_proj.weight",
            (f"{hf}.self_attn.o_proj.weight",),
            ((hidden, q),),
            Split(1),
            index,
        ),
        MappedParameter(
            f"{mg}.pre_mlp_layernorm.weight",
            (f"{hf}.post_attention_layernorm.weight",),
            ((hidden,),),
            Replicated(),
            index,
        ),
    )


def _layer(shape: ModelShape, index: int) -> tuple[MappedParameter, ...]:
    hf, mg = f"model.layers.{index}", f"decoder.layers.{index}"
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    return (
        *attention(shape, index),
        MappedParameter(
            f"{mg}.mlp.linear_fc1.weight",
            (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight"),
            ((ffn, hidden), (ffn, hidden)),
            GateUpRows(),
            index,
        ),
        MappedParameter(
            f"{mg}.mlp.linear_fc2.weight", (f"{hf}.mlp.down_proj.weight",), ((hidden, ffn),), Split(1), index
        ),
    )


def weight_map(shape: ModelShape, has_scalar_head: bool) -> tuple[MappedParameter, ...]:
    """All parameters in the order of the forward pass."""
    return around(_layer, shape, has_scalar_head)


def around(
    layer: Callable[[ModelShape, int], tuple[MappedParameter, ...]], shape: ModelShape, has_scalar_head: bool
) -> tuple[MappedParameter, ...]:
    """Embedding, final norm and head around the layers, in the order of the forward pass."""
    vocab = (shape.vocab_size, shape.hidden_size)
    embedding = "model.embed_tokens.weight"
    parameters = [
        MappedParameter(
            "embedding.word_embeddings.weight", (embedding,), (vocab,), VocabRows(shape.vocab_size), None
        )
    ]
    for index in range(shape.num_layers):
        parameters.extend(layer(shape, index))
    parameters.append(
        MappedParameter(
            "decoder.final_layernorm.weight",
            ("model.norm.weight",),
            ((shape.hidden_size,),),
            Replicated(),
            None,
            True,
        )
    )
    if has_scalar_head:
        head = MappedParameter(
            "output_layer.weight", ("score.weight",), ((1, shape.hidden_size),), Replicated(), None, True
        )
    else:
        name = embedding if shape.is_tied else "lm_head.weight"
        head = MappedParameter(
            "output_layer.weight",
            (name,),
            (vocab,),
            VocabRows(shape.vocab_size),
            None,
            True,
            is_copy=shape.is_tied,
        )
    return (*parameters, head)


ARCHITECTURES = {False: "LlamaForCausalLM", True: "LlamaForSequenceClassification"}
