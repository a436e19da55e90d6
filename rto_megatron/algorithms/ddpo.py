"""DDPO, an ablation of the paper (section 5.2): all DPO rewards of a response are delayed to its last token."""

from rto_megatron.algorithms.method import OnlineMethod, Vocabulary
from rto_megatron.algorithms.reinforcement import PolicyOptimization
from rto_megatron.algorithms.rto import Config, with_dpo_reward
from rto_megatron.algorithms.token_rewards import all_at_end


def build(config: Config, vocabulary: Vocabulary) -> PolicyOptimization:
    """RTO whose DPO reward is as sparse as the reward model's score, which stays."""
    return with_dpo_reward(config, all_at_end)


METHOD = OnlineMethod(Config, build, has_dpo=True)
