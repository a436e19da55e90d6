"""Log-probabilities of given tokens from logits that are split over the vocabulary."""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from rto_megatron.types import BannedTargets


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    tensor_rank: int,
    group: dist.ProcessGroup,
    banned: BannedTargets | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """log softmax(logits / temperature)[targets] in float32, without gathering the vocabulary.

    Args:
        logits: [b, s, v], this tensor rank's columns of the padded vocabulary.
        targets: [b, s] int64.
        vocab_size: columns from here on are padding and get no probability.
        tensor_rank: this rank's place among the shards.
        group: the tensor ranks, `Topology.tensor_group`; all of them must call this, with the same targets.
        banned: where some tokens get no probability either; None: nowhere.

    Returns:
        [b, s] float32, nats, equal on all tensor ranks.
    """
    first = tensor_rank * logits.shape[-1]
    padding = max(0, min(logits.shape[-1], first + logits.shape[-1] - vocab_size))
    logits = logits.to(torch.float32, copy=banned is not None)
    if temperature != 1:
        logits = logits / temperature
    if padding:
        kept = logits[..., : logits.shape[-1] - padding]
        logits = kept.new_full(logits.shape, float("-inf"))
        logits[..., : kept.shape[-1]] = kept
    if banned is not None:
        columns = [token - first for token in banned.ids if first <= token < first + logits.shape[-1]]
        is_banned = banned.is_banned_T.view(*targets.shape, 1)
        logits[..., columns] = logits[..., columns].masked_fill(is_banned, float("-inf"))
    # Megatron's kernel works on [s, b, v] and subtracts the maximum in place.
    losses_TB: Tensor = vocab_parallel_cross_entropy(
        logits.transpose(0, 1).contiguous(), targets.t().contiguous(), tp_group=group
    )
    return -losses_TB.t()
