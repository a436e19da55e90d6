"""PPO, RTO and every other method that learns from its own samples: the loop of the paper's Algorithm 2."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.credit_metrics import explained_variance
from rto_megatron.algorithms.kl_controller import KLController
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.algorithms.reinforcement import PolicyOptimization
from rto_megatron.config import checks, schema
from rto_megatron.config.facts import facts_of
from rto_megatron.config.learning_rate import learning_rate, updates_per_step
from rto_megatron.config.roles import roles_of
from rto_megatron.config.training import OptimizerConfig
from rto_megatron.data.budget import budget_fill
from rto_megatron.data.tokenizer import tokens_with
from rto_megatron.engine.absent import RoleModel, TrainedRole
from rto_megatron.engine.build_roles import build_average, place_trained, update_average
from rto_megatron.engine.megatron import ENTROPIES
from rto_megatron.engine.offload import host_memory
from rto_megatron.lifecycle.launched_beside import await_pool
from rto_megatron.lifecycle.start_up import begin_part
from rto_megatron.parallel.topology import Topology
from rto_megatron.reporting.progress import say
from rto_megatron.reporting.rates import rates
from rto_megatron.reporting.samples import completions_table, sample_texts, show
from rto_megatron.trainer.build_rewards import build_rewards
from rto_megatron.trainer.checked_scores import watched_gap
from rto_megatron.trainer.connected_pool import ConnectedPool, connect_pool
from rto_megatron.trainer.dealt_rollouts import deal_rollouts
from rto_megatron.trainer.dynamic_sampler import full_batches
from rto_megatron.trainer.frozen_roles import FrozenRoles
from rto_megatron.trainer.guard import Guard, ModelUpdate, Update
from rto_megatron.trainer.held_out import HeldOut, load_held_out
from rto_megatron.trainer.known_reward import known_reward, true_return
from rto_megatron.trainer.model_files import give_own_padding
from rto_megatron.trainer.opinions import Roles
from rto_megatron.trainer.parking import parking
from rto_megatron.trainer.parts import Parts, planned_parts
from rto_megatron.trainer.pool_requests import admitted
from rto_megatron.trainer.pretraining import Pretraining, beside
from rto_megatron.trainer.reference import require_trained_reference
from rto_megatron.trainer.resume import LoopState
from rto_megatron.trainer.reward_source import ModelReward, RewardSource
from rto_megatron.trainer.reward_sum import alone
from rto_megatron.trainer.rollout_book import RolloutBook
from rto_megatron.trainer.run import Run
from rto_megatron.trainer.sampler import Sampler, load_batches
from rto_megatron.trainer.setup import Setup, prepare_stage, stage_hf_files
from rto_megatron.trainer.update import OptimizerStep, optimizer_minibatches, require_tokens
from rto_megatron.types import (
    Experience,
    Minibatch,
    Prompt,
    SupervisedMicrobatch,
    TrainingRows,
)


def train_online(
    config: schema.ReinforcementStage,
    topology: Topology,
    pool: ConnectedPool | None = None,
    parts: Parts | None = None,
) -> None:
    """Trains a reinforcement method to the end of the run, from the last checkpoint if there is one.

    A pool or parts that are given stand in the place of what the configuration asks for.
    """
    parts = parts or planned_parts()
    setup = prepare_stage(config, topology)
    prompts, held_out = load_batches(config, setup), load_held_out(config, setup)
    roles = build_roles(config, setup, [*prompts.items, *held_out], parts.reward)
    require_trained_reference(config, setup.sources, roles)
    algorithm = parts.algorithm or build_algorithm(config, setup.tokenizer)
    pretraining = Pretraining(config, setup)
    run = open_run(config, setup, roles, config.run.steps or prompts.batches_per_epoch)
    checks.refuse(checks.idle_policy(algorithm.critic_warmup_steps, run.num_steps))
    table = known_reward("data.true_reward", config.data.true_reward, setup)
    pool = parking(
        pool or connect_pool(config.rollout, roles.policy, roles.memory), roles.memory
    ).stopping_at(config.sampling.stop, setup.decode)
    sampler = open_sampler(config, setup, roles, run, parts.sampler(config, setup, prompts, pool))
    evaluation = HeldOut(config, setup, pool, sampler.push, held_out, table)
    kl = taken_up(run.state, pretraining, algorithm.kl_controller)
    scorer = parts.scorer(config, setup, roles)
    guard = parts.guard(run, config.run.max_skipped_updates, topology)
    book = RolloutBook(config, setup, run.step)
    await_pool()

    for step in run.steps():
        # 1. pi_old <- pi_theta, proved
        with run.saved_without_pool(), run.timed("push"):
            times = sampler.begin(step, scorer.ear)
        # 2. y ~ pi_old(. | x), from the pool that holds this step's weights, or those of `ahead` steps before
        with run.saved_without_pool(), run.timed("sample"):
            sampled = sampler.draw(step, scorer.ear)
        dealt = deal_rollouts(sampled, config.algorithm.samples_per_prompt, setup, step + 1)
        run.record({**sampler.measured(), **scorer.measured()})
        run.record(admitted(sampled, step, config.rollout.ahead, topology))
        experience, gap, lrs = None, {}, {}
        with guard.skipping():
            # 3. every model's opinion, without gradients
            with run.timed("score"):
                roles.memory.enter("score")
                scored = scorer.score(dealt.own, step + 1)
            gap = watched_gap(scored, topology, config.rollout.logprob_gap_alarm, step + 1)
            # 4. token rewards, then advantages
            experience = algorithm.credit(scored, kl.coef, topology.dp_sum)
            run.record({**algorithm.credit_metrics(scored, experience), **true_return(sampled, table)})
            run.record(book.keep(step + 1, scored, experience))
        # 5. PPO epochs
        if experience is not None:
            with run.timed("update"):
                roles.memory.enter("update")
                rows = dealt.rows(experience, config.algorithm.truncated, setup)
                lrs = update(config, run, roles, algorithm, rows, pretraining, setup, guard)
        run.record({**evaluation.measured(run, roles), **pool.measured(), **roles.memory.measured()})
        means = run.log(
            {**lrs, **times, **gap, "objective/kl_coef": kl.coef}, rates_of(config, setup.topology)
        )
        if experience is not None:
            kl = kl.update(means["policy/kl_per_token"], config.responses_per_step)
        run.finish(LoopState(sampler.state(), pretraining.state(), kl.state()), sampler.ahead())
        show_samples(config, run, experience, setup, means)
    book.close()
    run.close("policy" if roles.average is None else "policy_ema")
    # The pool is left with the trained policy; should it fail, the run is complete all the same.
    sampler.push(run.step)
    sampler.close()


def rates_of(
    config: schema.ReinforcementStage, topology: Topology
) -> Callable[[Mapping[str, float]], dict[str, float]]:
    """What makes the rates of a step of its metrics."""
    return partial(
        rates,
        num_responses=config.responses_per_step,
        epochs=config.algorithm.epochs,
        num_ranks=topology.world_size,
    )


def taken_up(state: LoopState | None, pretraining: Pretraining, kl: KLController) -> KLController:
    """The KL controller of the next step, once the texts stand where the last finished step left them."""
    if state is None:
        return kl
    pretraining.restore(state.pretraining)
    return kl.restored(state.kl)


def build_algorithm(
    config: schema.ReinforcementStage, tokenizer: PreTrainedTokenizerBase
) -> PolicyOptimization:
    """Credit assignment and losses of the method that the configuration names."""
    method = ALGORITHMS[config.stage]
    assert isinstance(method, OnlineMethod)
    return method.build(config.algorithm, partial(tokens_with, tokenizer))


def open_sampler(
    config: schema.ReinforcementStage, setup: Setup, roles: Roles, run: Run, sampler: Sampler
) -> Sampler:
    """The sampler where the run stands; one that fills its batches, where the method asks for it."""
    if run.state is not None:
        sampler.restore(run.state.data, run.ahead)
    return full_batches(sampler, config, setup, roles, run.record)


def update(
    config: schema.ReinforcementStage,
    run: Run,
    roles: Roles,
    algorithm: PolicyOptimization,
    experience: TrainingRows,
    pretraining: Pretraining,
    setup: Setup,
    guard: Guard,
) -> dict[str, float]:
    """The optimizer steps of one rollout step; returns the last learning rates."""
    per_pass = config.responses_per_step // config.batch.train
    per_step = updates_per_step(config)
    total = run.num_steps * per_step
    is_policy_due = run.step >= algorithm.critic_warmup_steps
    lrs: dict[str, float] = {}
    longest, seed = config.sampling.max_response_tokens, config.run.seed + run.step
    steps = optimizer_minibatches(
        experience, config.algorithm, longest, per_pass, setup.topology, setup.layout, seed, setup.cost,
        None if roles.critic is None else roles.critic.topology,
    )  # fmt: skip
    for number, one in enumerate(steps, start=run.step * per_step):
        texts = pretraining.microbatches() if is_policy_due else ([], [])
        due, rates = due_updates(config, roles, algorithm, one, texts, is_policy_due, (number, total))
        if is_policy_due:
            batches = [*(micro.batch for micro in one.microbatches), *(micro.batch for micro in texts[0])]
            run.record(budget_fill(batches, setup.layout))
        with guard.skipping():
            require_tokens(one, setup.topology)
            guard.step(due)
            lrs |= rates
            if is_policy_due and roles.average is not None and config.algorithm.ema_beta is not None:
                update_average(roles.average, roles.policy, config.algorithm.ema_beta)
    return lrs


def due_updates(
    config: schema.ReinforcementStage,
    roles: Roles,
    algorithm: PolicyOptimization,
    one: OptimizerStep,
    texts: tuple[list[SupervisedMicrobatch], list[list[str]]],
    is_policy_due: bool,
    place: tuple[int, int],
) -> tuple[list[Update], dict[str, float]]:
    """What an optimizer step trains, the critic first, and at which learning rates.

    Args:
        texts: what the policy learns beside, and the ids of each micro-batch.
        place: number of the optimizer step in the run, and how many there are.
    """
    due: list[Update] = []
    rates = {}
    if roles.critic is not None:
        critic_optimizer, value_loss = facts_of(config).critic_optimizer, algorithm.value_loss
        assert critic_optimizer is not None and value_loss is not None
        rates["lr/critic"] = lr = learning_rate(critic_optimizer, *place)
        due.append(ModelUpdate(roles.critic, one.of_critic, value_loss, one.critic_names, lr, is_paced=False))
    if is_policy_due:
        rates["lr/policy"] = lr = learning_rate(config.optimizer, *place)
        mixed: list[Minibatch | SupervisedMicrobatch] = [*one.microbatches, *texts[0]]
        reading = ENTROPIES if config.algorithm.entropy_coef else None
        policy_loss = beside(algorithm.update_loss())
        due.append(ModelUpdate(roles.policy, mixed, policy_loss, [*one.names, *texts[1]], lr, reading))
    return due, rates


def build_roles(
    config: schema.ReinforcementStage,
    setup: Setup,
    prompts: Sequence[Prompt] = (),
    reward: RewardSource | None = None,
) -> Roles:
    """Policy and critic with optimizers; reference, reward and DPO model without.

    Args:
        prompts: of the run, whose columns rewards may read.
        reward: None: what the configuration says.
    """
    begin_part("models")
    topology, sources = setup.topology, setup.sources
    fresh = {role.name for role in roles_of(config) if role.is_head_fresh}

    def trained(name: str, is_scalar: bool, optimizer: OptimizerConfig) -> TrainedRole:
        return place_trained(
            config, name, sources[name], is_scalar, optimizer, topology.of(name), is_head_fresh=name in fresh
        )

    frozen = FrozenRoles(setup, config.precision)

    def reward_model() -> RewardSource:
        return ModelReward(frozen.place("reward", True), setup.layout, setup.eos, config.algorithm.truncated)

    policy, critic = trained("policy", False, config.optimizer), facts_of(config).critic_optimizer
    has_average = config.algorithm.ema_beta is not None
    group_size = config.algorithm.samples_per_prompt
    roles = Roles(
        policy=policy,
        average=build_average(policy, sources["policy"]) if has_average else None,
        critic=None if critic is None else trained("critic", True, critic),
        reference=frozen.place("reference"),
        reward=alone(reward, topology)
        if reward
        else build_rewards(config, setup, prompts, group_size, reward_model),
        dpo=frozen.place("dpo") if "dpo" in sources else None,
        dpo_reference=frozen.place("dpo_reference") if "dpo_reference" in sources else None,
    )
    others = {"policy": roles.policy, "critic": roles.critic, "policy_ema": roles.average}
    built = frozen.placed() | {name: model for name, model in others.items() if model is not None}
    memory = host_memory(config.offload, built, lambda text: say(text, topology.is_lead))
    return replace(roles, memory=memory)


def open_run(config: schema.ReinforcementStage, setup: Setup, roles: Roles, num_steps: int) -> Run:
    """The run, whose checkpoints hold the policy and, where there are, its average and the critic."""
    candidates: dict[str, RoleModel | None] = {
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
    return Run(config, setup.topology, saved, hf_files, num_steps, roles.memory)


def show_samples(
    config: schema.ReinforcementStage,
    run: Run,
    experience: Experience | None,
    setup: Setup,
    means: dict[str, float],
) -> None:
    """A table of completions when due, with what the step measured; the run's loggers get them too."""
    every = config.run.samples_every
    if experience is None or every is None or not run.is_due(every, run.step) or not setup.topology.is_lead:
        return
    variance = explained_variance(means)
    explained = "none" if variance is None else f"{variance:.3f}"
    critic = f", the critic explains {explained} of the variance of returns"
    has_critic = facts_of(config).critic_optimizer is not None
    title = f"{config.stage} step {run.step}{critic if has_critic else ''}"
    show(completions_table(experience, setup.decode, 4, title))
    run.show(sample_texts(experience, setup.decode, 4))
