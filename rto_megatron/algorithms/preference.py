"""What the losses on pairs of answers share: sums per answer, cDPO's label smoothing, TRL's metrics.

Legend: T token positions of a micro-batch, S = 2 P its sequences, P pairs. Row 0 of a [2, P] tensor is the chosen
answers, row 1 the rejected ones. Entries of pairs of weight 0 are 0, whatever finite numbers the padding holds.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from rto_megatron.algorithms.losses import keep, sequence_sums
from rto_megatron.types import LossOutput, PairMicrobatch


def response_sums(x_T: Tensor, micro: PairMicrobatch) -> Tensor:
    """Sum of `x_T` over the response tokens of each answer, shape [2, P]: log-probs, or ones to count tokens."""
    sums_S = sequence_sums(x_T, micro.mask_T, micro.batch)
    return keep(sums_S.view(2, -1), micro.weight_P)


def reference_logprobs(micro: PairMicrobatch) -> Tensor:
    """Log-probs of the answers under the reference, nats, summed over the response, shape [2, P]."""
    return keep(micro.logp_ref_S.view(2, -1), micro.weight_P)


def smoothed_logsigmoid(margins_P: Tensor, label_smoothing: float) -> Tensor:
    """Log-likelihood of labels that are wrong with probability eps: (1 - eps) log sigmoid(m) + eps log sigmoid(-m).

    Args:
        margins_P: m, the log-odds that the chosen answer is the better one, shape [P].
        label_smoothing: eps.

    Returns:
        Shape [P]. Source: cDPO; eric-mitchell/direct-preference-optimization, trainers.py:preference_loss.
    """
    return (1 - label_smoothing) * logsigmoid(margins_P) + label_smoothing * logsigmoid(-margins_P)


def preference_output(
    losses_P: Tensor, rewards_2P: Tensor, logp_2P: Tensor, micro: PairMicrobatch
) -> LossOutput:
    """Weighted sum of the losses, and TRL's metrics: sums over pairs with their number.

    A tie is no win in `rewards/accuracies`, as in TRL, so before the first update, where the policy is the
    reference, it is 0; `rewards/ties` tells this from a policy that prefers the wrong answers.

    Args:
        losses_P: loss of each pair, shape [P].
        rewards_2P: implicit rewards as the method reports them, shape [2, P].
        logp_2P: log-probs under the policy, nats, summed over the response, shape [2, P].
        micro: where the weights are.
    """
    loss = (micro.weight_P * losses_P).sum()
    margins_P = rewards_2P[0] - rewards_2P[1]
    num_pairs = (micro.weight_P > 0).sum()
    sums = {
        "loss": (loss, micro.weight_P.sum()),
        "rewards/chosen": (rewards_2P[0].sum(), num_pairs),
        "rewards/rejected": (rewards_2P[1].sum(), num_pairs),
        "rewards/accuracies": ((margins_P > 0).sum(), num_pairs),
        "rewards/ties": (((margins_P == 0) & (micro.weight_P > 0)).sum(), num_pairs),
        "rewards/margins": (margins_P.sum(), num_pairs),
        "logps/chosen": (logp_2P[0].sum(), num_pairs),
        "logps/rejected": (logp_2P[1].sum(), num_pairs),
    }
    return LossOutput(loss, sums)
