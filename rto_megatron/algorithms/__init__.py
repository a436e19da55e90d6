"""Pure maths on tensors: no process groups, no files, no model code."""

from collections.abc import Mapping

from rto_megatron.algorithms.dpo import DPO
from rto_megatron.algorithms.ppo import PPO
from rto_megatron.algorithms.reward_model import RewardModel
from rto_megatron.algorithms.rto import RTO
from rto_megatron.algorithms.sft import SFT

# The only place where an algorithm is registered; the name is the recipe's `stage`.
ALGORITHMS: Mapping[str, type[SFT | RewardModel | DPO | PPO | RTO]] = {
    "sft": SFT,
    "reward_model": RewardModel,
    "dpo": DPO,
    "ppo": PPO,
    "rto": RTO,
}
