"""Bradley-Terry reward model: a sequence's score is the scalar head at its last token."""

import math

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from rto_megatron.algorithms.losses import keep
from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.section import Section
from rto_megatron.types import LossOutput, PairMicrobatch


class Config(Section):
    """The reward model's loss.

    Example:
        algorithm: {margin: true}
    """

    margin: bool = Field(default=False, description="subtract each pair's `margin` inside the log-sigmoid")


class RewardModel:
    """L = - log sigmoid(r_chosen - r_rejected [- margin]), mean over pairs.

    Example:
        RewardModel(Config(margin=True)).loss(values_T, pairs).metrics
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def loss(self, values_T: Tensor, micro: PairMicrobatch) -> LossOutput:
        """Weighted Bradley-Terry loss.

        Args:
            values_T: output of the scalar head, shape [T].
            micro: P pairs, the chosen sequences first.

        Source: OpenRLHF 0.4.4, models/loss.py:PairWiseLoss. Metric names are TRL's; `mean_reward` and
        `mean_squared_reward` run over both answers of every pair and are what `reward_statistics` takes.
        """
        scores_S = values_T[list(micro.batch.last_positions)]
        scores_2P = keep(scores_S.view(2, -1), micro.weight_P)
        chosen_P, rejected_P = scores_2P
        difference_P = chosen_P - rejected_P
        logits_P = difference_P - keep(micro.margin_P, micro.weight_P) if self.config.margin else difference_P
        loss = -(micro.weight_P * logsigmoid(logits_P)).sum()
        num_pairs = (micro.weight_P > 0).sum()
        sums = {
            "loss": (loss, micro.weight_P.sum()),
            "accuracy": ((difference_P > 0).sum(), num_pairs),
            "ties": (((difference_P == 0) & (micro.weight_P > 0)).sum(), num_pairs),
            "margin": (difference_P.sum(), num_pairs),
            "mean_reward": (scores_2P.double().sum(), 2 * num_pairs),
            "mean_squared_reward": (scores_2P.double().square().sum(), 2 * num_pairs),
        }
        return LossOutput(loss, sums)


def reward_statistics(count: float, total: float, total_squares: float) -> tuple[float, float]:
    """Mean and unbiased standard deviation of reward scores; they normalise the scores of the checkpoint.

    Args:
        count: scores, chosen and rejected of all ranks; at least 2.
        total: their sum.
        total_squares: the sum of their squares.

    Returns:
        Mean and standard deviation (divisor count - 1, at least 1e-8), in units of the score.

    Raises:
        ValueError: fewer than 2 scores.

    Source: OpenRLHF 0.4.4, trainer/rm_trainer.py:evaluate.
    """
    if count < 2:
        raise ValueError(f"an unbiased standard deviation needs at least 2 scores, got {count}")
    mean = total / count
    variance = max(total_squares - count * mean * mean, 0.0) / (count - 1)
    return mean, max(math.sqrt(variance), 1e-8)


METHOD = OfflineMethod(Config, RewardModel, examples="pairs", outputs="values")
