"""Where a step's rollouts come from: the sampler chooses prompts, asks the pool and hands out what came of it."""

from collections.abc import Sequence
from typing import Protocol

from rto_megatron.config import schema
from rto_megatron.config.rewards import reads_columns
from rto_megatron.data.batches import Batches, BatchesState
from rto_megatron.data.loader import load_prompts
from rto_megatron.errors import PoolError, UserError
from rto_megatron.generation.contract import NoServersLeft, RolloutEngine, Sampling
from rto_megatron.parallel.topology import Topology
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.feed import feed, go_on
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import Prompt, Rollout


class Sampler(Protocol):
    """Gives the loop its rollouts; every rank has one, and all ranks call its methods together.

    It owns the prompts: it may ask for more of them than a step trains on, and choose, or draw ahead of the trainer.

    Example:
        sampler.push(version=3)
        sampled = sampler.draw(step=3)
    """

    def push(self, version: int) -> dict[str, float]:
        """Makes the pool hold the policy's present weights as `version`; returns what it took, for the logs."""
        ...

    def draw(self, step: int) -> tuple[Rollout, ...]:
        """This replica's rollouts of a step (counted from 0), on every rank of it.

        Returns:
            as many on every replica, `config.responses_per_step` in all, each with the version that sampled it.

        Raises:
            NoServersLeft: on every rank; the last server of the pool died.
        """
        ...

    def state(self) -> BatchesState:
        """What a checkpoint keeps: a sampler restored from it draws the same as this one from here on."""
        ...

    def restore(self, state: BatchesState) -> None:
        """Continues where `state` was taken.

        Raises:
            UserError: it was taken of other data.
        """
        ...

    def close(self) -> None:
        """Ends it; nothing is drawn or pushed any more."""
        ...


class OnPolicySampler:
    """Draws every response of a step with the weights of that step, prompts in the order of the loader.

    Example:
        OnPolicySampler(config, setup, prompts, pool).draw(step=3)
    """

    def __init__(
        self, config: schema.ReinforcementStage, setup: Setup, prompts: Batches[Prompt], pool: ConnectedPool
    ) -> None:
        self._config = config
        self._setup = setup
        self._prompts = prompts
        self._pool = pool
        self._last = (-1, 0)  # the step of the last draw, and how many it had before

    def push(self, version: int) -> dict[str, float]:
        """See `Sampler.push`."""
        return self._pool.push(version)

    def draw(self, step: int) -> tuple[Rollout, ...]:
        """See `Sampler.draw`; further draws of a step give further prompts."""
        last, number = self._last
        self._last = (step, number + 1 if step == last else 0)
        prompts = self._prompts.next_batch()
        batch = [prompt for prompt in prompts for _ in range(self._config.algorithm.samples_per_prompt)]
        how = sampling(self._config, self._setup, step, self._last[1])
        rollouts = sample(self._setup.topology, self._pool.engine, batch, how, version=step)
        self._pool.rest()
        return rollouts

    def state(self) -> BatchesState:
        """See `Sampler.state`."""
        return self._prompts.state()

    def restore(self, state: BatchesState) -> None:
        """See `Sampler.restore`."""
        go_on(self._prompts, state, "data.train", self._setup.topology)

    def close(self) -> None:
        """See `Sampler.close`."""
        self._pool.push.close()


def load_batches(config: schema.ReinforcementStage, setup: Setup) -> Batches[Prompt]:
    """This replica's share of every rollout step's prompts."""
    keeps_columns = reads_columns(config.rewards)
    loaded = load_prompts(config.data.train, setup.tokenizer, setup.limits, keeps_columns=keeps_columns)
    setup.admit(loaded)
    return feed(loaded, config.batch.rollout, config.run.seed, setup.topology)


def sampling(
    config: schema.ReinforcementStage | schema.EvaluateStage, setup: Setup, step: int, draw: int = 0
) -> Sampling:
    """How the recipe samples. Seeds differ by step, replica, and draw of a step."""
    how = config.sampling
    return Sampling(
        max_tokens=how.max_response_tokens,
        eos_ids=setup.eos.ids,
        min_tokens=how.min_response_tokens,
        temperature=how.temperature,
        top_p=how.top_p or 1.0,
        top_k=how.top_k,
        seed=(config.run.seed * 1_000_003 + step) * 1009 + setup.topology.data_rank + (draw << 64),
    )


def sample(
    topology: Topology,
    engine: RolloutEngine | None,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    version: int,
) -> tuple[Rollout, ...]:
    """One response per prompt of this replica, on every rank of it; all ranks must call this.

    Args:
        engine: on replica leads; None elsewhere.
        version: the policy version that must sample.

    Raises:
        NoServersLeft: on every rank; the last server of the pool died.
        UserError: the engine failed or a rollout carries another version.
    """
    rollouts: list[Rollout] = []
    failure = None
    if engine is not None:
        try:
            rollouts = engine.generate(prompts, sampling, version)
            require_version(rollouts, version)
        except UserError as raised:
            failure = raised
    topology.raise_together(failure, NoServersLeft)
    return tuple(topology.replica_value(rollouts, list[Rollout]))


def require_version(rollouts: Sequence[Rollout], version: int) -> None:
    """Refuses rollouts of another policy version.

    Raises:
        PoolError: names the first one.
    """
    for rollout in rollouts:
        if rollout.weight_version != version:
            raise PoolError(
                f"rollout {rollout.prompt_id} was sampled by policy version {rollout.weight_version}, "
                f"expected {version}; nothing was trained on it"
            )
