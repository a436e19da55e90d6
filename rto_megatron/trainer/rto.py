"""PPO and RTO: the loop of the paper's Algorithm 2."""

from dataclasses import dataclass

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.credit_metrics import explained_variance
from rto_megatron.algorithms.kl_controller import KLController
from rto_megatron.config import schema
from rto_megatron.data.batches import Batches
from rto_megatron.data.loader import load_prompts
from rto_megatron.engine.roles import build_frozen, build_trained
from rto_megatron.parallel.topology import Topology
from rto_megatron.rollout.engine import RolloutEngine, Sampling
from rto_megatron.trainer.pool import PolicyPush, connect_pool, open_push
from rto_megatron.trainer.report.progress import say
from rto_megatron.trainer.report.samples import completions_table, show
from rto_megatron.trainer.rollouts import Roles, close_rollouts, pool_gap, sample, score
from rto_megatron.trainer.run import Run, learning_rate
from rto_megatron.trainer.setup import Setup, prepare_stage, stage_hf_files
from rto_megatron.trainer.update import PolicyOptimization, optimizer_minibatches
from rto_megatron.types import Experience, Prompt


@dataclass(frozen=True)
class Sampler:
    """The pool as the loop sees it."""

    engine: RolloutEngine | None  # on replica leads
    push: PolicyPush


def train_rto(config: schema.PpoStage, topology: Topology, sampler: Sampler | None = None) -> None:
    """Trains PPO or RTO to the end of the run, from the last checkpoint if there is one.

    Args:
        sampler: null: the pool that the configuration names.
    """
    setup = prepare_stage(config, topology)
    roles = build_roles(config, setup)
    prompts = load_batches(config, setup)
    num_steps = config.run.steps or prompts.batches_per_epoch
    hf_files = {
        r: stage_hf_files(setup.sources[r], config.run.dir, r, topology) for r in ("policy", "critic")
    }
    run = Run(config, topology, {"policy": roles.policy, "critic": roles.critic}, hf_files, num_steps)
    algorithm: PolicyOptimization = ALGORITHMS[config.stage](config.algorithm)
    kl = KLController(config.algorithm.beta_kl, config.algorithm.kl_target, config.algorithm.kl_horizon)
    if run.state:
        prompts.restore(run.state["data"])
        kl = kl.restored(run.state["kl"])
    sampler = sampler or Sampler(
        connect_pool(config.rollout, topology), open_push(config.rollout, roles.policy)
    )

    for step in run.steps():
        # 1. pi_old <- pi_theta, proved; the step before is saved by now, whatever becomes of the pool
        with run.timed("push"):
            times = sampler.push(step)
        # 2. y ~ pi_old(. | x), from the pool that holds exactly this step's weights
        with run.timed("sample"):
            batch = prompts.next_batch()
            sampled = sample(topology, sampler.engine, batch, sampling(config, setup, step), version=step)
        rollouts = close_rollouts(sampled, setup.eos_id, config.algorithm.truncated)
        # 3. every model's opinion, without gradients
        with run.timed("score"):
            scored = score(rollouts, roles, setup.layout, setup.eos_id, config.algorithm.truncated)
        # 4. token rewards, then advantages
        experience = algorithm.credit(scored, kl.coef, topology.dp_sum)
        run.record({**algorithm.credit_metrics(scored, experience), **pool_gap(scored, sampled, topology)})
        # 5. PPO epochs
        with run.timed("update"):
            lrs = update(config, run, roles, algorithm, experience, setup)
        means = run.log({**lrs, **times, "objective/kl_coef": kl.coef})
        kl = kl.update(means["policy/kl_per_token"], config.batch.rollout)
        run.finish({"data": prompts.state(), "kl": kl.state()})
        show_samples(config, run, experience, setup, means)
    run.close("policy")
    # The pool is left with the trained policy; should it fail, the run is complete all the same.
    sampler.push(run.step)
    sampler.push.close()


def update(
    config: schema.PpoStage,
    run: Run,
    roles: Roles,
    algorithm: PolicyOptimization,
    experience: Experience,
    setup: Setup,
) -> dict[str, float]:
    """The optimizer steps of one rollout step; returns the last learning rates."""
    per_pass = config.batch.rollout // config.batch.train
    per_step = per_pass * config.algorithm.epochs
    total = run.num_steps * per_step
    lrs = {}
    steps = optimizer_minibatches(
        experience, config.algorithm, per_pass, setup.topology, setup.layout, config.run.seed + run.step
    )
    for number, (batches, names) in enumerate(steps, start=run.step * per_step):
        lrs = {
            "lr/critic": learning_rate(config.critic_optimizer, number, total),
            "lr/policy": learning_rate(config.optimizer, number, total),
        }
        run.record(roles.critic.step(batches, algorithm.value_loss, names, lrs["lr/critic"]))
        run.record(roles.policy.step(batches, algorithm.policy_loss, names, lrs["lr/policy"]))
    return lrs


def build_roles(config: schema.PpoStage, setup: Setup) -> Roles:
    """Policy and critic with optimizers; reference, reward and DPO model without."""
    topology, sources, precision = setup.topology, setup.sources, config.precision

    def trained(name: str, is_scalar: bool, optimizer: schema.OptimizerConfig):
        return build_trained(
            name, sources[name], is_scalar, precision, optimizer, topology, config.run.seed,
            config.parallel.distributed_optimizer,
        )  # fmt: skip

    def frozen(name: str, is_scalar: bool = False):
        return build_frozen(name, sources[name], is_scalar, precision, topology)

    return Roles(
        policy=trained("policy", False, config.optimizer),
        critic=trained("critic", True, config.critic_optimizer),
        reference=frozen("reference"),
        reward=frozen("reward", True),
        dpo=frozen("dpo") if "dpo" in sources else None,
        dpo_reference=frozen("dpo_reference") if "dpo_reference" in sources else None,
    )


def load_batches(config: schema.PpoStage, setup: Setup) -> Batches[Prompt]:
    """This replica's share of every rollout step's prompts."""
    loaded = load_prompts(config.data.train, setup.tokenizer, setup.limits)
    say(loaded.report.summary(), setup.topology.is_lead)
    place = setup.topology
    return Batches(loaded.items, config.batch.rollout, config.run.seed, place.data_rank, place.data_size)


def sampling(config: schema.PpoStage | schema.EvaluateStage, setup: Setup, step: int) -> Sampling:
    """Temperature 1 and top-p 1: the distribution whose log-probs the ratio uses. Seeds differ by step and replica."""
    return Sampling(
        max_tokens=config.sampling.max_response_tokens,
        eos_ids=(setup.eos_id,),
        min_tokens=config.sampling.min_response_tokens,
        seed=(config.run.seed * 1_000_003 + step) * 1009 + setup.topology.data_rank,
    )


def show_samples(
    config: schema.PpoStage, run: Run, experience: Experience, setup: Setup, means: dict[str, float]
) -> None:
    """A table of completions when due, with what the step measured."""
    every = config.run.samples_every
    if every is None or not run.is_due(every, run.step) or not setup.topology.is_lead:
        return
    variance = explained_variance(means)
    explained = "none" if variance is None else f"{variance:.3f}"
    title = f"{config.stage} step {run.step}, the critic explains {explained} of the variance of returns"
    show(completions_table(experience, setup.tokenizer.decode, 4, title))
