"""Mixtral: Llama's attention with a mixture of experts behind it, under Hugging Face's MixtralForCausalLM names.

The router takes the best experts first and their softmax second, which equals Hugging Face's softmax, best experts,
renormalise.
"""

from rto_megatron.models.families import llama
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import GateUpRows, MappedParameter, Replicated, Split


def _layer(shape: ModelShape, index: int) -> tuple[MappedParameter, ...]:
    hf, mg = f"model.layers.{index}.block_sparse_moe", f"decoder.layers.{index}.mlp"
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    assert shape.num_experts is not None
    router = MappedParameter(
        f"{mg}.router.weight", (f"{hf}.gate.weight",), ((shape.num_experts, hidden),), Replicated(), index
    )
    parameters = [*llama.attention(shape, index), router]
    for expert in range(shape.num_experts):
        theirs, ours = f"{hf}.experts.{expert}", f"{mg}.experts.local_experts.{expert}"
        parameters += [
            MappedParameter(
                f"{ours}.linear_fc1.weight",
                (f"{theirs}.w1.weight", f"{theirs}.w3.weight"),  # gate, up
                ((ffn, hidden), (ffn, hidden)),
                GateUpRows(),
                index,
            ),
            MappedParameter(
                f"{ours}.linear_fc2.weight", (f"{theirs}.w2.weight",), ((hidden, ffn),), Split(1), index
            ),
        ]
    return tuple(parameters)


def weight_map(shape: ModelShape, has_scalar_head: bool) -> tuple[MappedParameter, ...]:
    """All parameters in the order of the forward pass."""
    return llama.around(_layer, shape, has_scalar_head)


ARCHITECTURES = {False: "MixtralForCausalLM", True: "MixtralForSequenceClassification"}
