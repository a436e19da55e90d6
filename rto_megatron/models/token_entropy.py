"""Log-probabilities of given tokens and the entropy of every position, over a split vocabulary, from states.

For logits z with largest value M, S = sum_j exp(z_j - M) and p = exp(z - M) / S, each position needs

    log pi(target) = z_target - M - log S,    H = log S - sum_j p_j (z_j - M).

Letters of tensors are those of `output_head.py`.
"""

import torch
from torch import Tensor

from rto_megatron.models.output_head import OutputProjection, Shard, Targets, read_in_chunks
from rto_megatron.models.token_logprobs import drawn_logits


def token_entropies(hidden_Nh: Tensor, projection: OutputProjection, asked: Targets, chunk: int) -> Tensor:
    """Log-probs of the targets and entropies, both of softmax(logits / temperature), in float32, nats.

    Args:
        hidden_Nh: as all arguments, see `token_logprobs`.

    Returns:
        [2, N], equal on all tensor ranks.
    """
    return read_in_chunks(hidden_Nh, projection, _Entropies(projection.shard, asked), chunk)


class _Entropies:
    """See `Statistic`."""

    def __init__(self, shard: Shard, asked: Targets) -> None:
        self._shard = shard
        self._asked = asked

    def part(self, logits_Cv: Tensor, rows: slice) -> Tensor:
        logits_Cv = drawn_logits(logits_Cv, self._shard, self._asked, rows)
        largest_C = self._shard.largest(logits_Cv)
        chosen_C = self._shard.chosen(logits_Cv, self._asked.targets_N[rows])
        shifted_Cv = logits_Cv.sub_(largest_C[:, None])
        exp_Cv = shifted_Cv.exp()
        sum_exp_C = exp_Cv.sum(1)
        # p log p is 0 where p is; 0 times the -inf of a banned token is not.
        weighted_C = shifted_Cv.masked_fill_(exp_Cv == 0, 0).mul_(exp_Cv).sum(1)
        return torch.stack([largest_C, sum_exp_C, weighted_C, chosen_C])

    def combined(self, parts_mN: Tensor) -> tuple[Tensor, Tensor]:
        largest_N, below_N = self._shard.over_all(parts_mN[0])
        scale_N = below_N.exp()
        weighted_N = scale_N * (parts_mN[2] + below_N * parts_mN[1])
        sums_3N = self._shard.total(torch.stack([scale_N * parts_mN[1], weighted_N, parts_mN[3]]))
        log_sum_N = sums_3N[0].log()
        logp_N = sums_3N[2] - largest_N - log_sum_N
        # Of shifted logits: they lose no digits to the size of the logits.
        entropy_N = log_sum_N - sums_3N[1] / sums_3N[0]
        return torch.stack([logp_N, entropy_N]), torch.stack([largest_N, log_sum_N, entropy_N])

    def gradient(self, logits_Cv: Tensor, rows: slice, kept_nC: Tensor, grad_kC: Tensor) -> Tensor:
        """d log pi(target) = onehot - p and d H = -p (log p + H)."""
        largest_C, log_sum_C, entropy_C = kept_nC
        grad_logp_C, grad_entropy_C = grad_kC
        logits_Cv = drawn_logits(logits_Cv, self._shard, self._asked, rows)
        logp_Cv = logits_Cv.sub_(largest_C[:, None]).sub_(log_sum_C[:, None])
        p_Cv = logp_Cv.exp()
        logp_Cv.masked_fill_(p_Cv == 0, 0).add_(entropy_C[:, None]).mul_(-grad_entropy_C[:, None])
        grad_Cv = p_Cv.mul_(logp_Cv.sub_(grad_logp_C[:, None]))
        self._shard.add_to_targets(grad_Cv, self._asked.targets_N[rows], grad_logp_C)
        return grad_Cv.div_(self._asked.temperature)
