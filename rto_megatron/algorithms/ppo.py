"""Proximal Policy Optimization from human feedback: the baseline, and everything of RTO but its token reward.

Left out, as in the released code: entropy bonus, dual clip, early stop on the ratio, pre-training loss.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from rto_megatron.algorithms.advantages import AllSum, gae, whiten
from rto_megatron.algorithms.credit_metrics import credit_metrics
from rto_megatron.algorithms.losses import clipped_policy_loss, clipped_value_loss, keep
from rto_megatron.algorithms.termination import TruncationPolicy
from rto_megatron.algorithms.token_rewards import ppo_rewards, response_score, truncated_rows
from rto_megatron.types import Experience, LossOutput, Metrics, Minibatch, ScoredRollouts, TokenRewards


class Config(BaseModel):
    """Defaults are the paper's (App. D) and, where it is silent, the released code's, but for `truncated`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    beta_kl: float = Field(
        default=0.01, ge=0, description="weight of the KL penalty per token, the paper's beta_2"
    )
    kl_target: float | None = Field(
        default=None,
        gt=0,
        description="nats per token that an adaptive beta_kl steers to; null: it stays fixed",
    )
    kl_horizon: int = Field(default=10000, ge=1, description="sequences over which an adaptive beta_kl moves")
    gamma: float = Field(default=1.0, ge=0, le=1, description="discount per token")
    lam: float = Field(default=0.95, ge=0, le=1, description="lambda of generalised advantage estimation")
    clip_eps: float = Field(default=0.2, gt=0, lt=1, description="epsilon of the policy's clip")
    value_clip: float | None = Field(
        default=0.2, gt=0, description="largest rewarded move of a value; null: no clip"
    )
    loss_weights: Literal["sequence_mean", "token_mean"] = Field(
        default="sequence_mean",
        description="mean over responses of their mean over tokens, or mean over all tokens",
    )
    score_clip: float | None = Field(
        default=10.0, gt=0, description="bound of the normalised reward-model score; null: no bound"
    )
    epochs: int = Field(default=1, ge=1, description="passes over the responses of one rollout step")
    truncated: TruncationPolicy = Field(
        default="penalise",
        description="responses cut by the length limit: `compat` overwrites the last token with end-of-"
        "sequence, as the released code does; `penalise` lowers their score; `mask` does not train on them",
    )
    truncated_penalty: float = Field(
        default=1.0,
        ge=0,
        description="subtracted from the score of a cut response when `truncated` is `penalise`",
    )

    @model_validator(mode="after")
    def _refuse_ignored_keys(self) -> Self:
        fields = type(self).model_fields
        if self.truncated != "penalise" and self.truncated_penalty != fields["truncated_penalty"].default:
            raise ValueError(
                f"truncated_penalty={self.truncated_penalty} has no effect with "
                f"truncated={self.truncated!r}; remove it or set truncated to 'penalise'"
            )
        if self.kl_target is None and self.kl_horizon != fields["kl_horizon"].default:
            raise ValueError(
                f"kl_horizon={self.kl_horizon} has no effect without kl_target; remove it or set kl_target"
            )
        return self


class PPO:
    """Score on the last token, KL penalty on every token, clipped policy and value losses."""

    needs_dpo: bool = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def credit(self, scored: ScoredRollouts, kl_coef: float, all_sum: AllSum) -> Experience:
        """Token rewards, then advantages.

        Args:
            scored: rollouts of this data-parallel rank.
            kl_coef: coefficient of the KL penalty at this step; `KLController` holds it.
            all_sum: sum over the data-parallel ranks; every rank must call this method.
        """
        return self.experience(scored, ppo_rewards(scored, self.response_score(scored), kl_coef), all_sum)

    def response_score(self, scored: ScoredRollouts) -> Tensor:
        """What each response is paid as a whole, after clamp and truncation penalty, shape [B]."""
        penalty = self.config.truncated_penalty if self.config.truncated == "penalise" else 0.0
        return response_score(scored, self.config.score_clip, penalty)

    def experience(self, scored: ScoredRollouts, rewards: TokenRewards, all_sum: AllSum) -> Experience:
        """Advantages from any token reward; its `mask_BR` is 0 on responses that are not trained on."""
        mask_BR = scored.mask_BR
        advantages_BR, returns_BR = gae(
            rewards.total_BR(), scored.values_BR, mask_BR, self.config.gamma, self.config.lam
        )
        if self.config.truncated == "mask":
            mask_BR = keep(mask_BR, ~truncated_rows(scored).unsqueeze(1))
        return Experience(
            rollouts=scored.rollouts,
            mask_BR=mask_BR,
            logp_old_BR=scored.logp_old_BR,
            values_BR=scored.values_BR,
            advantages_BR=whiten(advantages_BR, mask_BR, all_sum),
            returns_BR=returns_BR,
            rewards=rewards,
        )

    def credit_metrics(self, scored: ScoredRollouts, experience: Experience) -> Metrics:
        """Sums for the logs of this rank's rollouts."""
        return credit_metrics(scored, experience)

    def policy_loss(self, logp_T: Tensor, m: Minibatch) -> LossOutput:
        """Clipped surrogate; `logp_T` [T] are the actions' log-probs under the policy being trained, nats."""
        return clipped_policy_loss(logp_T, m, self.config.clip_eps)

    def value_loss(self, values_T: Tensor, m: Minibatch) -> LossOutput:
        """Clipped squared error; `values_T` [T] are the critic's values of the states before the actions."""
        return clipped_value_loss(values_T, m, self.config.value_clip)
