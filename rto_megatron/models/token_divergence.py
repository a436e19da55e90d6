"""Log-probabilities under policy and reference and the KL between them, over a split vocabulary, from both's states.

For logits z and z' of policy and reference, with log-normalisers Z and Z', each position needs

    log pi(target) = z_target - Z,    log pi_ref(target) = z'_target - Z',
    KL(pi_ref || pi) = sum_j pi_ref(j) (z'_j - z_j) - (Z' - Z).

Letters of tensors are those of `output_head.py`. Beyond what log-probs alone take (`head_memory.py`) there are the
reference's states, e h bytes a position, which a step keeps for all its micro-batches, and its logits of one chunk.
"""

import torch
from torch import Tensor

from rto_megatron.models.output_head import OutputProjection, Shard, read_in_chunks


def token_divergence(
    hidden_Nh: Tensor,
    projection: OutputProjection,
    reference: tuple[Tensor, OutputProjection],
    targets_N: Tensor,
    chunk: int,
) -> Tensor:
    """What TDPO reads of every position: log pi(target), log pi_ref(target), KL(pi_ref || pi); float32, nats.

    Every rank of the projection's group must call it, with the same targets and states.

    Args:
        hidden_Nh: final states of the policy; they and its projection get a gradient, from the first and the last row
            of the output.
        projection: of the policy.
        reference: the same of the reference, over the same vocabulary, without gradients.
        targets_N: int64.
        chunk: positions whose logits exist at a time.

    Returns:
        [3, N], equal on all tensor ranks.
    """
    statistic = _Divergence(projection.shard, reference, targets_N)
    return read_in_chunks(hidden_Nh, projection, statistic, chunk)


class _Divergence:
    """See `Statistic`."""

    def __init__(self, shard: Shard, reference: tuple[Tensor, OutputProjection], targets_N: Tensor) -> None:
        self._shard = shard
        self._reference_Nh, projection = reference
        self._reference_vh = projection.weight_vh[: shard.num_columns]
        self._reference_shaping = projection.shaping
        self._targets_N = targets_N

    def part(self, logits_Cv: Tensor, rows: slice) -> Tensor:
        both = (logits_Cv, self._reference(rows))
        policy_Cv, reference_Cv = both
        largest = [self._shard.largest(z_Cv) for z_Cv in both]
        chosen = [self._shard.chosen(z_Cv, self._targets_N[rows]) for z_Cv in both]
        difference_Cv = reference_Cv - policy_Cv
        weights_Cv = reference_Cv.sub_(largest[1][:, None]).exp_()
        sum_exp_C = policy_Cv.sub_(largest[0][:, None]).exp_().sum(1)
        sums = (sum_exp_C, weights_Cv.sum(1), difference_Cv.mul_(weights_Cv).sum(1))
        return torch.stack([*largest, *sums, *chosen])

    def combined(self, parts_mN: Tensor) -> tuple[Tensor, Tensor]:
        largest_2N, below_2N = self._shard.over_all(parts_mN[:2])
        scale_2N = below_2N.exp()
        own = (parts_mN[2:4] * scale_2N, (parts_mN[4] * scale_2N[1])[None], parts_mN[5:])
        sums_5N = self._shard.total(torch.cat(own))
        log_sums_2N = sums_5N[:2].log()
        logp_2N = sums_5N[3:] - largest_2N - log_sums_2N
        # Small differences of large normalisers: maxima and sums apart, they lose no digits to each other.
        shift_N = (largest_2N[1] - largest_2N[0]) + (log_sums_2N[1] - log_sums_2N[0])
        kl_N = sums_5N[2] / sums_5N[1] - shift_N
        return torch.cat([logp_2N, kl_N[None]]), torch.cat([largest_2N, sums_5N[:2]])

    def gradient(self, logits_Cv: Tensor, rows: slice, kept_nC: Tensor, grad_kC: Tensor) -> Tensor:
        """d log pi(target) = onehot - pi and d KL = pi - pi_ref."""
        grad_logp_C, _, grad_kl_C = grad_kC
        reference_Cv = self._reference(rows)
        pi_Cv, pi_ref_Cv = (
            z_Cv.sub_(kept_nC[i, :, None]).exp_().div_(kept_nC[2 + i, :, None])
            for i, z_Cv in enumerate((logits_Cv, reference_Cv))
        )
        grad_Cv = pi_Cv.mul_((grad_kl_C - grad_logp_C)[:, None])
        grad_Cv.addcmul_(pi_ref_Cv, grad_kl_C[:, None], value=-1)
        return self._shard.add_to_targets(grad_Cv, self._targets_N[rows], grad_logp_C)

    def _reference(self, rows: slice) -> Tensor:
        return self._reference_shaping.logits(self._reference_Nh[rows], self._reference_vh)
