"""Policy optimisation on sampled responses: one algorithm, whose methods differ in what they hand to it.

A method is a token reward, an advantage estimator, and the losses of policy and critic. Left out, as in the released
code: an early stop on the ratio.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from rto_megatron.algorithms.advantages import AllSum
from rto_megatron.algorithms.credit_metrics import (
    clip_metrics,
    credit_metrics,
    dpo_metrics,
    group_metrics,
    importance_metrics,
    source_metrics,
    value_metrics,
)
from rto_megatron.algorithms.kl_controller import KLController
from rto_megatron.algorithms.losses import WeightingName, keep
from rto_megatron.algorithms.policy_losses import Loss, clipped_policy_loss, with_entropy
from rto_megatron.algorithms.pool_importance import ImportanceMode, pool_importance
from rto_megatron.algorithms.token_rewards import (
    Redistribution,
    TokenReward,
    as_it_is,
    ppo_rewards,
    response_score,
    rto_rewards,
    truncated_rows,
)
from rto_megatron.section import Section
from rto_megatron.types import Experience, LossOutput, Metrics, ScoredRollouts, TokenRewards


class Config(Section):
    """What every method has; defaults are the paper's (App. D) and, where it is silent, the released code's.

    The exception is `truncated`: the released code does what is called `compat` here.

    Example:
        algorithm: {beta_kl: 0.1, samples_per_prompt: 4, loss_weights: token_mean}
    """

    beta_kl: float = Field(
        default=0.01, ge=0, description="weight of the KL penalty per token, the paper's beta_2"
    )
    samples_per_prompt: int = Field(default=1, ge=1, description="responses sampled for each prompt")
    loss_weights: WeightingName = Field(
        default="sequence_mean",
        description="mean over responses of their mean over tokens, mean over all tokens, or `constant`: sum over "
        "tokens over responses x sampling.max_response_tokens",
    )
    entropy_coef: float = Field(
        default=0.0, ge=0, description="weight of the entropy bonus in the policy's loss; 0: none"
    )
    score_clip: float | None = Field(
        default=10.0, gt=0, description="bound of the normalised reward-model score; null: no bound"
    )
    score_limit: float | None = Field(
        default=1000.0,
        gt=0,
        description="a normalised score beyond it is no score: nothing is trained on its rollout step, and the sample "
        "is named; null: any finite score is one",
    )
    epochs: int = Field(default=1, ge=1, description="passes over the responses of one rollout step")
    truncated: Literal["compat", "penalise", "mask"] = Field(
        default="penalise",
        description="responses cut by the length limit: `compat` overwrites the last token with end-of-"
        "sequence, as the released code does; `penalise` lowers their score; `mask` does not train on them",
    )
    truncated_penalty: float = Field(
        default=1.0,
        ge=0,
        description="subtracted from the score of a cut response when `truncated` is `penalise`",
    )
    ptx_coef: float = Field(
        default=0.05, gt=0, description="weight of the language-model loss on `data.pretrain`, if that is set"
    )
    ema_beta: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="keep and export an average of the policy, beta average + (1 - beta) policy after every "
        "optimizer step (OpenRLHF: 0.992); null: none",
    )
    pool_importance_cap: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="weigh a token's policy loss by min(pi_old / pi_pool, cap), which corrects for the gap between the "
        "pool's log-probs and the trainer's (verl, OpenRLHF: 2); null: no weight",
    )
    pool_importance_mode: ImportanceMode = Field(
        default="token_truncate",
        description="the ratio is a `token`'s or a response's (`sequence`: the product over its tokens), and one above "
        "the cap is lowered to it (`truncate`) or trains nothing (`mask`)",
    )

    @field_validator("pool_importance_cap")
    @classmethod
    def _refuse_cap_on_agreement(cls, cap: float | None) -> float | None:
        if cap is not None and cap < 1:
            raise ValueError(
                f"a cap below 1 weighs every token on which pool and trainer agree by {cap:g} too, which is a smaller "
                "learning rate; give at least 1, or null for no weight"
            )
        return cap

    def unread(self) -> Mapping[str, str]:
        """What has an effect with a cap or a penalty alone."""
        unread = dict(super().unread())
        if self.pool_importance_cap is None:
            unread["pool_importance_mode"] = (
                "without pool_importance_cap; remove it or set a cap (2 for tokens, as verl, or 3 for sequences, as "
                "TRL)"
            )
        if self.truncated != "penalise":
            unread["truncated_penalty"] = (
                f"with truncated={self.truncated!r}; remove it or set truncated to 'penalise'"
            )
        return unread

    @model_validator(mode="after")
    def _refuse_ignored_clip(self) -> Self:
        limit, clip = self.score_limit, self.score_clip
        if limit is not None and clip is not None and limit <= clip:
            raise ValueError(
                f"score_clip={clip:g} has no effect with score_limit={limit:g}: scores beyond the limit are not "
                "trained on; raise score_limit, or set score_clip to null"
            )
        return self


class ClipConfig(Section):
    """The keys of methods with a clipped surrogate.

    Example:
        algorithm: {clip_eps: 0.2, clip_eps_high: 0.28, dual_clip: 3.0}
    """

    clip_eps: float = Field(default=0.2, gt=0, lt=1, description="epsilon of the policy's clip")
    clip_eps_high: float | None = Field(
        default=None, gt=0, description="epsilon of its upper bound (DAPO: 0.28); null: clip_eps"
    )
    dual_clip: float | None = Field(
        default=None,
        gt=1,
        description="bound of the ratio where the advantage is negative (arXiv 1912.09729: 3); null: none",
    )

    def surrogate(self, loss: Callable[..., LossOutput] = clipped_policy_loss) -> Loss:
        """A clipped loss with these bounds."""
        bounds = {"clip_eps_high": self.clip_eps_high, "dual_clip": self.dual_clip}
        return partial(loss, clip_eps=self.clip_eps, **bounds)


class KlRewardConfig(Config):
    """The keys of methods whose KL penalty is part of the token reward.

    Example:
        algorithm: {beta_kl: 0.1, kl_target: 6.0, kl_horizon: 10000}
    """

    kl_target: float | None = Field(
        default=None,
        gt=0,
        description="nats per token that an adaptive beta_kl steers to; null: it stays fixed",
    )
    kl_horizon: int = Field(default=10000, ge=1, description="sequences over which an adaptive beta_kl moves")

    def unread(self) -> Mapping[str, str]:
        """`kl_horizon`, which a fixed beta_kl has not."""
        why = "without kl_target; remove it or set kl_target"
        return {**super().unread(), **({"kl_horizon": why} if self.kl_target is None else {})}

    @model_validator(mode="after")
    def _refuse_steering_zero(self) -> Self:
        if self.kl_target is not None and self.beta_kl == 0:
            raise ValueError(
                f"kl_target={self.kl_target} cannot steer beta_kl=0, which stays 0; give beta_kl a start"
            )
        return self

    def kl_controller(self) -> KLController:
        """The controller of the first step."""
        return KLController(self.beta_kl, self.kl_target, self.kl_horizon)


class RewardConfig(KlRewardConfig):
    """The keys of methods that discount token rewards.

    Example:
        algorithm: {beta_kl: 0.1, gamma: 0.99}
    """

    gamma: float = Field(default=1.0, ge=0, le=1, description="discount per token")


class GroupConfig(Config):
    """The keys of methods that compare the responses to a prompt.

    Example:
        algorithm: {samples_per_prompt: 8, max_sampling_rounds: 4}
    """

    samples_per_prompt: int = Field(default=8, ge=2, description="responses sampled for each prompt: a group")
    max_sampling_rounds: int | None = Field(
        default=None,
        ge=1,
        description="batches of prompts that a step may sample until it is full of groups whose scores differ (DAPO's "
        "dynamic sampling); null: one, and every group is trained on",
    )


class DpoRewardConfig(Section):
    """The keys of methods with a DPO reward.

    The released script clips the DPO reward at 0.05 and the paper names no clip: the default is the script's.

    Example:
        algorithm: {beta_dpo: 0.05, dpo_clip: 10.0}
    """

    beta_dpo: float = Field(
        default=0.05,
        ge=0,
        description="weight of the DPO reward per token, the paper's beta_1; 0: none, and no DPO model",
    )
    dpo_clip: float | None = Field(
        default=0.05,
        gt=0,
        description="bound of the DPO reward of a token after scaling; null: no bound, as in the paper",
    )

    def unread(self) -> Mapping[str, str]:
        """Without a DPO reward, its bound."""
        why = "with beta_dpo=0; remove it or give beta_dpo a weight, such as 0.05"
        return {**super().unread(), **({"dpo_clip": why} if self.beta_dpo == 0 else {})}

    def token_reward(
        self, redistribute: Redistribution = as_it_is, beside: TokenReward = ppo_rewards
    ) -> TokenReward:
        """RTO's reward at these weights, its DPO part paid on the tokens that `redistribute` chooses."""
        return partial(
            rto_rewards,
            beta_dpo=self.beta_dpo,
            dpo_clip=self.dpo_clip,
            redistribute=redistribute,
            beside=beside,
        )


class OptionalDpoConfig(DpoRewardConfig):
    """The same keys in methods that are known without a DPO reward: it is off until `beta_dpo` is set.

    Example:
        algorithm: {beta_dpo: 0.05}
    """

    beta_dpo: float = Field(
        default=0.0, ge=0, description="weight of RTO's DPO reward per token; 0: none, and no DPO model"
    )


# (scored, rewards, mask of the trained tokens, all_sum) -> advantages and returns, [B, R] each
Estimator = Callable[[ScoredRollouts, TokenRewards, Tensor, AllSum], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PolicyOptimization:
    """Credit assignment and losses of one method.

    Example:
        experience = method.credit(scored, kl_coef=0.1, all_sum=topology.dp_sum)
    """

    config: Config
    token_reward: TokenReward
    advantages: Estimator
    policy_loss: Loss  # of the actions' log-probs under the policy being trained, nats
    value_loss: Loss | None  # of the critic's values of the states before the actions; None: no critic
    kl_controller: KLController  # of the first step
    needs_dpo: bool = False
    critic_warmup_steps: int = 0

    def update_loss(self) -> Loss:
        """What the policy minimises: `policy_loss`, or with an entropy bonus a loss that reads entropies as well."""
        coef = self.config.entropy_coef
        return with_entropy(self.policy_loss, coef) if coef else self.policy_loss

    def credit(self, scored: ScoredRollouts, kl_coef: float, all_sum: AllSum) -> Experience:
        """Token rewards, then advantages; `mask_BR` of the result is 0 on responses that are not trained on.

        Args:
            scored: rollouts of this data-parallel rank.
            kl_coef: coefficient of the KL penalty at this step; `KLController` holds it.
            all_sum: sum over the data-parallel ranks; every rank must call this method.
        """
        config, mask_BR = self.config, scored.mask_BR
        score_B = response_score(scored, config.score_clip, config.truncated, config.truncated_penalty)
        rewards = replace(self.token_reward(scored, score_B, kl_coef), source_BR=scored.source_BR)
        if config.truncated == "mask":
            mask_BR = keep(mask_BR, ~truncated_rows(scored).unsqueeze(1))
        advantages_BR, returns_BR = self.advantages(scored, rewards, mask_BR, all_sum)
        return Experience(
            rollouts=scored.rollouts,
            mask_BR=mask_BR,
            logp_old_BR=scored.logp_old_BR,
            logp_ref_BR=scored.logp_ref_BR,
            pool_importance_BR=pool_importance(
                scored, config.pool_importance_cap, config.pool_importance_mode
            ),
            values_BR=scored.values_BR,
            advantages_BR=advantages_BR,
            returns_BR=returns_BR,
            rewards=rewards,
            drawn=scored.drawn,
        )

    def credit_metrics(self, scored: ScoredRollouts, experience: Experience) -> Metrics:
        """Sums for the logs of this rank's rollouts."""
        config = self.config
        cap, samples = config.pool_importance_cap, config.samples_per_prompt
        return {
            **credit_metrics(scored, experience),
            **(clip_metrics(scored, config.score_clip) if config.score_clip is not None else {}),
            **(value_metrics(experience) if self.value_loss is not None else {}),
            **(dpo_metrics(scored, experience) if self.needs_dpo else {}),
            **(
                importance_metrics(scored, experience, cap, config.pool_importance_mode)
                if cap is not None
                else {}
            ),
            **(group_metrics(scored, experience.rewards, samples) if samples > 1 else {}),
            **(source_metrics(scored) if scored.scores_by_source else {}),
        }
