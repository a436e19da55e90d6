"""What of the trainer waits in host memory, and in which phases of a step it is needed on the device.

A phase is entered as a whole: what it needs is brought back, and what it does not need is parked.
"""

from collections.abc import Mapping
from typing import Literal

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.config.facts import facts_of
from rto_megatron.config.roles import roles_of
from rto_megatron.config.schema import TrainStage
from rto_megatron.config.training import Parkable

StepPhase = Literal["push", "sample", "judge", "score", "update", "save"]

_TRAINED: frozenset[Parkable] = frozenset({"policy", "critic", "policy_ema"})
_OPTIMIZER: frozenset[Parkable] = frozenset({"optimizer"})
_STATE: frozenset[Parkable] = frozenset({"gradients", "optimizer"})

NEEDED: Mapping[StepPhase, frozenset[Parkable]] = {
    "push": frozenset({"policy"}),
    "sample": frozenset(),  # the pool's turn
    "judge": frozenset({"reward"}),  # responses of which nothing but the reward is asked
    "score": frozenset({"policy", "critic", "reference", "reward", "dpo", "dpo_reference"}),
    "update": _TRAINED | _STATE,
    "save": _TRAINED | _OPTIMIZER,
}


def offload_problems(config: TrainStage) -> list[str]:
    """Why names in `offload` cannot be parked, one sentence each; asked where the models are sound."""
    named, facts = list(config.offload), facts_of(config)
    if not named:
        return []
    roles = {role.name: role for role in roles_of(config)}
    there = {name for name, role in roles.items() if role.shares is None} | set(_STATE)
    if facts.online is not None and facts.online.algorithm.ema_beta is not None:
        there.add("policy_ema")
    problems = [f"offload names {name} twice" for name in sorted({n for n in named if named.count(n) > 1})]
    for name in dict.fromkeys(named):
        if name not in there:
            shared = roles[name].shares if name in roles else None
            instead = (
                f"it shares the weights of {shared}: name that"
                if shared is not None
                else f"this stage has {', '.join(sorted(there))}"
            )
            problems.append(f"offload names {name}, which stage {config.stage} does not load; {instead}")
        elif name in ("policy", "critic") and not facts.is_colocated:
            problems.append(
                f"offload names {name}, which is trained while it would be away; only a pool on the trainer's GPUs "
                "(rollout.colocated=true) has a phase without it: remove it, or name optimizer and gradients"
            )
        elif name == "reference" and _reads_whole_distributions(config):
            problems.append(
                f"offload names reference, whose distribution stage {config.stage} reads while it trains; remove it"
            )
    if facts.offline is not None and "reference" not in roles and _STATE & set(named):
        problems.append(
            f"offload names {', '.join(sorted(_STATE & set(named)))}, and stage {config.stage} has no other model that "
            "could use their memory; remove it"
        )
    return problems


def _reads_whole_distributions(config: TrainStage) -> bool:
    method = ALGORITHMS[config.stage]
    return isinstance(method, OfflineMethod) and method.outputs == "divergence"
