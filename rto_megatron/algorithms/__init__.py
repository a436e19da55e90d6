"""Pure maths on tensors: no process groups, no files, no model code."""

from collections.abc import Mapping

from rto_megatron.algorithms import (
    ddpo,
    dpo,
    grpo,
    kto,
    ppo,
    rdpo,
    reinforce_pp,
    reward_model,
    rs_ppo,
    rto,
    rto_reinforce_pp,
    semi_rto,
    sft,
    simpo,
    tdpo,
)
from rto_megatron.algorithms.method import Method

# The only place where an algorithm is registered; the name is the recipe's `stage`.
ALGORITHMS: Mapping[str, Method] = {
    "sft": sft.METHOD,
    "reward_model": reward_model.METHOD,
    "dpo": dpo.METHOD,
    "rdpo": rdpo.METHOD,
    "simpo": simpo.METHOD,
    "tdpo": tdpo.METHOD,
    "kto": kto.METHOD,
    "ppo": ppo.METHOD,
    "rto": rto.METHOD,
    "semi_rto": semi_rto.METHOD,
    "ddpo": ddpo.METHOD,
    "rs_ppo": rs_ppo.METHOD,
    "reinforce_pp": reinforce_pp.METHOD,
    "rto_reinforce_pp": rto_reinforce_pp.METHOD,
    "grpo": grpo.METHOD,
}
