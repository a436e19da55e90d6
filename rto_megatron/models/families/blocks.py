"""The parts that decoder families share, as maps from Hugging Face names to Megatron parameters."""

from dataclasses import dataclass, replace

from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import (
    GateUpRows,
    Joined,
    MappedParameter,
    QkvRows,
    Replicated,
    ShardLayout,
    Split,
    VocabRows,
)

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
SCALAR_HEAD = "score.weight"


@dataclass(frozen=True)
class NormNames:
    """What the norms of a layer are called in Hugging Face's names; null: there is none.

    Example:
        NormNames(after_attention="post_attention_layernorm", before_mlp="pre_feedforward_layernorm")
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


USUAL_NORMS = NormNames()


def norm(
    megatron: str, hf: str, size: int, layer: int | None, is_output_side: bool = False
) -> MappedParameter:
    """A norm's weight [size], on every rank."""
    return MappedParameter(megatron, (hf,), ((size,),), Replicated(), layer, is_output_side)


def matrix(
    megatron: str, hf: str, shape: tuple[int, int], layout: ShardLayout, layer: int
) -> MappedParameter:
    """One matrix on both sides."""
    return MappedParameter(megatron, (hf,), (shape,), layout, layer)


def layer_norm(shape: ModelShape, index: int, ours: str, name: str | None) -> tuple[MappedParameter, ...]:
    """A norm over the hidden size, or none where it has no name."""
    if name is None:
        return ()
    hf, mg = f"model.layers.{index}.{name}.weight", f"decoder.layers.{index}.{ours}.weight"
    return (norm(mg, hf, shape.hidden_size, index),)


def attention(shape: ModelShape, index: int, names: NormNames = USUAL_NORMS) -> tuple[MappedParameter, ...]:
    """Grouped-query attention with the norms around it; bias and norms of heads where the shape has them."""
    hf, mg = f"model.layers.{index}", f"decoder.layers.{index}"
    hidden = shape.hidden_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layout = QkvRows(shape.num_heads, shape.num_kv_heads, shape.head_dim)
    linears = tuple(f"{hf}.self_attn.{name}_proj" for name in "qkv")
    qkv = f"{mg}.self_attention.linear_qkv"
    weights, biases = tuple(f"{n}.weight" for n in linears), tuple(f"{n}.bias" for n in linears)
    parameters = [
        *layer_norm(shape, index, "input_layernorm", names.before_attention),
        MappedParameter(f"{qkv}.weight", weights, ((q, hidden), (kv, hidden), (kv, hidden)), layout, index),
    ]
    if shape.has_qkv_bias:
        parameters.append(MappedParameter(f"{qkv}.bias", biases, ((q,), (kv,), (kv,)), layout, index))
    parameters += _qk_norms(shape, index)
    out = f"{hf}.self_attn.o_proj.weight"
    parameters.append(matrix(f"{mg}.self_attention.linear_proj.weight", out, (hidden, q), Split(1), index))
    parameters += layer_norm(shape, index, "post_self_attn_layernorm", names.after_attention)
    return tuple(parameters)


def _qk_norms(shape: ModelShape, index: int) -> list[MappedParameter]:
    """Of each head, or of all heads at once: those of a tensor rank then have their part of the weight."""
    hf, mg = f"model.layers.{index}.self_attn", f"decoder.layers.{index}.self_attention"
    if shape.has_qk_norm:
        return [
            norm(f"{mg}.{x}_layernorm.weight", f"{hf}.{x}_norm.weight", shape.head_dim, index) for x in "qk"
        ]
    if not shape.has_whole_qk_norm:
        return []
    return [
        MappedParameter(
            f"{mg}.{x}_norm.weight", (f"{hf}.{x}_norm.weight",), ((num * shape.head_dim,),), Split(0), index
        )
        for x, num in (("q", shape.num_heads), ("k", shape.num_kv_heads))
    ]


def feed_forward_norm(shape: ModelShape, index: int) -> MappedParameter:
    """The norm between attention and feed-forward."""
    (parameter,) = layer_norm(shape, index, "pre_mlp_layernorm", USUAL_NORMS.before_mlp)
    return parameter


def gated(
    mg: str, hf: tuple[str, str, str], hidden: int, ffn: int, index: int
) -> tuple[MappedParameter, MappedParameter]:
    """A gated feed-forward network.

    Args:
        hf: names of the gate, up and down matrices without `.weight`.
    """
    gate, up, down = (f"{name}.weight" for name in hf)
    return (
        MappedParameter(
            f"{mg}.linear_fc1.weight", (gate, up), ((ffn, hidden), (ffn, hidden)), GateUpRows(), index
        ),
        matrix(f"{mg}.linear_fc2.weight", down, (hidden, ffn), Split(1), index),
    )


def projections(hf: str) -> tuple[str, str, str]:
    """The usual names of gate, up and down."""
    return f"{hf}.gate_proj", f"{hf}.up_proj", f"{hf}.down_proj"


def dense(shape: ModelShape, index: int, names: NormNames = USUAL_NORMS) -> tuple[MappedParameter, ...]:
    """The feed-forward part of a dense layer with its norms."""
    hf, mg = f"model.layers.{index}.mlp", f"decoder.layers.{index}.mlp"
    return (
        *layer_norm(shape, index, "pre_mlp_layernorm", names.before_mlp),
        *gated(mg, projections(hf), shape.hidden_size, shape.ffn_hidden_size, index),
        *layer_norm(shape, index, "post_mlp_layernorm", names.after_mlp),
    )


def mixture(
    shape: ModelShape, index: int, hf: str, expert_names: tuple[str, str, str]
) -> tuple[MappedParameter, ...]:
    """Router and experts of one layer with the norm before them.

    Args:
        hf: the module's name inside the layer.
        expert_names: what the gate, up and down matrices of an expert are called.
    """
    experts, mg = shape.experts, f"decoder.layers.{index}.mlp"
    assert experts is not None
    hf = f"model.layers.{index}.{hf}"
    router = (experts.num, shape.hidden_size)
    parameters = [
        feed_forward_norm(shape, index),
        matrix(f"{mg}.router.weight", f"{hf}.gate.weight", router, Replicated(), index),
    ]
    for expert in range(experts.num):
        names = tuple(f"{hf}.experts.{expert}.{name}" for name in expert_names)
        assert len(names) == 3
        ours = f"{mg}.experts.local_experts.{expert}"
        network = gated(ours, names, shape.hidden_size, experts.ffn_hidden_size, index)
        parameters += [replace(parameter, expert=expert) for parameter in network]
    return tuple(parameters)


def shared_expert(shape: ModelShape, index: int, hf: str) -> tuple[MappedParameter, ...]:
    """The expert that every token passes, and its gate where there is one; `hf` is its name inside the layer."""
    experts, mg = shape.experts, f"decoder.layers.{index}.mlp.shared_experts"
    assert experts is not None and experts.shared_ffn_hidden_size is not None
    hf = f"model.layers.{index}.{hf}"
    network = gated(mg, projections(hf), shape.hidden_size, experts.shared_ffn_hidden_size, index)
    if not experts.has_shared_gate:
        return network
    gate = matrix(f"{mg}.gate_weight", f"{hf}_gate.weight", (1, shape.hidden_size), Replicated(), index)
    return (*network, gate)


def joined(parameter: MappedParameter) -> MappedParameter:
    """The parameter of q, k and v, or of gate and up, where a family keeps these in one tensor; others as they are."""
    if len(parameter.hf) == 1:
        return parameter
    name = parameter.hf[0].replace(".q_proj.", ".qkv_proj.").replace(".gate_proj.", ".gate_up_proj.")
    lengths = tuple(size[0] for size in parameter.hf_shapes)
    size = (sum(lengths), *parameter.hf_shapes[0][1:])
    return replace(parameter, hf=(name,), hf_shapes=(size,), layout=Joined(parameter.layout, lengths))


def embedding(shape: ModelShape) -> MappedParameter:
    """The token embedding."""
    size = (shape.vocab_size, shape.hidden_size)
    rows = VocabRows(shape.vocab_size)
    return MappedParameter("embedding.word_embeddings.weight", (EMBEDDING,), (size,), rows, None)


def head(shape: ModelShape, has_scalar_head: bool) -> MappedParameter:
    """The output projection, its tied copy, or the scalar head of critics and reward models."""
    if has_scalar_head:
        size = (1, shape.hidden_size)
        return MappedParameter("output_layer.weight", (SCALAR_HEAD,), (size,), Replicated(), None, True)
    return MappedParameter(
        "output_layer.weight",
        (EMBEDDING if shape.is_tied else LM_HEAD,),
        ((shape.vocab_size, shape.hidden_size),),
        VocabRows(shape.vocab_size),
        None,
        True,
        is_copy=shape.is_tied,
    )
