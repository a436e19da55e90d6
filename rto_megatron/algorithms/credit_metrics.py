"""Sums for the logs of one rollout step; names are TRL's where TRL has them.

Every metric is (sum, count) of this rank. `objective/*`, `rollout/*` and `reward/score` are means over
responses, the rest over tokens.
"""

from collections.abc import Mapping

from rto_megatron.algorithms.losses import count_tokens, keep
from rto_megatron.algorithms.pool_importance import ImportanceMode, pool_ratio
from rto_megatron.algorithms.token_rewards import kl_k1, kl_k3, truncated_rows
from rto_megatron.sums import to_metrics
from rto_megatron.types import Experience, Metrics, ScoredRollouts, TokenRewards


def credit_metrics(scored: ScoredRollouts, experience: Experience) -> Metrics:
    """What credit assignment saw.

    objective/scores            reward model's normalised score, before clamp and penalty
    objective/kl                k1 summed over the response, nats
    objective/entropy           minus the log-prob of the response, nats
    objective/rlhf_reward       score after clamp and penalty, less the KL penalty; without the DPO reward
    reward/score                score after clamp and penalty
    reward/kl_per_token         the KL penalty as it enters the reward
    policy/kl_per_token         k1, nats: what `KLController.update` takes
    policy/kl_k3_per_token      k3, nats
    """
    mask_BR, rewards = scored.mask_BR, experience.rewards
    k1 = kl_k1(scored.logp_old_BR, scored.logp_ref_BR, mask_BR).sum()
    k3 = kl_k3(scored.logp_old_BR, scored.logp_ref_BR, mask_BR).sum()
    num_sequences = mask_BR.new_tensor(len(scored.rollouts))
    num_tokens = count_tokens(mask_BR)
    return to_metrics(
        {
            "objective/scores": (scored.score_B.sum(), num_sequences),
            "objective/kl": (k1, num_sequences),
            "objective/entropy": (-keep(scored.logp_old_BR, mask_BR).sum(), num_sequences),
            "objective/rlhf_reward": (rewards.score_BR.sum() + rewards.kl_BR.sum(), num_sequences),
            "reward/score": (rewards.score_BR.sum(), num_sequences),
            "reward/kl_per_token": (rewards.kl_BR.sum(), num_tokens),
            "policy/kl_per_token": (k1, num_tokens),
            "policy/kl_k3_per_token": (k3, num_tokens),
            "rollout/response_tokens": (num_tokens, num_sequences),
            "rollout/truncated_fraction": (truncated_rows(scored).sum(), num_sequences),
        }
    )


def group_metrics(scored: ScoredRollouts, rewards: TokenRewards, group_size: int) -> Metrics:
    """The fraction of prompts whose responses all have the same reward, which teach a method of groups nothing.

    A reward is what is paid: the score after clamp and penalty, and what sources pay tokens.

    Args:
        group_size: responses to each prompt, which stand together.
    """
    reward_B = rewards.score_BR.sum(dim=1)
    if rewards.source_BR is not None:
        reward_B = reward_B + keep(rewards.source_BR, scored.mask_BR).sum(dim=1)
    reward_GS = reward_B.view(-1, group_size)
    is_equal_G = (reward_GS == reward_GS[:, :1]).all(dim=1)
    num_groups = reward_GS.new_tensor(len(reward_GS))
    return to_metrics({"rollout/equal_reward_groups": (is_equal_G.sum(), num_groups)})


def clip_metrics(scored: ScoredRollouts, score_clip: float) -> Metrics:
    """The fraction of responses whose score the clip changed."""
    is_clipped_B = scored.score_B.abs() > score_clip
    num_sequences = scored.mask_BR.new_tensor(len(scored.rollouts))
    return to_metrics({"reward/score_clip_fraction": (is_clipped_B.sum(), num_sequences)})


def value_metrics(experience: Experience) -> Metrics:
    """What the critic knew, over trained tokens; advantages before whitening, i.e. returns less values."""
    trained_BR = experience.mask_BR
    returns_BR = keep(experience.returns_BR, trained_BR)
    values_BR = keep(experience.values_BR, trained_BR)
    advantages_BR = returns_BR - values_BR
    num_trained = count_tokens(trained_BR)
    return to_metrics(
        {
            "advantage/mean": (advantages_BR.sum(), num_trained),
            "advantage/mean_square": (advantages_BR.square().sum(), num_trained),
            "value/mean": (values_BR.sum(), num_trained),
            "value/return_mean": (returns_BR.sum(), num_trained),
            "value/return_mean_square": (returns_BR.square().sum(), num_trained),
        }
    )


def dpo_metrics(scored: ScoredRollouts, experience: Experience) -> Metrics:
    """The DPO reward as it enters the reward, and the fraction of tokens on which the clip changed it."""
    num_tokens, rewards = count_tokens(scored.mask_BR), experience.rewards
    return to_metrics(
        {
            "reward/dpo_per_token": (rewards.dpo_BR.sum(), num_tokens),
            "reward/dpo_clip_fraction": (rewards.num_clipped, num_tokens),
        }
    )


def source_metrics(scored: ScoredRollouts) -> Metrics:
    """What each source of rewards gave a response, its square, and what of it was paid."""
    num_sequences = scored.mask_BR.new_tensor(len(scored.rollouts))
    given, paid = scored.scores_by_source, scored.paid_by_source
    return to_metrics(
        {
            **{f"reward/{name}/mean": (given_B.sum(), num_sequences) for name, given_B in given.items()},
            **{
                f"reward/{name}/mean_square": (x_B.square().sum(), num_sequences)
                for name, x_B in given.items()
            },
            **{f"reward/{name}/paid": (paid_B.sum(), num_sequences) for name, paid_B in paid.items()},
        }
    )


def importance_metrics(
    scored: ScoredRollouts, experience: Experience, cap: float, mode: ImportanceMode
) -> Metrics:
    """The weights of the policy loss that correct for the pool, and the fraction above `cap`; trained tokens."""
    trained_BR = experience.mask_BR
    weights_BR = keep(experience.pool_importance_BR, trained_BR)
    is_capped_BR = keep(pool_ratio(scored, mode) > cap, trained_BR)
    num_trained = count_tokens(trained_BR)
    return to_metrics(
        {
            "pool/importance_mean": (weights_BR.sum(), num_trained),
            "pool/importance_capped_fraction": (is_capped_BR.sum(), num_trained),
        }
    )


def explained_variance(means: Mapping[str, float]) -> float | None:
    """1 - Var(returns - values) / Var(returns) from the means of `value_metrics`.

    None: the returns are constant, or no token was trained (a mean without tokens is left out of `means`).
    """
    if "value/return_mean" not in means:
        return None
    variance = means["value/return_mean_square"] - means["value/return_mean"] ** 2
    if variance <= 0:
        return None
    return 1 - (means["advantage/mean_square"] - means["advantage/mean"] ** 2) / variance
