"""RS-PPO, an ablation of the paper (section 5.2): RTO's reward shaping with the total reward of PPO."""

from rto_megatron.algorithms.method import OnlineMethod, Vocabulary
from rto_megatron.algorithms.reinforcement import PolicyOptimization
from rto_megatron.algorithms.rto import Config, with_dpo_reward
from rto_megatron.algorithms.token_rewards import less_sum_at_end


def build(config: Config, vocabulary: Vocabulary) -> PolicyOptimization:
    """RTO less the sum of its DPO rewards, as they were clipped, at the last token: the total is PPO's."""
    return with_dpo_reward(config, less_sum_at_end)


METHOD = OnlineMethod(Config, build, has_dpo=True)
