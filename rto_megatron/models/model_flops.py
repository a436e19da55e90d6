"""Floating-point operations that a forward pass needs by the model's mathematics, whatever is recomputed or padded.

A multiplication with its addition counts two. Of a causal attention matrix half is counted, in layers with a sliding
window what lies in it; what is no matrix product counts nothing. A backward pass takes twice the forward's.
"""

from collections.abc import Iterable

from rto_megatron.models.shape import Experts, ModelShape


def forward_flops(shape: ModelShape, has_scalar_head: bool, lengths: Iterable[int]) -> float:
    """Operations of one forward: of each sequence of s tokens 2 N s + s^2 x heads x (key + value size) x layers.

    N counts the weights that a token is multiplied with (`weights_per_token`). For ordinary attention the second term
    is 2 s^2 x heads x head size x layers. In a layer with a window of w < s tokens s^2 becomes w (2 s - w).
    """
    found = list(lengths)
    latent = shape.latent
    head = 2 * shape.head_dim if latent is None else latent.nope_dim + latent.rope_dim + latent.value_dim
    weights = weights_per_token(shape, has_scalar_head)
    return float(2 * weights * sum(found) + shape.num_heads * head * sum(_seen(shape, n) for n in found))


def _seen(shape: ModelShape, length: int) -> int:
    """Twice the pairs of a token and one that it sees, in all layers."""
    if shape.window is None:
        return shape.num_layers * length * length
    windowed, within = len(shape.windowed_layers) or shape.num_layers, min(length, shape.window)
    return (shape.num_layers - windowed) * length * length + windowed * within * (2 * length - within)


def head_flops(shape: ModelShape, num_positions: int) -> float:
    """Operations of a language model's output projection in a forward of so many positions."""
    return 2.0 * num_positions * shape.hidden_size * shape.vocab_size


def weights_per_token(shape: ModelShape, has_scalar_head: bool) -> int:
    """Weights in matrix products of one token: the head counts, the search in the embedding does not."""
    return layer_weights(shape) + shape.hidden_size * (1 if has_scalar_head else shape.vocab_size)


def layer_weights(shape: ModelShape) -> int:
    """Weights in matrix products of one token, of all layers."""
    feed_forward = shape.num_layers * 3 * shape.hidden_size * shape.ffn_hidden_size
    if (experts := shape.experts) is not None:
        dense_layers = shape.num_layers - len(experts.layers)
        feed_forward = dense_layers * 3 * shape.hidden_size * shape.ffn_hidden_size
        feed_forward += len(experts.layers) * _expert_layer(shape.hidden_size, experts)
    return shape.num_layers * _attention(shape) + feed_forward


def _attention(shape: ModelShape) -> int:
    hidden, heads, latent = shape.hidden_size, shape.num_heads, shape.latent
    if latent is None:
        return hidden * shape.head_dim * (2 * heads + 2 * shape.num_kv_heads)
    query_size = heads * (latent.nope_dim + latent.rope_dim)
    query = hidden * query_size if latent.q_rank is None else latent.q_rank * (hidden + query_size)
    key_value = hidden * (latent.kv_rank + latent.rope_dim)
    key_value += latent.kv_rank * heads * (latent.nope_dim + latent.value_dim)
    return query + key_value + heads * latent.value_dim * hidden


def _expert_layer(hidden: int, experts: Experts) -> int:
    size = experts.per_token * experts.ffn_hidden_size + (experts.shared_ffn_hidden_size or 0)
    router = experts.num + (1 if experts.has_shared_gate else 0)
    return hidden * (3 * size + router)
