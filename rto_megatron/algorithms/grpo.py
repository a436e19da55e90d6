"""Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300): a response is compared with its siblings."""

from pydantic import Field
from torch import Tensor

from rto_megatron.algorithms import reinforcement
from rto_megatron.algorithms.advantages import AllSum
from rto_megatron.algorithms.kl_controller import KLController
from rto_megatron.algorithms.losses import clipped_policy_loss, keep, to_metrics
from rto_megatron.algorithms.method import OnlineMethod, Vocabulary
from rto_megatron.algorithms.reinforcement import PolicyOptimization
from rto_megatron.algorithms.token_rewards import kl_k3, score_rewards
from rto_megatron.types import LossOutput, Minibatch, ScoredRollouts, TokenRewards

_STD_FLOOR = 1e-4  # as TRL adds it: a group of equal scores teaches nothing instead of dividing by zero


class Config(reinforcement.Config):
    """DeepSeekMath's KL weight; the KL is a term of the loss, not of the reward.

    Example:
        algorithm: {beta_kl: 0.04, samples_per_prompt: 8}
    """

    beta_kl: float = Field(default=0.04, ge=0, description="weight of the KL term of the loss")
    samples_per_prompt: int = Field(default=8, ge=2, description="responses sampled for each prompt: a group")


def group_advantages(score_B: Tensor, group_size: int) -> Tensor:
    """(score - mean of its group) / (standard deviation of its group, unbiased, + 1e-4), shape [B].

    Args:
        score_B: the responses to one prompt stand side by side.
        group_size: responses to a prompt; divides B.

    Source: arXiv 2402.03300, section 4.1.2; TRL, trainer/grpo_trainer.py for the estimate of the deviation.
    """
    groups = score_B.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + _STD_FLOOR)).flatten()


def build(config: Config, vocabulary: Vocabulary) -> PolicyOptimization:
    """The group-relative score on every token of a response, and k3 to the reference in the loss."""

    def advantages(
        scored: ScoredRollouts, rewards: TokenRewards, mask_BR: Tensor, all_sum: AllSum
    ) -> tuple[Tensor, Tensor]:
        score_B = rewards.total_BR().sum(dim=1)
        relative_B = group_advantages(score_B, config.samples_per_prompt)
        return keep(relative_B.unsqueeze(1), mask_BR), keep(score_B.unsqueeze(1), scored.mask_BR)

    def policy_loss(logp_T: Tensor, minibatch: Minibatch) -> LossOutput:
        surrogate = clipped_policy_loss(logp_T, minibatch, config.clip_eps)
        weight_T = minibatch.weight_T
        kl = (weight_T * kl_k3(logp_T, minibatch.logp_ref_T, weight_T)).sum()
        metrics = to_metrics({"loss/kl_avg": (kl, weight_T.sum())})
        return LossOutput(surrogate.loss + config.beta_kl * kl, {**surrogate.metrics, **metrics})

    return PolicyOptimization(
        config=config,
        token_reward=score_rewards,
        advantages=advantages,
        policy_loss=policy_loss,
        value_loss=None,
        kl_controller=KLController(config.beta_kl, None, 1),
    )


METHOD = OnlineMethod(Config, build, has_critic=False)
