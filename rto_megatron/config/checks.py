"""What the values of a configuration must satisfy together, before any model is built.

How a model's heads and layers are cut is checked where model shapes are known (`models.shape.check_layout`).
"""

from collections.abc import Iterable, Mapping

from rto_megatron.algorithms import ALGORITHMS, ppo
from rto_megatron.algorithms.kl_controller import smallest_horizon
from rto_megatron.algorithms.method import OfflineMethod, OnlineMethod
from rto_megatron.config.facts import Facts, facts_of
from rto_megatron.config.layout_problems import layout_problems, role_problems
from rto_megatron.config.reward_checks import reward_problems
from rto_megatron.config.roles import OPTIONAL_ROLES, allowed_roles, needs_dpo
from rto_megatron.config.rollouts import RolloutConfig
from rto_megatron.config.sampling_checks import sampling_problems
from rto_megatron.config.schema import OfflineStage, ReinforcementStage, Stage
from rto_megatron.config.step_phases import offload_problems
from rto_megatron.errors import RecipeError, UserError


def find_problems(
    config: Stage, world_size: int, max_positions: Mapping[str, int], origin: str = ""
) -> list[str]:
    """Everything in `config` that cannot work on `world_size` ranks, one sentence each.

    Args:
        max_positions: role -> max_position_embeddings, in tokens, of the models whose shape is known.
        origin: how the number of ranks came about, if it is not what the user asked for.
    """
    facts, of_models = facts_of(config), model_problems(config)
    return [
        *layout_problems(config, world_size, origin),
        *of_models,
        *([] if of_models else role_problems(config, world_size)),
        *([] if of_models or facts.training is None else offload_problems(facts.training)),
        *_lengths(config, max_positions),
        *_kl_horizon(facts),
        *([] if facts.online is None else sampling_problems(facts.online)),
        *_pool_servers(facts.pool),
        *_ahead(facts.online),
        *_held_out(facts),
        *_profile(facts),
        *_warmup(facts.online),
        *_kernels(config),
    ]


def _kernels(config: Stage) -> list[str]:
    precision, problems = config.precision, []
    if precision.fp8 and precision.kernels != "transformer_engine":
        problems.append(
            f"precision.fp8=true with precision.kernels={precision.kernels}: products in 8 bits are "
            "TransformerEngine's; set precision.kernels=transformer_engine, or precision.fp8=false"
        )
    if precision.kernels == "transformer_engine" and precision.dtype == "fp32":
        problems.append(
            "precision.kernels=transformer_engine has no attention for precision.dtype=fp32; set precision.dtype=bf16, "
            "or precision.kernels=torch"
        )
    if precision.kernels != "torch" and precision.dtype == "bf16" and "residual" in precision.fp32_parts:
        torch = (
            "precision.kernels=torch and precision.fp8=false" if precision.fp8 else "precision.kernels=torch"
        )
        problems.append(
            f"precision.fp32_parts names residual, and precision.kernels={precision.kernels} may be layers of "
            f"TransformerEngine, which read the residual in the dtype of their weights; set {torch}, or leave residual "
            "out"
        )
    return problems


def _held_out(facts: Facts) -> list[str]:
    """What reads `data.eval` in a stage on data, and finds nothing there."""
    config = facts.offline
    if config is None or config.data.eval is not None:
        return []
    given = {"data.eval_samples": config.data.eval_samples, "run.eval_every": config.run.eval_every}
    problems = [
        f"{key}={value} has no effect without data.eval; remove it or name held-out rows"
        for key, value in given.items()
        if value is not None
    ]
    if facts.is_reward_model:
        problems.append(
            "data.eval is missing: a reward model keeps the mean and std of its scores on held-out pairs; name some"
        )
    return problems


def _profile(facts: Facts) -> list[str]:
    run = None if facts.training is None else facts.training.run
    return [] if run is None or run.steps is None else steps_beyond(run.profile, run.steps)


def steps_beyond(profile: Iterable[int], num_steps: int) -> list[str]:
    """What is wrong with `run.profile` in a run of `num_steps` steps."""
    beyond = [str(step) for step in profile if step > num_steps]
    if not beyond:
        return []
    return [
        f"run.profile names step {', '.join(beyond)}, and the run has {num_steps}; name steps from 1 to {num_steps}"
    ]


def _warmup(config: ReinforcementStage | None) -> list[str]:
    if config is None or config.run.steps is None or not isinstance(config.algorithm, ppo.Config):
        return []
    return idle_policy(config.algorithm.critic_warmup_steps, config.run.steps)


def idle_policy(warmup_steps: int, num_steps: int) -> list[str]:
    """What is wrong with `algorithm.critic_warmup_steps` in a run of `num_steps` steps."""
    if warmup_steps < num_steps:
        return []
    return [
        f"algorithm.critic_warmup_steps={warmup_steps} leaves no step for the policy in a run of {num_steps}; lower it "
        "or raise run.steps"
    ]


def refuse(problems: Iterable[str], kind: type[UserError] = RecipeError) -> None:
    """Raise one error of `kind` that lists `problems`, if there are any."""
    lines = [f"  {problem}" for problem in problems]
    if lines:
        raise kind("the configuration cannot work as it stands\n" + "\n".join(lines))


def model_problems(config: Stage) -> list[str]:
    """What is wrong with `config.models`; while anything is, `roles.roles_of` has no meaning."""
    models, used, facts = config.models, allowed_roles(config), facts_of(config)
    named = {role: models.model_dump()[role] for role in OPTIONAL_ROLES}
    problems = [
        f"models.{role}={path} is set, but stage {config.stage} uses only {', '.join(used)}; remove it"
        for role, path in named.items()
        if path is not None and role not in used
    ]
    if facts.sampling is not None:
        problems += reward_problems(facts.sampling)
    if needs_dpo(config) and models.dpo is None:
        problems.append(
            f"models.dpo is missing: stage {config.stage} rewards tokens with a DPO model; name one, or set "
            "algorithm.beta_dpo=0 to do without"
        )
    problems += [
        f"models.{role}={named[role]} has no effect with algorithm.beta_dpo=0; remove it"
        for role in ("dpo", "dpo_reference")
        if named[role] is not None and role in used and not needs_dpo(config)
    ]
    if models.allow_unverified_reference and not needs_dpo(config):
        problems.append(
            "models.allow_unverified_reference=true has no effect where no DPO model is read; remove it"
        )
    if models.random_init and config.stage != "sft":
        problems.append(
            f"models.random_init=true works for stage sft only; stage {config.stage} needs trained weights"
        )
    if models.moe_aux_loss_coef and facts.training is None:
        problems.append(
            f"models.moe_aux_loss_coef={models.moe_aux_loss_coef} has no effect where nothing is trained; remove it"
        )
    return problems + (_pretraining(facts.online) if facts.offline is None else _reference(facts.offline))


def _reference(config: OfflineStage) -> list[str]:
    method = ALGORITHMS[config.stage]
    if (
        isinstance(method, OfflineMethod)
        and method.reference == "required"
        and config.models.reference is None
    ):
        return [
            f"models.reference is missing: stage {config.stage} compares the policy with a reference's whole "
            f"distribution; name it, most often models.reference={config.models.policy}"
        ]
    return []


def _pretraining(config: ReinforcementStage | None) -> list[str]:
    if config is None or config.data.pretrain is not None:
        return []
    coef = config.algorithm.ptx_coef
    if coef == type(config.algorithm).model_fields["ptx_coef"].default:
        return []
    return [f"algorithm.ptx_coef={coef} has no effect without data.pretrain; remove it or name texts"]


def _lengths(config: Stage, max_positions: Mapping[str, int]) -> list[str]:
    problems = []
    facts = facts_of(config)
    longest, keys = facts.longest_sequence
    if facts.sampling is not None:
        sampling = facts.sampling.sampling
        if sampling.min_response_tokens > sampling.max_response_tokens:
            problems.append(
                f"sampling.min_response_tokens={sampling.min_response_tokens} is above "
                f"sampling.max_response_tokens={sampling.max_response_tokens}"
            )
    elif config.data.max_prompt_tokens >= longest:
        problems.append(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} leaves no room for an answer within "
            f"data.max_length={longest}; lower the first or raise the second"
        )
    for role, limit in max_positions.items():
        appended = 1 if role == "reward" and _appends_end(facts) else 0
        if longest + appended > limit:
            end = " + 1 for the end-of-sequence behind a cut response" if appended else ""
            problems.append(
                f"{keys}{end} = {longest + appended} tokens, but models.{role} reads at most {limit} "
                "(max_position_embeddings, with longrope original_max_position_embeddings)"
            )
    return problems


def _kl_horizon(facts: Facts) -> list[str]:
    if facts.online is None or facts.kl_reward is None:
        return []
    horizon, responses = facts.kl_reward.kl_horizon, facts.online.responses_per_step
    if facts.kl_reward.kl_target is None or horizon >= smallest_horizon(responses):
        return []
    return [
        f"algorithm.kl_horizon={horizon} is not above 0.2 x {responses}, the responses of a rollout step: one could "
        "take beta_kl to 0 or below, and a negative one pays for divergence; the smallest that works is "
        f"algorithm.kl_horizon={smallest_horizon(responses)}"
    ]


def _ahead(config: ReinforcementStage | None) -> list[str]:
    if config is None or config.rollout.ahead == 0:
        return []
    ahead, steps, method = config.rollout.ahead, config.run.steps, ALGORITHMS[config.stage]
    problems = []
    if config.rollout.old_logprobs == "pool":
        if isinstance(method, OnlineMethod) and not method.has_ratio:
            problems.append(
                f"rollout.ahead={ahead} trains on rollouts of older weights, and with rollout.old_logprobs=pool only a "
                f"ratio to the pool's policy corrects for them, which stage {config.stage} has not; take "
                "rollout.old_logprobs=trainer with algorithm.pool_importance_cap"
            )
    elif config.algorithm.pool_importance_cap is None:
        problems.append(
            f"rollout.ahead={ahead} trains on rollouts of older weights and needs their correction; set "
            "algorithm.pool_importance_cap=2, as verl and slime (or 3 with pool_importance_mode=sequence_mask, as TRL)"
        )
    if config.rollout.colocated:
        problems.append(
            f"rollout.ahead={ahead} cannot work with rollout.colocated=true: a pool on the trainer's GPUs sleeps while "
            "the trainer trains; give the pool GPUs of its own, or set rollout.ahead=0"
        )
    if steps is not None and ahead >= steps:
        problems.append(
            f"rollout.ahead={ahead} is not below run.steps={steps}, so no step trains on rollouts that old; set "
            f"rollout.ahead to {steps - 1} at most"
        )
    return problems


def _appends_end(facts: Facts) -> bool:
    """Whether the reward model reads one token more than was sampled (algorithms.termination)."""
    return facts.evaluation is not None or (
        facts.online is not None
        and (facts.online.algorithm.truncated != "compat" or bool(facts.online.sampling.stop))
    )


def _pool_servers(rollout: RolloutConfig | None) -> list[str]:
    if rollout is None:
        return []
    problems = [
        f"rollout.servers: found {server!r}; an address is written http://host:port"
        for server in rollout.servers
        if not server.startswith(("http://", "https://")) and "@" not in server
    ]
    if any("@" in server for server in rollout.servers):
        problems.append(
            "rollout.servers: an address holds a name or password before an @, which logs and the saved configuration "
            "would show; the pool's only secret is its token: name its file as rollout.token_file"
        )
    if len(set(rollout.servers)) < len(rollout.servers):
        problems.append("rollout.servers names a server twice")
    if rollout.colocated and rollout.gpu_memory_fraction is None:
        problems.append(
            "rollout.colocated=true needs rollout.gpu_memory_fraction, as vLLM's default leaves the trainer no memory; "
            "set it, to 0.4 perhaps: `rto check --gpu-gib` says whether it fits"
        )
    if rollout.probe_interval_s <= rollout.probe_timeout_s:
        problems.append(
            f"rollout.probe_interval_s={rollout.probe_interval_s:g} is not above rollout.probe_timeout_s="
            f"{rollout.probe_timeout_s:g}, so a silent server would be asked again before its time is up; raise the "
            "first or lower the second"
        )
    return problems


def require_pool(config: Stage) -> None:
    """Raise UserError if the stage samples and no pool server is named."""
    pool = facts_of(config).pool
    if pool is not None and not pool.servers:
        raise RecipeError(
            f"rollout.servers is empty, and stage {config.stage} samples from an inference pool; start one "
            "with `rto pool` and name it, or start the stage with launchers/local.sh, which does both"
        )
