"""Log-probabilities under policy and reference and the KL between them, over a split vocabulary, in chunks.

Legend: T = b s positions, C positions of a chunk, v columns of this tensor rank, h hidden size. For logits z and z' of
the policy and the reference, with log-normalisers Z and Z', each position needs

    log pi(target) = z_target - Z,    log pi_ref(target) = z'_target - Z',
    KL(pi_ref || pi) = sum_j pi_ref(j) (z'_j - z_j) - (Z' - Z),

and the sum over j runs over the shard before it is added up over the tensor ranks: nobody gathers the vocabulary.

Peak memory beyond the policy's logits, in bytes, with e bytes per number of the model and T positions of a micro-batch:
    here    e T v (the gradient) + (8 + e) C v (one chunk) + e T h (the reference's hidden states)
    plain   20 T v: log-softmax, probabilities and products of all positions in float32, kept for the backward pass
`tests/models/test_token_divergence.py` measures the terms in T v and C v. With T = 32k tokens, a vocabulary of 128k
split 8 ways (v = 16k), bfloat16 (e = 2), h = 4096 and C = 1024 that is 1 + 0.16 + 0.25 = 1.4 GiB here, 10 GiB the
plain way on the shard, and 80 GiB the plain way on a gathered vocabulary (v = 128k), whose two sets of logits take
another 16 GiB. A step keeps the hidden states of all its micro-batches, e h bytes a position.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def token_divergence(
    logits: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    tensor_rank: int,
    group: dist.ProcessGroup,
    chunk: int,
) -> Tensor:
    """What TDPO reads of every position: log pi(target), log pi_ref(target), KL(pi_ref || pi); float32, nats.

    Every rank of `group` must call it, with the same targets and hidden states.

    Args:
        logits: [b, s, v], the policy's columns of the padded vocabulary on this tensor rank; the only input that gets
            a gradient, from the first and the last row of the output.
        reference_hidden: [b s, h], what the reference's output projection reads.
        reference_weight: [v, h], this tensor rank's rows of that projection.
        targets: [b, s] int64.
        vocab_size: columns from here on are padding and get no probability.
        tensor_rank: this rank's place among the shards.
        group: the tensor ranks, `Topology.tensor_group`.
        chunk: positions whose float32 logits exist at a time.

    Returns:
        [3, T], equal on all tensor ranks.
    """
    columns = logits.shape[-1]
    num_columns = max(0, min(columns, vocab_size - tensor_rank * columns))
    shard = (tensor_rank * columns, num_columns, group)
    outputs_3T: Tensor = _TokenDivergence.apply(  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
        logits.flatten(0, 1), reference_hidden, reference_weight, targets.flatten(), shard, chunk
    )
    return outputs_3T


class _Context(FunctionCtx):
    """What `forward` leaves for `backward`."""

    first: int
    chunk: int
    saved_tensors: tuple[Tensor, ...]


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        logits_Tv: Tensor,
        hidden_Th: Tensor,
        weight_vh: Tensor,
        targets_T: Tensor,
        shard: tuple[int, int, dist.ProcessGroup],
        chunk: int,
    ) -> Tensor:
        first, num_columns, group = shard
        weight_vh = weight_vh[:num_columns]
        outputs_3T = logits_Tv.new_empty(3, len(targets_T), dtype=torch.float32)
        normalisers_2T = outputs_3T.new_empty(2, len(targets_T))
        for start in range(0, len(targets_T), chunk):
            rows = slice(start, start + chunk)
            # The chunk's logits are nobody else's: a name for them here would keep them beside the next chunk's.
            outputs_3T[:, rows], normalisers_2T[:, rows] = _chunk_outputs(
                _policy_logits(logits_Tv, rows, num_columns),
                _reference_logits(hidden_Th, rows, weight_vh),
                targets_T[rows] - first,
                group,
            )
        ctx.save_for_backward(logits_Tv, hidden_Th, weight_vh, targets_T, normalisers_2T)
        ctx.first, ctx.chunk = first, chunk
        return outputs_3T

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_3T: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """d log pi(target) = onehot - pi and d KL = pi - pi_ref, columns of this rank; needs no communication."""
        logits_Tv, hidden_Th, weight_vh, targets_T, normalisers_2T = ctx.saved_tensors
        grad_logits_Tv = torch.zeros_like(logits_Tv)  # padding columns keep the 0
        num_columns = len(weight_vh)
        for start in range(0, len(targets_T) if num_columns else 0, ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            grad_logits_Tv[rows, :num_columns] = _chunk_gradient(
                _policy_logits(logits_Tv, rows, num_columns),
                _reference_logits(hidden_Th, rows, weight_vh),
                targets_T[rows] - ctx.first,
                normalisers_2T[:, rows],
                grad_3T[:, rows],
            )
        return grad_logits_Tv, None, None, None, None, None


def _policy_logits(logits_Tv: Tensor, rows: slice, num_columns: int) -> Tensor:
    """A float32 copy, which may be written to, without the padding columns: -inf there would make 0 times inf."""
    return logits_Tv[rows, :num_columns].to(torch.float32, copy=True)


def _reference_logits(hidden_Th: Tensor, rows: slice, weight_vh: Tensor) -> Tensor:
    """Rounded to the model's dtype on the way to float32, as the policy's are: equal models have a KL of 0."""
    return (hidden_Th[rows] @ weight_vh.t()).float()


def locate(column_C: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Whether a target's column, counted from the shard's first, is in the shard; and the column, or a valid one."""
    in_shard_C = (column_C >= 0) & (column_C < num_columns)
    return in_shard_C, column_C.where(in_shard_C, 0)


def _chunk_outputs(
    policy_Cv: Tensor, reference_Cv: Tensor, column_C: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The outputs [3, C] and the log-normalisers [2, C] of policy and reference; overwrites its first two arguments."""
    in_shard_C, column_C = locate(column_C, policy_Cv.shape[1])
    if policy_Cv.shape[1]:
        maxima_2C = torch.stack([policy_Cv.amax(1), reference_Cv.amax(1)])
        chosen_2C = torch.stack(
            [z_Cv.gather(1, column_C[:, None])[:, 0] for z_Cv in (policy_Cv, reference_Cv)]
        )
        chosen_2C = chosen_2C.where(in_shard_C, 0)
    else:  # a shard of nothing but padding
        maxima_2C = policy_Cv.new_full((2, len(column_C)), float("-inf"))
        chosen_2C = policy_Cv.new_zeros(2, len(column_C))
    if group.size() > 1:
        dist.all_reduce(maxima_2C, dist.ReduceOp.MAX, group=group)  # every rank of the tensor group calls it
    difference_Cv = reference_Cv - policy_Cv
    weights_Cv = reference_Cv.sub_(maxima_2C[1, :, None]).exp_()
    sum_exp_C = policy_Cv.sub_(maxima_2C[0, :, None]).exp_().sum(1)
    sums_5C = torch.stack([sum_exp_C, weights_Cv.sum(1), difference_Cv.mul_(weights_Cv).sum(1), *chosen_2C])
    if group.size() > 1:
        dist.all_reduce(sums_5C, group=group)  # every rank of the tensor group calls it
    log_sums_2C = sums_5C[:2].log()
    logp_2C = sums_5C[3:] - maxima_2C - log_sums_2C
    # Small differences of large normalisers: maxima and sums apart, they lose no digits to each other.
    shift_C = (maxima_2C[1] - maxima_2C[0]) + (log_sums_2C[1] - log_sums_2C[0])
    kl_C = sums_5C[2] / sums_5C[1] - shift_C
    return torch.stack([*logp_2C, kl_C]), maxima_2C + log_sums_2C


def _chunk_gradient(
    policy_Cv: Tensor, reference_Cv: Tensor, column_C: Tensor, normalisers_2C: Tensor, grad_3C: Tensor
) -> Tensor:
    """The gradient of the policy's logits, shape [C, v]; overwrites its first two arguments."""
    in_shard_C, column_C = locate(column_C, policy_Cv.shape[1])
    grad_logp_C, _, grad_kl_C = grad_3C
    pi_Cv = policy_Cv.sub_(normalisers_2C[0, :, None]).exp_()
    pi_ref_Cv = reference_Cv.sub_(normalisers_2C[1, :, None]).exp_()
    grad_Cv = pi_Cv.mul_((grad_kl_C - grad_logp_C)[:, None])
    grad_Cv.addcmul_(pi_ref_Cv, grad_kl_C[:, None], value=-1)
    return grad_Cv.scatter_add_(1, column_C[:, None], grad_logp_C.where(in_shard_C, 0)[:, None])
