"""Pure maths on tensors: no process groups, no files, no model code."""

from collections.abc import Mapping

from rto_megatron.algorithms import (
    cispo,
    dapo,
    ddpo,
    dpo,
    dr_grpo,
    grpo,
    gspo,
    kto,
    ppo,
    rdpo,
    reinforce_pp,
    reward_model,
    rloo,
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
    "dr_grpo": dr_grpo.METHOD,
    "dapo": dapo.METHOD,
    "gspo": gspo.METHOD,
    "cispo": cispo.METHOD,
    "rloo": rloo.METHOD,
}
