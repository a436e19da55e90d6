"""Log-probabilities of given tokens over a split vocabulary, from the states that the output projection reads.

For logits z with largest value M and S = sum_j exp(z_j - M), log pi(target) = z_target - M - log S. Letters of tensors
are those of `output_head.py`.
"""

import torch
from torch import Tensor

from rto_megatron.models.output_head import OutputProjection, Shard, Targets, read_in_chunks


def token_logprobs(hidden_Nh: Tensor, projection: OutputProjection, asked: Targets, chunk: int) -> Tensor:
    """log softmax(logits / temperature)[targets] in float32; see `output_head.read_in_chunks`.

    Args:
        hidden_Nh: final states of the positions that are asked for.
        projection: of the model; all ranks of its group must call this, with the same targets.
        asked: the targets, and what their log-probs are of.
        chunk: positions whose logits exist at a time.

    Returns:
        [N] float32, nats, equal on all tensor ranks.
    """
    return read_in_chunks(hidden_Nh, projection, _Logprobs(projection.shard, asked), chunk)[0]


def drawn_logits(logits_Cv: Tensor, shard: Shard, asked: Targets, rows: slice) -> Tensor:
    """Logits of what is sampled from, in place: over the temperature, -inf where a token is banned."""
    if asked.temperature != 1:
        logits_Cv.div_(asked.temperature)
    if asked.banned is not None:
        columns = [i - shard.first for i in asked.banned.ids if 0 <= i - shard.first < shard.num_columns]
        is_banned_C1 = asked.banned.is_banned_T[rows, None]
        logits_Cv[:, columns] = logits_Cv[:, columns].masked_fill(is_banned_C1, float("-inf"))
    return logits_Cv


class _Logprobs:
    """See `Statistic`."""

    def __init__(self, shard: Shard, asked: Targets) -> None:
        self._shard = shard
        self._asked = asked

    def part(self, logits_Cv: Tensor, rows: slice) -> Tensor:
        logits_Cv = drawn_logits(logits_Cv, self._shard, self._asked, rows)
        largest_C = self._shard.largest(logits_Cv)
        chosen_C = self._shard.chosen(logits_Cv, self._asked.targets_N[rows])
        sum_exp_C = logits_Cv.sub_(largest_C[:, None]).exp_().sum(1)
        return torch.stack([largest_C, sum_exp_C, chosen_C])

    def combined(self, parts_mN: Tensor) -> tuple[Tensor, Tensor]:
        largest_N, below_N = self._shard.over_all(parts_mN[0])
        sum_exp_N, chosen_N = self._shard.total(torch.stack([parts_mN[1] * below_N.exp(), parts_mN[2]]))
        logp_N = chosen_N - largest_N - sum_exp_N.log()
        return logp_N[None], torch.stack([largest_N, sum_exp_N])

    def gradient(self, logits_Cv: Tensor, rows: slice, kept_nC: Tensor, grad_kC: Tensor) -> Tensor:
        """d log pi(target) = onehot - pi."""
        largest_C, sum_exp_C = kept_nC
        exp_Cv = drawn_logits(logits_Cv, self._shard, self._asked, rows).sub_(largest_C[:, None]).exp_()
        grad_Cv = exp_Cv.mul_((-grad_kC[0] / sum_exp_C)[:, None])
        self._shard.add_to_targets(grad_Cv, self._asked.targets_N[rows], grad_kC[0])
        return grad_Cv if self._asked.temperature == 1 else grad_Cv.div_(self._asked.temperature)
