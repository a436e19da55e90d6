"""Why layouts and batches do not fit the ranks and each other."""

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.config.facts import facts_of
from rto_megatron.config.plan import fewest_ranks
from rto_megatron.config.roles import Role, allowed_roles, roles_of
from rto_megatron.config.schema import ReinforcementStage, Stage
from rto_megatron.config.training import GridConfig


def layout_problems(config: Stage, world_size: int, origin: str) -> list[str]:
    """Of the policy's layout; see `checks.find_problems`."""
    parallel = config.parallel
    problems = _without_effect(parallel, "parallel")
    replica_ranks, num_ranks = parallel.replica_ranks, len(parallel.ranks_of("policy", world_size))
    if not num_ranks:
        return [
            *problems,
            f"parallel.roles names all {_ranks(world_size)}, and the policy has none; {_start(config)}",
        ]
    if num_ranks % replica_ranks:
        left = "" if num_ranks == world_size else f" of {world_size} that are left to the policy"
        advice = "start a multiple of it or change the layout" if not left else _start(config)
        problems.append(
            f"{parallel.product('parallel')} does not divide the {_ranks(num_ranks)}{left}"
            f"{f' ({origin})' if origin else ''}; {advice}"
        )
        return problems
    problems += _experts(parallel, "parallel", num_ranks)
    return problems + _batches(config, num_ranks // replica_ranks)


def _start(config: Stage) -> str:
    return f"start {fewest_ranks(config.parallel)} ranks, or give roles other ranks"


def role_problems(config: Stage, world_size: int) -> list[str]:
    """Of the layouts that roles have for themselves; valid only where `checks.model_problems` finds nothing."""
    loaded = {role.name: role for role in roles_of(config)}
    problems = []
    for name in config.parallel.roles:
        role, key = loaded.get(name), f"parallel.roles.{name}"
        if role is None:
            used = [one for one in allowed_roles(config) if one in loaded and one != "policy"]
            those = (
                f"it has the roles {', '.join(used)} beside the policy" if used else "it has the policy alone"
            )
            problems.append(
                f"{key} has no effect: stage {config.stage} loads no model of this role, {those}; remove it"
            )
        elif role.shares is not None:
            problems.append(
                f"{key} has no effect: models.{name} is the model of models.{role.shares}, which is loaded once; "
                f"remove it, or set parallel.roles.{role.shares}"
            )
        else:
            problems += _role(config, role, world_size)
    return problems


def _role(config: Stage, role: Role, world_size: int) -> list[str]:
    key, grid = config.parallel.key_of(role.name), config.parallel.grid_of(role.name)
    problems = _own_ranks(config, role.name, world_size)
    if problems:
        return problems
    problems = _without_effect(grid, key)
    method = ALGORITHMS.get(config.stage)
    if isinstance(method, OfflineMethod) and method.outputs == "divergence":
        problems.append(
            f"{key}: stage {config.stage} compares whole distributions where they lie, so its reference has the "
            "policy's layout; remove it"
        )
    num_ranks = len(config.parallel.ranks_of(role.name, world_size))
    if num_ranks % grid.replica_ranks:
        others = grid.context * grid.pipeline
        fits = [n for n in range(1, num_ranks + 1) if num_ranks % (n * others) == 0]
        nearest = min(fits, key=lambda n: abs(n - grid.tensor), default=None)
        advice = f"set {key}.pipeline to 1" if nearest is None else f"set {key}.tensor to {nearest}"
        other = "start another number" if num_ranks == world_size else "give it another number of ranks"
        problems.append(
            f"{grid.product(key)} does not divide the {_ranks(num_ranks)}, all of which hold the {role.name}; "
            f"{advice}, or {other}"
        )
        return problems
    problems += _experts(grid, key, num_ranks)
    return problems + _shares(config, role, num_ranks // grid.replica_ranks)


def _own_ranks(config: Stage, role: str, world_size: int) -> list[str]:
    """What is wrong with the ranks that a role has for itself."""
    parallel = config.parallel
    key, own = f"{parallel.key_of(role)}.ranks", parallel.ranks_of(role, world_size)
    ranks = next((grid.ranks for name, grid in parallel.roles.items() if name == role), None)
    if ranks is None:
        return []
    problems = []
    if facts_of(config).is_colocated:
        problems.append(
            f"{key}={ranks} cannot work with rollout.colocated=true: a server of the pool gets its weights from the "
            "policy's ranks on its GPUs; remove it, or give the pool GPUs of its own"
        )
    if own[0] == 0:
        problems.append(
            f"{key}={ranks} takes rank 0, which leads the job and holds the policy; "
            f"{_last_ranks(config, role, world_size) or _start(config)}"
        )
    if own[-1] >= world_size:
        problems.append(
            f"{key}={ranks} names rank {own[-1]} of a job of {_ranks(world_size)}, 0 to {world_size - 1}; "
            f"{_last_ranks(config, role, world_size) or _start(config)}"
        )
    for name, grid in parallel.roles.items():
        if name != role and set(grid.own_ranks) & set(own) and grid.own_ranks != own and name > role:
            problems.append(
                f"{key}={ranks} and parallel.roles.{name}.ranks={grid.ranks} overlap; roles have the same ranks, or "
                "none in common"
            )
    return problems


def _last_ranks(config: Stage, role: str, world_size: int) -> str | None:
    """The last ranks, as near to the number asked for as leaves the policy whole replicas; None: there are none."""
    parallel = config.parallel
    if sum(grid.ranks is not None for grid in parallel.roles.values()) > 1:
        return None
    wanted, step = len(parallel.ranks_of(role, world_size)), parallel.grid_of(role).replica_ranks
    fits = [n for n in range(step, world_size, step) if (world_size - n) % parallel.replica_ranks == 0]
    if not fits:
        return None
    first = world_size - min(fits, key=lambda n: abs(n - wanted))
    named = str(first) if first == world_size - 1 else f"{first}-{world_size - 1}"
    return f"set {parallel.key_of(role)}.ranks to {named}"


def _without_effect(grid: GridConfig, key: str) -> list[str]:
    problems = []
    if grid.sequence and grid.tensor == 1:
        problems.append(f"{key}.sequence=true needs {key}.tensor > 1; set {key}.sequence=false")
    if grid.context_scheme != GridConfig().context_scheme and grid.context == 1:
        problems.append(
            f"{key}.context_scheme={grid.context_scheme} has no effect with {key}.context=1; remove it or set "
            f"{key}.context"
        )
    return problems + _stages(grid, key)


def _stages(grid: GridConfig, key: str) -> list[str]:
    """What is wrong with the chunks and layers of pipeline stages, whatever the model."""
    if grid.pipeline == 1:
        given = {"virtual": None if grid.virtual == 1 else grid.virtual, "stages": grid.stages}
        return [
            f"{key}.{name}={_listed(value)} has no effect with {key}.pipeline=1; remove it or set {key}.pipeline"
            for name, value in given.items()
            if value is not None
        ]
    if not isinstance(grid.stages, tuple):
        return []
    if len(grid.stages) != grid.pipeline:
        return [
            f"{key}.stages={_listed(grid.stages)} has the layers of {len(grid.stages)} stages, and there are "
            f"{key}.pipeline={grid.pipeline}; name as many, or auto"
        ]
    least = min(grid.stages)
    if least < grid.virtual:
        return [
            f"{key}.virtual={grid.virtual} chunks cannot share the {least} layers of the smallest stage of "
            f"{key}.stages={_listed(grid.stages)}: each has one at least; set {key}.virtual to {least} at most"
        ]
    return []


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _experts(grid: GridConfig, key: str, world_size: int) -> list[str]:
    """Whether the ranks of a stage can be shared by the experts of a mixture as a grid says."""
    tensor, cut, stage_ranks = grid.tensor, grid.expert_cut, world_size // grid.pipeline
    if tensor % cut:
        fits = [n for n in range(1, tensor + 1) if tensor % n == 0]
        return [
            f"{key}.expert_tensor={cut} does not divide {key}.tensor={tensor}, so an expert would be cut over ranks "
            f"that share no layer; it can be one of {fits}, or null for {tensor}"
        ]

    def is_whole(expert: int) -> bool:
        """Whether the experts lie on a part of a replica's tensor ranks, or on those of whole replicas."""
        ranks = expert * cut
        return stage_ranks % ranks == 0 and (tensor % ranks == 0 or ranks % tensor == 0)

    if is_whole(grid.expert):
        return []
    fits = [n for n in range(1, stage_ranks + 1) if is_whole(n)]
    nearest = min(fits, key=lambda n: abs(n - grid.expert))
    context = "" if grid.context == 1 else f" x context {grid.context}"
    return [
        f"{key}.expert x {key}.expert_tensor = {grid.expert} x {cut} = {grid.expert * cut} ranks for the experts of a "
        f"stage, which the {stage_ranks} ranks of a stage (tensor {tensor}{context} x data "
        f"{stage_ranks // tensor // grid.context}) cannot be "
        f"shared by; set {key}.expert to {nearest} (of {fits}), or start another number of ranks"
    ]


def _shares(config: Stage, role: Role, replicas: int) -> list[str]:
    """Whether the sequences of a step can be shared out evenly over the replicas of a role."""
    facts = facts_of(config)
    if facts.online is None:
        return []
    batch, responses = facts.online.batch, facts.online.responses_per_step
    if batch.micro is None:
        return _idle(batch.train, replicas, f" of the {role.name}") if role.is_trained else []
    whole, step = f"{replicas} data-parallel ranks of the {role.name}", batch.micro * replicas
    if role.is_trained and batch.train % step:
        return [
            f"batch.train={batch.train} is not a multiple of batch.micro x the {whole} = {batch.micro} x {replicas} = "
            f"{step}; set batch.train to {_next_multiple(batch.train, step)}, or give "
            f"{config.parallel.key_of(role.name)} more tensor or pipeline ranks"
        ]
    if responses % replicas:
        return [
            f"the {responses} responses of a rollout step are not a multiple of the {whole}; set batch.rollout to "
            f"{_next_multiple(batch.rollout, replicas)}, or give {config.parallel.key_of(role.name)} more tensor or "
            "pipeline ranks"
        ]
    return []


def _idle(num_items: int, replicas: int, whose: str = "") -> list[str]:
    """What is wrong where replicas get unequal numbers of items, dealt by cost."""
    if num_items >= replicas:
        return []
    return [
        f"batch.train={num_items} is below the {replicas} data-parallel ranks{whose}, so some would have nothing to "
        f"do; set batch.train to {replicas} at least"
    ]


def _next_multiple(number: int, step: int) -> int:
    return -(-number // step) * step


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number > 1)}"


def _batches(config: Stage, data_parallel: int) -> list[str]:
    facts = facts_of(config)
    if facts.training is None:
        return []
    batch = facts.training.batch
    problems = [] if batch.micro is not None else _idle(batch.train, data_parallel)
    step = (batch.micro or 0) * data_parallel
    if batch.micro is not None and batch.train % step:
        below = batch.train // step * step
        nearest = f"{below} or {below + step}" if below else str(step)
        problems.append(
            f"batch.train={batch.train} is not a multiple of batch.micro x data-parallel ranks = "
            f"{batch.micro} x {data_parallel} = {step}, so {batch.train // step} whole micro-batches "
            f"come out; set batch.train to {nearest}"
        )
    return problems + ([] if facts.online is None else _rollouts(facts.online, data_parallel))


def _rollouts(config: ReinforcementStage, data_parallel: int) -> list[str]:
    batch, responses = config.batch, config.responses_per_step
    problems = []
    if batch.rollout % data_parallel:
        problems.append(
            f"batch.rollout={batch.rollout} is not a multiple of the {data_parallel} data-parallel ranks; "
            f"set batch.rollout to {(batch.rollout // data_parallel + 1) * data_parallel}"
        )
    if responses % batch.train:
        samples = config.algorithm.samples_per_prompt
        each = "" if samples == 1 else f" x algorithm.samples_per_prompt={samples}"
        fits = max(1, responses // batch.train) * batch.train
        advice = (
            f"set batch.rollout to {fits // samples}" if fits % samples == 0 else "change one of the three"
        )
        problems.append(
            f"batch.rollout={batch.rollout}{each} is not a multiple of batch.train={batch.train}, so "
            f"{responses // batch.train} whole updates come out of a rollout step; {advice}"
        )
    return problems
