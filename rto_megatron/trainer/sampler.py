"""Where a step's rollouts come from: the sampler chooses prompts, asks the pool and hands out what came of it."""

from collections.abc import Callable, Sequence
from typing import Protocol

from rto_megatron.config import schema
from rto_megatron.config.rewards import reads_columns
from rto_megatron.data.batches import Batches, BatchesState
from rto_megatron.generation.contract import RolloutEngine, Sampling
from rto_megatron.lifecycle.start_up import begin_part
from rto_megatron.parallel.topology import Topology
from rto_megatron.trainer.arrivals import Hear
from rto_megatron.trainer.background import Background
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.feed import feed, go_on
from rto_megatron.trainer.pool_requests import PoolRequest, ask, ask_beside, receive, share
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import Metrics, Prompt, Rollout

# Gives the rollouts of all replicas that a sampler had ahead when it was asked, in the order of the prompts. It waits
# for what is in flight; all ranks must call it.
type KeepAhead = Callable[[], tuple[Rollout, ...]]


class Sampler(Protocol):
    """Gives the loop its rollouts; every rank has one, and all ranks call its methods together.

    It owns the prompts: it may ask for more of them than a step trains on, and choose, or draw ahead of the trainer.

    Example:
        sampler.begin(step=3)
        sampled = sampler.draw(step=3)
    """

    def begin(self, step: int, hear: Hear | None = None) -> dict[str, float]:
        """Pushes the weights of a step where it needs them in the pool; returns what that took, for the logs.

        Args:
            hear: may be told of responses that the push waits for.
        """
        ...

    def push(self, version: int) -> dict[str, float]:
        """Makes the pool hold the policy's present weights as `version`, once it samples nothing any more."""
        ...

    def draw(self, step: int, hear: Hear | None = None) -> tuple[Rollout, ...]:
        """This replica's rollouts of a step (counted from 0), on every rank of it.

        Args:
            hear: may be told of some before all are there.

        Returns:
            as many on every replica, `config.responses_per_step` in all, each with the version that sampled it.

        Raises:
            NoServersLeft: on every rank; the last server of the pool died.
        """
        ...

    def measured(self) -> Metrics:
        """Sums for the logs about the draws since the last call: `time/generate_s` and `time/pool_wait_s`."""
        ...

    def state(self) -> BatchesState:
        """What a checkpoint keeps: a sampler restored from it and from `ahead` draws as this one from here on."""
        ...

    def ahead(self) -> KeepAhead:
        """What was drawn and not handed out, to be kept by a checkpoint of this moment, now or later."""
        ...

    def restore(self, state: BatchesState, ahead: Sequence[Rollout] = ()) -> None:
        """Continues where `state` was taken.

        Args:
            ahead: what `KeepAhead` gave; a sampler that draws nothing ahead has none.

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
        OnPolicySampler(config, setup, prompts, pool).draw(step=0)
    """

    def __init__(
        self, config: schema.ReinforcementStage, setup: Setup, prompts: Batches[Prompt], pool: ConnectedPool
    ) -> None:
        self._config = config
        self._setup = setup
        self._prompts = prompts
        self._pool = pool
        self._last = (-1, 0)  # the step of the last draw, and how many it had before
        self._background = Background("rollouts") if pool.engine is not None else None
        self._generated: list[float] = []  # seconds of the draws since they were last told, on replica leads
        self._waited = 0.0  # seconds

    def begin(self, step: int, hear: Hear | None = None) -> dict[str, float]:
        """See `Sampler.begin`."""
        return self.push(step)

    def push(self, version: int) -> dict[str, float]:
        """See `Sampler.push`."""
        return self._pool.push(version)

    def draw(self, step: int, hear: Hear | None = None) -> tuple[Rollout, ...]:
        """See `Sampler.draw`; further draws of a step give further prompts.

        A pool on the trainer's GPUs leaves no room for anything beside it, so nothing is heard of it before its answer.
        """
        last, number = self._last
        self._last = (step, number + 1 if step == last else 0)
        request = self.next_request(step, step, self._last[1])
        if self._pool.shared is not None:
            hear = None
        asked = None
        if self._background is not None and self._pool.engine is not None:
            asked = ask_beside(self._background, self._pool.engine, request, self._config.batch.micro)
        rollouts, waited = receive(self._setup.topology, asked, hear)
        if asked is not None:
            self._generated.append(asked.answer.result().seconds)
            self._waited += waited
        self._pool.rest()
        return rollouts

    def next_request(self, number: int, version: int, draw: int = 0) -> PoolRequest:
        """Takes the next prompts of this replica, to be answered by a version of the policy.

        Args:
            number: of the batch; seeds differ by it.
            draw: of several with one number; seeds differ by it too.
        """
        prompts = self._prompts.next_batch()
        batch = [prompt for prompt in prompts for _ in range(self._config.algorithm.samples_per_prompt)]
        return PoolRequest(batch, sampling(self._config, self._setup, number, draw), version)

    def measured(self) -> Metrics:
        """See `Sampler.measured`."""
        generated, waited = self._generated, self._waited
        self._generated, self._waited = [], 0.0
        if not generated:
            return {}
        return {"time/generate_s": (sum(generated), len(generated)), "time/pool_wait_s": (waited, 1.0)}

    def state(self) -> BatchesState:
        """See `Sampler.state`."""
        return self._prompts.state()

    def ahead(self) -> KeepAhead:
        """See `Sampler.ahead`."""
        return tuple

    def restore(self, state: BatchesState, ahead: Sequence[Rollout] = ()) -> None:
        """See `Sampler.restore`."""
        assert not ahead, "they would be lost"
        go_on(self._prompts, state, "data.train", self._setup.topology)

    def close(self) -> None:
        """See `Sampler.close`."""
        if self._background is not None:
            self._background.close()
        self._pool.push.close()


class WrappedSampler:
    """Hands everything to another sampler; a subclass changes how rollouts are drawn.

    Example:
        WrappedSampler(sampler).draw(step=3)
    """

    def __init__(self, inner: Sampler) -> None:
        self._inner = inner

    def begin(self, step: int, hear: Hear | None = None) -> dict[str, float]:
        """See `Sampler.begin`."""
        return self._inner.begin(step, hear)

    def push(self, version: int) -> dict[str, float]:
        """See `Sampler.push`."""
        return self._inner.push(version)

    def draw(self, step: int, hear: Hear | None = None) -> tuple[Rollout, ...]:
        """See `Sampler.draw`."""
        return self._inner.draw(step, hear)

    def measured(self) -> Metrics:
        """See `Sampler.measured`."""
        return self._inner.measured()

    def state(self) -> BatchesState:
        """See `Sampler.state`."""
        return self._inner.state()

    def ahead(self) -> KeepAhead:
        """See `Sampler.ahead`."""
        return self._inner.ahead()

    def restore(self, state: BatchesState, ahead: Sequence[Rollout] = ()) -> None:
        """See `Sampler.restore`."""
        self._inner.restore(state, ahead)

    def close(self) -> None:
        """See `Sampler.close`."""
        self._inner.close()


def load_batches(config: schema.ReinforcementStage, setup: Setup) -> Batches[Prompt]:
    """This replica's share of every rollout step's prompts."""
    begin_part("data")
    keeps_columns = reads_columns(config.rewards)
    loaded = setup.prepared.prompts(config.data.train, keeps_columns=keeps_columns)
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
    answer = None if engine is None else ask(engine, PoolRequest(prompts, sampling, version))
    return share(topology, answer)
