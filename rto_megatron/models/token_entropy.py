"""Log-probabilities of given tokens and the entropy of every position, over a split vocabulary, in chunks.

Legend: T = b s positions, C positions of a chunk, v columns of this tensor rank. For logits z with log-normaliser Z and
p = exp(z - Z), each position needs

    log pi(target) = z_target - Z,    H = Z - sum_j p_j z_j,

and the sum over j runs over the shard before it is added up over the tensor ranks: nobody gathers the vocabulary. The
backward pass computes a chunk's probabilities again: beyond the logits, with e bytes per number of the model, there are
e T v bytes for the gradient and 8 C v for one chunk, where probabilities kept from the forward pass take 8 T v.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from rto_megatron.models.token_divergence import locate
from rto_megatron.types import BannedTargets

_CHUNK = 1024


def token_entropies(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    tensor_rank: int,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
    banned: BannedTargets | None = None,
) -> Tensor:
    """Log-probs of the targets and entropies, both of softmax(logits / temperature), in float32, nats.

    Every rank of `group` must call it, with the same targets.

    Args:
        logits: [b, s, v], this tensor rank's columns of the padded vocabulary.
        targets: [b, s] int64.
        vocab_size: columns from here on are padding and get no probability.
        tensor_rank: this rank's place among the shards.
        group: the tensor ranks, `Topology.tensor_group`.
        banned: where some tokens get no probability either; None: nowhere.

    Returns:
        [2, T], equal on all tensor ranks.
    """
    columns = logits.shape[-1]
    num_columns = max(0, min(columns, vocab_size - tensor_rank * columns))
    shard = _Shard(tensor_rank * columns, num_columns, group, temperature, banned)
    outputs_2T: Tensor = _TokenEntropies.apply(  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
        logits.flatten(0, 1), targets.flatten(), shard
    )
    return outputs_2T


class _Shard:
    """This rank's columns of the vocabulary, and what is left out of them."""

    def __init__(
        self,
        first: int,
        num_columns: int,
        group: dist.ProcessGroup,
        temperature: float,
        banned: BannedTargets | None,
    ) -> None:
        self.first = first
        self.num_columns = num_columns
        self.group = group
        self._temperature = temperature
        self._banned = banned

    def logits(self, logits_Tv: Tensor, rows: slice) -> Tensor:
        """A float32 copy of a chunk, which may be written to: over the temperature, -inf where a token is banned."""
        logits_Cv = logits_Tv[rows, : self.num_columns].to(torch.float32, copy=True).div_(self._temperature)
        if self._banned is not None:
            columns = [i - self.first for i in self._banned.ids if 0 <= i - self.first < self.num_columns]
            is_banned_C1 = self._banned.is_banned_T[rows, None]
            logits_Cv[:, columns] = logits_Cv[:, columns].masked_fill(is_banned_C1, float("-inf"))
        return logits_Cv

    def scaled(self, gradient_Cv: Tensor) -> Tensor:
        """The gradient of the logits from that of `logits`."""
        return gradient_Cv.div_(self._temperature)


class _Context(FunctionCtx):
    """What `forward` leaves for `backward`."""

    shard: _Shard
    saved_tensors: tuple[Tensor, ...]


class _TokenEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, logits_Tv: Tensor, targets_T: Tensor, shard: _Shard) -> Tensor:
        outputs_2T = logits_Tv.new_empty(2, len(targets_T), dtype=torch.float32)
        normalisers_T = outputs_2T.new_empty(len(targets_T))
        for start in range(0, len(targets_T), _CHUNK):
            rows = slice(start, start + _CHUNK)
            outputs_2T[:, rows], normalisers_T[rows] = _chunk_outputs(
                shard.logits(logits_Tv, rows), targets_T[rows] - shard.first, shard.group
            )
        ctx.save_for_backward(logits_Tv, targets_T, outputs_2T[1], normalisers_T)
        ctx.shard = shard
        return outputs_2T

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_2T: Tensor) -> tuple[Tensor, None, None]:
        """d log pi(target) = onehot - p and d H = -p (log p + H), columns of this rank; needs no communication."""
        logits_Tv, targets_T, entropy_T, normalisers_T = ctx.saved_tensors
        grad_logits_Tv = torch.zeros_like(logits_Tv)  # padding columns keep the 0
        shard = ctx.shard
        for start in range(0, len(targets_T) if shard.num_columns else 0, _CHUNK):
            rows = slice(start, start + _CHUNK)
            logp_Cv = shard.logits(logits_Tv, rows).sub_(normalisers_T[rows, None])
            p_Cv = logp_Cv.exp()
            grad_logp_C, grad_entropy_C = grad_2T[:, rows]
            # p log p is 0 where p is; 0 times the -inf of a banned token is not.
            logp_Cv.masked_fill_(p_Cv == 0, 0).add_(entropy_T[rows, None]).mul_(-grad_entropy_C[:, None])
            grad_Cv = p_Cv.mul_(logp_Cv.sub_(grad_logp_C[:, None]))
            is_own_C, column_C = locate(targets_T[rows] - shard.first, shard.num_columns)
            grad_Cv.scatter_add_(1, column_C[:, None], grad_logp_C.where(is_own_C, 0)[:, None])
            grad_logits_Tv[rows, : shard.num_columns] = shard.scaled(grad_Cv)
        return grad_logits_Tv, None, None


def _chunk_outputs(logits_Cv: Tensor, column_C: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [2, C], and the log-normalisers [C]; overwrites its first argument."""
    is_own_C, column_C = locate(column_C, logits_Cv.shape[1])
    if logits_Cv.shape[1]:
        largest_C = logits_Cv.amax(1)
        chosen_C = logits_Cv.gather(1, column_C[:, None])[:, 0].where(is_own_C, 0)
    else:  # a shard of nothing but padding
        largest_C = logits_Cv.new_full((len(column_C),), float("-inf"))
        chosen_C = logits_Cv.new_zeros(len(column_C))
    if group.size() > 1:
        dist.all_reduce(largest_C, dist.ReduceOp.MAX, group=group)  # every rank of the tensor group calls it
    shifted_Cv = logits_Cv.sub_(largest_C[:, None])
    exp_Cv = shifted_Cv.exp()
    weighted_C = exp_Cv.mul(shifted_Cv.masked_fill_(exp_Cv == 0, 0)).sum(1)
    sums_3C = torch.stack([exp_Cv.sum(1), weighted_C, chosen_C])
    if group.size() > 1:
        dist.all_reduce(sums_3C, group=group)  # every rank of the tensor group calls it
    log_sum_C = sums_3C[0].log()
    logp_C = sums_3C[2] - largest_C - log_sum_C
    # Of shifted logits: they lose no digits to the size of the logits.
    entropy_C = log_sum_C - sums_3C[1] / sums_3C[0]
    return torch.stack([logp_C, entropy_C]), largest_C + log_sum_C
