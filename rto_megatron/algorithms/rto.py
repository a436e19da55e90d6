"""Reinforced Token Optimization (arXiv 2404.18922): PPO with a DPO model's implicit reward on every token.

Everything but the token reward is PPO's; with `beta_dpo` 0 the two are bit-equal.
"""

from pydantic import Field
from torch import Tensor

from rto_megatron.algorithms import ppo
from rto_megatron.algorithms.advantages import AllSum
from rto_megatron.algorithms.credit_metrics import dpo_metrics
from rto_megatron.algorithms.token_rewards import rto_rewards
from rto_megatron.types import Experience, LossOutput, Metrics, Minibatch, ScoredRollouts


class Config(ppo.Config):
    """PPO's keys and the two of the DPO reward.

    The released script clips the DPO reward at 0.05 and the paper names no clip: the default is the script's,
    the `paper` preset sets `dpo_clip` to null.
    """

    beta_dpo: float = Field(
        default=0.05,
        ge=0,
        description="weight of the DPO reward per token, the paper's beta_1; 0 is PPO, without a DPO model",
    )
    dpo_clip: float | None = Field(
        default=0.05,
        gt=0,
        description="bound of the DPO reward of a token after scaling; null: no bound, as in the paper",
    )


class RTO:
    """r_t = beta_dpo log(pi_dpo / pi_ref) - beta_kl log(pi / pi_ref), plus the score at the end (eq. 4.7)."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.needs_dpo = config.beta_dpo != 0
        self._ppo = ppo.PPO(config)

    def credit(self, scored: ScoredRollouts, kl_coef: float, all_sum: AllSum) -> Experience:
        """Token rewards, then advantages.

        Args:
            scored: rollouts of this data-parallel rank, with the DPO model's log-ratio.
            kl_coef: coefficient of the KL penalty at this step; `KLController` holds it.
            all_sum: sum over the data-parallel ranks; every rank must call this method.
        """
        score_B = self._ppo.response_score(scored)
        rewards = rto_rewards(scored, score_B, kl_coef, self.config.beta_dpo, self.config.dpo_clip)
        return self._ppo.experience(scored, rewards, all_sum)

    def credit_metrics(self, scored: ScoredRollouts, experience: Experience) -> Metrics:
        """Sums for the logs of this rank's rollouts: PPO's and those of the DPO reward."""
        dpo = dpo_metrics(scored, experience, self.config.beta_dpo, self.config.dpo_clip)
        return {**self._ppo.credit_metrics(scored, experience), **dpo}

    def policy_loss(self, logp_T: Tensor, m: Minibatch) -> LossOutput:
        """PPO's."""
        return self._ppo.policy_loss(logp_T, m)

    def value_loss(self, values_T: Tensor, m: Minibatch) -> LossOutput:
        """PPO's."""
        return self._ppo.value_loss(values_T, m)
