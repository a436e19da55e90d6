"""What a recipe means on a number of ranks: the roles, the shapes of their models, and all that speaks against it."""

from collections.abc import Mapping, Sequence

from rto_megatron.config.checks import find_problems, model_problems, refuse
from rto_megatron.config.facts import facts_of
from rto_megatron.config.plan import StagePlan, plan_stage
from rto_megatron.config.roles import Role, roles_of
from rto_megatron.config.schema import Stage
from rto_megatron.errors import RecipeError
from rto_megatron.models.layout_checks import (
    check_experts,
    check_fp8,
    check_kernels,
    check_layout,
    idle_expert_keys,
)
from rto_megatron.planning.shapes import FoundShape, find_shape


def judged(
    config: Stage, world_size: int, assume: list[str], origin: str
) -> tuple[StagePlan, dict[str, FoundShape]]:
    """The plan of a stage and the shapes of the models that are known, once nothing speaks against them.

    Args:
        origin: how the number of ranks came about, if it is not what the user asked for.

    Raises:
        UserError: lists everything that does.
    """
    problems = find_problems(config, world_size, {}, origin)
    refuse(problems)  # the plan below needs a configuration whose parts fit together
    plan = plan_stage(config, world_size)
    roles, shapes = plan.roles, _shapes(plan.roles, assume)
    limits = {name: found.shape.max_positions for name, found in shapes.items()}
    problems = find_problems(config, world_size, limits, origin)
    parallel = config.parallel
    for name, found in shapes.items():
        problems += check_layout(found.shape, parallel.grid_of(name), f"models.{name}", parallel.key_of(name))
    known = {name: found.shape for name, found in shapes.items()}
    problems += check_kernels(known, config.precision.kernels)
    problems += check_fp8(known, config.precision, parallel)
    trained = {r.name: shapes[r.name].shape for r in roles if r.is_trained and r.name in shapes}
    if all(role.name in shapes for role in roles if role.is_trained):
        problems += check_experts(trained, parallel, config.models.moe_aux_loss_coef)
    if all(role.name in shapes for role in roles if role.shares is None):
        problems += idle_expert_keys(known, parallel)
    refuse(problems)
    return plan, shapes


def require_step(config: Stage, roles: Sequence[Role], shapes: Mapping[str, FoundShape]) -> None:
    """Refuses what has no step that could be simulated or timed.

    Raises:
        RecipeError: the stage trains nothing, or the shapes of its models are not known.
    """
    if facts_of(config).training is None:
        raise RecipeError(f"stage {config.stage} trains nothing, so it has no step; see rto check")
    unknown = [role.name for role in roles if role.name not in shapes]
    if unknown:
        raise RecipeError(
            f"the shapes of {', '.join(unknown)} are not known; name them, as in --assume {unknown[0]}=llama-3-8b"
        )


def known_models(config: Stage, assume: list[str]) -> tuple[Sequence[Role], dict[str, FoundShape]]:
    """The roles of a stage, whatever its layout, and the shapes of those that are known.

    Raises:
        UserError: its models cannot be what they are.
    """
    refuse(model_problems(config))
    roles = roles_of(config)
    return roles, _shapes(roles, assume)


def _shapes(roles: Sequence[Role], assume: list[str]) -> dict[str, FoundShape]:
    assumed = dict(_role_and_shape(entry) for entry in assume)
    unknown = set(assumed) - {role.name for role in roles}
    if unknown:
        raise RecipeError(
            f"--assume {min(unknown)}=...: this stage has the roles {', '.join(r.name for r in roles)}"
        )
    found = {role.name: find_shape(role.path, assumed.get(role.name), role.found_as) for role in roles}
    return {name: shape for name, shape in found.items() if shape is not None}


def _role_and_shape(entry: str) -> tuple[str, str]:
    role, equals, shape = entry.partition("=")
    if not equals:
        raise RecipeError(f"--assume {entry}: is written ROLE=SHAPE, as in policy=llama-3-8b")
    return role, shape
