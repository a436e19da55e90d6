"""PPO, RTO and every other method that learns from its own samples: the loop of the paper's Algorithm 2."""

from collections.abc import Sequence
from functools import partial

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.credit_metrics import explained_variance
from rto_megatron.algorithms.reinforcement import PolicyOptimization
from rto_megatron.config import schema
from rto_megatron.config.learning_rate import learning_rate, updates_per_step
from rto_megatron.data.batches import Batches
from rto_megatron.data.loader import load_prompts
from rto_megatron.data.tokenizer import tokens_with
from rto_megatron.engine.build_roles import build_average, build_frozen, build_trained, update_average
from rto_megatron.engine.megatron import FrozenModel, Model, TrainedModel
from rto_megatron.errors import UserError
from rto_megatron.generation.contract import Sampling
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform import faults
from rto_megatron.reporting.samples import completions_table, show
from rto_megatron.trainer.feed import feed, go_on
from rto_megatron.trainer.guard import Guard, planted
from rto_megatron.trainer.known_reward import known_reward, true_return
from rto_megatron.trainer.model_files import give_own_padding
from rto_megatron.trainer.pretraining import Pretraining, beside
from rto_megatron.trainer.reference import require_trained_reference
from rto_megatron.trainer.rollouts import Roles, sample
from rto_megatron.trainer.run import Run
from rto_megatron.trainer.sampler import Sampler, connect_pool
from rto_megatron.trainer.scoring import score_sound, watched_gap
from rto_megatron.trainer.setup import Setup, prepare_stage, stage_hf_files
from rto_megatron.trainer.update import optimizer_minibatches, require_tokens
from rto_megatron.types import Experience, Metrics, Prompt, Rollout


def train_rto(
    config: schema.ReinforcementStage,
    topology: Topology,
    sampler: Sampler | None = None,
    algorithm: PolicyOptimization | None = None,
) -> None:
    """Trains a reinforcement method to the end of the run, from the last checkpoint if there is one.

    Args:
        sampler: null: the pool that the configuration names.
        algorithm: null: the one that the configuration names; experiments vary it.
    """
    setup = prepare_stage(config, topology)
    roles = build_roles(config, setup)
    require_trained_reference(config, setup.sources, roles)
    algorithm = algorithm or ALGORITHMS[config.stage].build(
        config.algorithm, partial(tokens_with, setup.tokenizer)
    )
    prompts, pretraining = load_batches(config, setup), Pretraining(config, setup)
    run = open_run(config, setup, roles, config.run.steps or prompts.batches_per_epoch)
    refuse_idle_policy(algorithm, run.num_steps)
    kl, table = algorithm.kl_controller, known_reward(config, setup)
    if run.state:
        go_on(prompts, run.state["data"], "data.train", topology)
        pretraining.restore(run.state["pretraining"])
        kl = kl.restored(run.state["kl"])
    sampler = sampler or connect_pool(config.rollout, roles.policy)
    guard = Guard(run, config.run.max_skipped_updates, topology)

    for step in run.steps():
        # 1. pi_old <- pi_theta, proved
        with run.saved_without_pool(), run.timed("push"):
            times = sampler.push(step)
        # 2. y ~ pi_old(. | x), from the pool that holds exactly this step's weights
        with run.saved_without_pool(), run.timed("sample"):
            sampled = draw(config, setup, sampler, prompts.next_batch(), step)
        experience, gap, lrs = None, {}, {}
        with guard.skipping():
            # 3. every model's opinion, without gradients
            with run.timed("score"):
                scored = score_sound(sampled, roles, setup, config, step + 1)
            gap = watched_gap(scored, topology, config.rollout.logprob_gap_alarm, step + 1)
            # 4. token rewards, then advantages
            experience = algorithm.credit(scored, kl.coef, topology.dp_sum)
            run.record(algorithm.credit_metrics(scored, experience))
            run.record(true_return(sampled, table))
        # 5. PPO epochs
        if experience is not None:
            with run.timed("update"):
                lrs = update(config, run, roles, algorithm, experience, pretraining, setup, guard)
        means = run.log({**lrs, **times, **gap, "objective/kl_coef": kl.coef})
        if experience is not None:
            kl = kl.update(means["policy/kl_per_token"], config.responses_per_step)
        run.finish({"data": prompts.state(), "pretraining": pretraining.state(), "kl": kl.state()})
        if experience is not None:
            show_samples(config, run, experience, setup, means)
    run.close("policy" if roles.average is None else "policy_ema")
    # The pool is left with the trained policy; should it fail, the run is complete all the same.
    sampler.push(run.step)
    sampler.push.close()


def draw(
    config: schema.ReinforcementStage, setup: Setup, sampler: Sampler, prompts: Sequence[Prompt], step: int
) -> tuple[Rollout, ...]:
    """This replica's responses to its prompts, on every rank of it; all ranks must call it."""
    batch = [prompt for prompt in prompts for _ in range(config.algorithm.samples_per_prompt)]
    faults.at("before_gen", step + 1)
    sampled = sample(setup.topology, sampler.engine, batch, sampling(config, setup, step), version=step)
    sampler.rest()
    faults.at("after_gen", step + 1)
    return sampled


def refuse_idle_policy(algorithm: PolicyOptimization, num_steps: int) -> None:
    """Raises UserError where the critic's warm-up is the whole run."""
    if algorithm.critic_warmup_steps >= num_steps:
        raise UserError(
            f"algorithm.critic_warmup_steps={algorithm.critic_warmup_steps} leaves no step for the policy in a run of "
            f"{num_steps}; lower it or raise run.steps"
        )


def update(
    config: schema.ReinforcementStage,
    run: Run,
    roles: Roles,
    algorithm: PolicyOptimization,
    experience: Experience,
    pretraining: Pretraining,
    setup: Setup,
    guard: Guard,
) -> dict[str, float]:
    """The optimizer steps of one rollout step; returns the last learning rates."""
    per_pass = config.responses_per_step // config.batch.train
    per_step = updates_per_step(config)
    total = run.num_steps * per_step
    policy_loss = beside(algorithm.policy_loss)
    is_policy_due = run.step >= algorithm.critic_warmup_steps
    lrs = {}
    steps = optimizer_minibatches(
        experience, config.algorithm, per_pass, setup.topology, setup.layout, config.run.seed + run.step
    )
    for number, one in enumerate(steps, start=run.step * per_step):
        texts, text_names = pretraining.microbatches() if is_policy_due else ([], [])
        with guard.skipping():
            require_tokens(one, setup.topology)
            metrics: list[Metrics] = []
            # Both gradients first: where one of them is refused, neither model is stepped.
            if roles.critic is not None:
                assert algorithm.value_loss is not None
                metrics.append(roles.critic.gradients(one.microbatches, algorithm.value_loss, one.names))
            if is_policy_due:
                loss = run.pace.timing(planted(policy_loss, run.step + 1))
                names = [*one.names, *text_names]
                metrics.append(roles.policy.gradients([*one.microbatches, *texts], loss, names))
            faults.at("opt_step", run.step + 1)
            if roles.critic is not None:
                assert isinstance(config, schema.ActorCriticStage)
                lrs["lr/critic"] = learning_rate(config.critic_optimizer, number, total)
                metrics.append(roles.critic.apply(lrs["lr/critic"]))
            if is_policy_due:
                lrs["lr/policy"] = learning_rate(config.optimizer, number, total)
                metrics.append(roles.policy.apply(lrs["lr/policy"]))
                if roles.average is not None and config.algorithm.ema_beta is not None:
                    update_average(roles.average, roles.policy, config.algorithm.ema_beta)
            for part in metrics:
                run.record(part)
            guard.stepped()
    return lrs


def build_roles(config: schema.ReinforcementStage, setup: Setup) -> Roles:
    """Policy and critic with optimizers; reference, reward and DPO model without."""
    topology, sources, precision = setup.topology, setup.sources, config.precision

    def trained(name: str, is_scalar: bool, optimizer: schema.OptimizerConfig) -> TrainedModel:
        return build_trained(
            name, sources[name], is_scalar, precision, optimizer, topology, config.run.seed,
            config.parallel.distributed_optimizer, moe_aux_loss_coef=config.models.moe_aux_loss_coef,
        )  # fmt: skip

    def frozen(name: str, is_scalar: bool = False) -> FrozenModel:
        return build_frozen(name, sources[name], is_scalar, precision, topology)

    policy = trained("policy", False, config.optimizer)
    has_average = config.algorithm.ema_beta is not None
    return Roles(
        policy=policy,
        average=build_average(policy, sources["policy"]) if has_average else None,
        critic=trained("critic", True, config.critic_optimizer)
        if isinstance(config, schema.ActorCriticStage)
        else None,
        reference=frozen("reference"),
        reward=frozen("reward", True),
        dpo=frozen("dpo") if "dpo" in sources else None,
        dpo_reference=frozen("dpo_reference") if "dpo_reference" in sources else None,
    )


def open_run(config: schema.ReinforcementStage, setup: Setup, roles: Roles, num_steps: int) -> Run:
    """The run, whose checkpoints hold the policy and, where there are, its average and the critic."""
    candidates: dict[str, Model | None] = {
        "policy": roles.policy,
        "policy_ema": roles.average,
        "critic": roles.critic,
    }
    saved = {role: model for role, model in candidates.items() if model is not None}
    hf_files = {
        role: stage_hf_files(
            setup.sources[role.removesuffix("_ema")], config.run.dir, role, setup.topology, setup.eos
        )
        for role in saved
    }
    if "critic" in hf_files:  # what it will read is sampled, and no id of it is known yet
        give_own_padding(hf_files["critic"], (), setup.topology)
    return Run(config, setup.topology, saved, hf_files, num_steps)


def load_batches(config: schema.ReinforcementStage, setup: Setup) -> Batches[Prompt]:
    """This replica's share of every rollout step's prompts."""
    loaded = load_prompts(config.data.train, setup.tokenizer, setup.limits)
    setup.admit(loaded)
    return feed(loaded, config.batch.rollout, config.run.seed, setup.topology)


def sampling(config: schema.ReinforcementStage | schema.EvaluateStage, setup: Setup, step: int) -> Sampling:
    """Temperature 1 and top-p 1: the distribution whose log-probs the ratio uses. Seeds differ by step and replica."""
    return Sampling(
        max_tokens=config.sampling.max_response_tokens,
        eos_ids=setup.eos.ids,
        min_tokens=config.sampling.min_response_tokens,
        seed=(config.run.seed * 1_000_003 + step) * 1009 + setup.topology.data_rank,
    )


def show_samples(
    config: schema.ReinforcementStage, run: Run, experience: Experience, setup: Setup, means: dict[str, float]
) -> None:
    """A table of completions when due, with what the step measured."""
    every = config.run.samples_every
    if every is None or not run.is_due(every, run.step) or not setup.topology.is_lead:
        return
    variance = explained_variance(means)
    explained = "none" if variance is None else f"{variance:.3f}"
    critic = f", the critic explains {explained} of the variance of returns"
    has_critic = isinstance(config, schema.ActorCriticStage)
    title = f"{config.stage} step {run.step}{critic if has_critic else ''}"
    show(completions_table(experience, setup.tokenizer.decode, 4, title))
