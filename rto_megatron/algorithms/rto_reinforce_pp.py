"""RTO on REINFORCE++, as in the paper's appendix E: RTO's token reward, without a critic."""

from rto_megatron.algorithms.method import OnlineMethod, Vocabulary
from rto_megatron.algorithms.reinforce_pp import critic_free
from rto_megatron.algorithms.reinforcement import DpoRewardConfig, PolicyOptimization, RewardConfig
from rto_megatron.algorithms.token_rewards import as_it_is


class Config(RewardConfig, DpoRewardConfig):
    """REINFORCE++'s keys and the two of the DPO reward.

    Example:
        algorithm: {beta_kl: 0.05, beta_dpo: 0.05}
    """


def build(config: Config, vocabulary: Vocabulary) -> PolicyOptimization:
    """REINFORCE++ with the reward of eq. 4.7."""
    return critic_free(config, config.token_reward(as_it_is), needs_dpo=config.beta_dpo != 0)


METHOD = OnlineMethod(Config, build, has_critic=False, has_dpo=True)
