"""The evaluate stage: samples held-out prompts from the pool and measures what the final table shows."""

from collections.abc import Sequence
from itertools import batched

from rto_megatron.algorithms.termination import TruncationPolicy, compared_ban
from rto_megatron.config import schema
from rto_megatron.data.cut import Layout
from rto_megatron.data.packing import response_mask, rollout_grid
from rto_megatron.engine.absent import RoleModel
from rto_megatron.lifecycle.launched_beside import await_pool
from rto_megatron.lifecycle.start_up import begin_part, take_parts, told_start
from rto_megatron.lifecycle.starting import begin_steps
from rto_megatron.parallel.topology import Topology
from rto_megatron.reporting.evaluation import Estimate, Evaluation, estimate, save_evaluation
from rto_megatron.reporting.progress import say
from rto_megatron.trainer.build_rewards import build_rewards
from rto_megatron.trainer.connected_pool import ConnectedPool, connect_pool
from rto_megatron.trainer.frozen_roles import FrozenRoles
from rto_megatron.trainer.known_reward import known_reward
from rto_megatron.trainer.reward_source import ModelReward, RewardSource
from rto_megatron.trainer.reward_sum import RewardSum
from rto_megatron.trainer.role_shares import RoleShares
from rto_megatron.trainer.sampler import sample, sampling
from rto_megatron.trainer.setup import Setup, prepare_stage
from rto_megatron.trainer.unseen import keep_rows, load_unseen, numbers_of
from rto_megatron.types import Distribution, Prompt, Rollout

ROWS = "evaluation.jsonl"
# Nothing is overwritten; the reward model reads an appended end-of-sequence.
_AS_SAMPLED: TruncationPolicy = "mask"


def evaluate(config: schema.EvaluateStage, topology: Topology, pool: ConnectedPool | None = None) -> None:
    """Writes <run>/evaluation.json: true return, rewards, KL to the reference and length, per prompt, then averaged.

    Responses are kept in <run>/evaluation.jsonl. A pool that is given stands in the place of the configured one.

    Raises:
        DataError: on every rank, before anything is sampled, when the true reward is missing or of another
            tokenizer, or a replica would have no prompt.
    """
    setup = prepare_stage(config, topology)
    table = known_reward("evaluate.true_reward", config.evaluate.true_reward, setup)
    begin_part("models")
    frozen = FrozenRoles(setup, config.precision)
    policy, reference = frozen.place("policy"), frozen.place("reference")
    prompts = load_unseen(config, setup)
    rewards = build_sources(config, setup, prompts, frozen)
    sampler = (pool or connect_pool(config.rollout, policy)).stopping_at(config.sampling.stop, setup.decode)
    _begin(sampler, topology)
    own = prompts[topology.data_rank :: topology.data_size]
    count = config.evaluate.num_samples
    repeated = [prompt for prompt in own for _ in range(count)]
    rollouts = sample(topology, sampler.engine, repeated, sampling(config, setup, 0), version=0)
    sampler.rest()
    sampler.push.close()
    ban = compared_ban(setup.eos, config.sampling.min_response_tokens)
    drawn = Distribution(config.sampling.temperature, ban)
    values = {
        # A model's log-ratio to itself is 0 without a forward.
        "kl": [0.0] * len(rollouts)
        if reference is policy
        else kl_to_reference(rollouts, policy, reference, setup.layout, drawn),
        "tokens": [float(len(r.response_ids)) for r in rollouts],
    }
    if rewards is not None:
        values |= numbers_of(rewards.rate(rollouts))
    if table is not None:
        values["true_return"] = [table.returns(r.prompt_ids, r.response_ids) for r in rollouts]
    kept = {name: samples for name, samples in values.items() if name != "tokens"}
    keep_rows(config.run.dir / ROWS, rollouts, kept, count, setup)
    estimates = {name: _over_prompts(samples, count, topology) for name, samples in values.items()}
    evaluation = Evaluation(
        name=config.evaluate.name,
        true_return=estimates.get("true_return"),
        score=estimates.get("score"),
        kl=estimates["kl"],
        response_tokens=estimates["tokens"],
        num_prompts=len(prompts),
        num_responses=len(prompts) * count,
        steps=setup.sources["policy"].step,
        rewards={source.name: estimates[f"reward/{source.name}"] for source in config.rewards},
    )
    if topology.is_lead:
        path = save_evaluation(evaluation, config.run.dir)
        say(
            f"{evaluation.name}: " + "  ".join(f"{k} {v}" for k, v in estimates.items()) + f"  -> {path}",
            True,
        )
    topology.barrier()


def _begin(pool: ConnectedPool, topology: Topology) -> None:
    """The end of the start: the pool, once it is ready, gets the weights that are evaluated."""
    await_pool()
    begin_part("push")
    pool.push(0)
    begin_steps()
    if parts := take_parts():
        say(told_start(parts), topology.is_lead)


def build_sources(
    config: schema.EvaluateStage, setup: Setup, prompts: Sequence[Prompt], frozen: FrozenRoles
) -> RewardSum | None:
    """What rates the responses, started; None where the recipe names nothing that does. All ranks must call it."""
    begin_part("models")
    if not config.rewards and config.models.reward is None:
        return None

    def reward_model() -> RewardSource:
        return ModelReward(frozen.place("reward", True), setup.layout, setup.eos, _AS_SAMPLED)

    return build_rewards(config, setup, prompts, config.evaluate.num_samples, reward_model)


def kl_to_reference(
    rollouts: Sequence[Rollout], policy: RoleModel, reference: RoleModel, layout: Layout, drawn: Distribution
) -> list[float]:
    """log(pi/pi_ref) of each response, in nats: its mean over what pi sampled is the KL divergence.

    Args:
        drawn: what the pool sampled from; both models are compared as such.
    """
    shares = RoleShares(rollouts, layout, [policy.topology, reference.topology])
    told = [shares.begin(model, drawn) for model in (policy, reference)]
    logp_BR, logp_ref_BR = (rollout_grid(tell(), shares.cut(drawn), rollouts) for tell in told)
    sums: list[float] = ((logp_BR - logp_ref_BR) * response_mask(rollouts, layout.device)).sum(1).tolist()
    return sums


def _over_prompts(samples: Sequence[float], per_prompt: int, topology: Topology) -> Estimate:
    """Prompts are independent, responses to one prompt are not: the standard error is over prompt means."""
    means = [sum(group) / per_prompt for group in batched(samples, per_prompt)]
    return estimate([value for part in topology.gather(means, list[float]) for value in part])
