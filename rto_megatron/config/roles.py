"""The models of a stage and where they come from: the one place that knows what an unnamed role falls back to."""

from dataclasses import dataclass
from pathlib import Path

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.config.facts import facts_of
from rto_megatron.config.schema import Stage

OPTIONAL_ROLES = ("reference", "critic", "reward", "dpo", "dpo_reference")


@dataclass(frozen=True)
class Role:
    """A model of a stage, as it is placed on the trainer's ranks.

    Example:
        Role("policy", Path("models/sft"), is_trained=True)
    """

    name: str
    path: Path
    is_trained: bool = False
    has_value_head: bool = False
    is_head_fresh: bool = False  # the value head is drawn: the path is a language model
    shares: str | None = None  # the role whose weights and forward it uses, if any

    @property
    def found_as(self) -> str:
        """The role under which a run folder keeps its weights."""
        return "policy" if self.is_head_fresh else self.name


def allowed_roles(config: Stage) -> tuple[str, ...]:
    """The keys of `models` that the stage reads."""
    if facts_of(config).evaluation is not None:
        return ("policy", "reference", "reward")
    method = ALGORITHMS[config.stage]
    if isinstance(method, OnlineMethod):
        critic = ("critic",) if method.has_critic else ()
        dpo = ("dpo", "dpo_reference") if method.has_dpo else ()
        return ("policy", "reference", *critic, "reward", *dpo)
    return ("policy",) if method.reference == "none" else ("policy", "reference")


def needs_dpo(config: Stage) -> bool:
    """Whether the token reward reads a DPO model: the method has one, and its weight is not 0."""
    online = facts_of(config).online
    if online is None or "dpo" not in allowed_roles(config):
        return False
    return bool(online.algorithm.model_dump()["beta_dpo"])


def roles_of(config: Stage) -> tuple[Role, ...]:
    """The models that the stage puts on the trainer's ranks; valid only if `checks` found no problem."""
    models, allowed = config.models, allowed_roles(config)
    reference = models.reference or models.policy
    method = ALGORITHMS.get(config.stage)
    has_value_head = not isinstance(method, OnlineMethod | None) and method.outputs == "values"
    is_trained = facts_of(config).training is not None
    roles = [Role("policy", models.policy, is_trained, has_value_head, is_head_fresh=has_value_head)]
    if "critic" in allowed:
        path = models.critic or models.reward or models.policy
        is_fresh = models.critic is None and models.reward is None
        roles.append(Role("critic", path, is_trained=True, has_value_head=True, is_head_fresh=is_fresh))
    if "reference" in allowed:
        roles.append(Role("reference", reference))
    if models.reward is not None:
        roles.append(Role("reward", models.reward, has_value_head=True))
    if needs_dpo(config):
        assert models.dpo is not None
        dpo_reference = models.dpo_reference or reference
        shares = "reference" if dpo_reference == reference else None
        roles += [Role("dpo", models.dpo), Role("dpo_reference", dpo_reference, shares=shares)]
    return tuple(roles)
