"""Rollouts ahead of the trainer: the pool samples the next batches while this one is scored and trained on.

The weights of one push sample up to `rollout.ahead` batches, which the following steps train on in their order: batches
of the next 1 to `ahead` steps, so that no rollout is older than `ahead` steps. A push waits until nothing is in flight,
and comes when at most one batch is left. With 1 that is at every step, as in verl's one-step-off policy.

Every decision follows from the step and from what is in the queue, never from a clock; with the queue in the checkpoint
a resumed run decides, and so draws, as an undisturbed one.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from itertools import batched

from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.data.batches import Batches, BatchesState
from rto_megatron.parallel.topology import Topology
from rto_megatron.reporting.progress import say
from rto_megatron.trainer.arrivals import Hear
from rto_megatron.trainer.background import Background
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.pool_requests import (
    Asked,
    answered,
    ask_beside,
    in_order_of_prompts,
    listen,
    receive,
)
from rto_megatron.trainer.sampler import KeepAhead, OnPolicySampler
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import Metrics, Prompt, Rollout


@dataclass(frozen=True)
class AskedBatch:
    """A batch that the pool was asked for and that was not handed out.

    Example:
        AskedBatch(ask_beside(background, engine, request, micro=4), behind=prompts.state())
    """

    asked: Asked | None  # on replica leads
    behind: BatchesState  # where the prompts stand behind it
    is_restored: bool = False


class AheadSampler:
    """Draws up to `rollout.ahead` batches before the step that trains on them; see `Sampler`.

    On replica leads a thread asks the pool. It meets no other rank: ranks share what it got when a batch is taken.

    Example:
        AheadSampler(config, setup, prompts, pool).draw(step=0)
    """

    def __init__(
        self, config: ReinforcementStage, setup: Setup, prompts: Batches[Prompt], pool: ConnectedPool
    ) -> None:
        self._config = config
        self._topology = setup.topology
        self._prompts = prompts
        self._engine = pool.engine
        self._pool = OnPolicySampler(config, setup, prompts, pool)
        self._background = Background("rollouts ahead") if pool.engine is not None else None
        self._num_steps = config.run.steps or prompts.batches_per_epoch
        self._queue: deque[AskedBatch] = deque()
        self._handed_out = prompts.state()
        self._is_pushed = False  # the pool holds the weights of the step that was begun
        self._generated: list[float] = []  # seconds of each batch
        self._waited = 0.0  # seconds

    def begin(self, step: int, hear: Hear | None = None) -> dict[str, float]:
        """See `Sampler.begin`."""
        self._is_pushed = len(self._queue) <= 1
        if not self._is_pushed:
            return {}
        if self._queue and hear is not None:
            self._waited += listen(self._topology, self._queue[0].asked, hear)
        return self.push(step)

    def push(self, version: int) -> dict[str, float]:
        """See `Sampler.push`."""
        start = time.monotonic()
        wait([one.asked.answer for one in self._queue if one.asked is not None])
        # The push pauses servers that another replica may still be asking.
        self._topology.raise_together(None)
        self._waited += time.monotonic() - start
        return self._pool.push(version)

    def draw(self, step: int, hear: Hear | None = None) -> tuple[Rollout, ...]:
        """See `Sampler.draw`."""
        if not self._queue:
            if not self._is_pushed:  # whoever chooses among rollouts took all that were ahead
                self.push(step)
                self._is_pushed = True
            self._ask(step)
        one = self._queue.popleft()
        rollouts = self._receive(one, hear)
        self._handed_out = one.behind
        while self._is_pushed and len(self._queue) < min(
            self._config.rollout.ahead, self._num_steps - 1 - step
        ):
            self._ask(step)
        return rollouts

    def _ask(self, version: int) -> None:
        # Counted by the prompts, as the step that a batch is for depends on how many of them a step takes.
        number = self._prompts.state().consumed_samples // self._config.batch.rollout
        request = self._pool.next_request(number, version)
        asked = None
        if self._background is not None and self._engine is not None:
            asked = ask_beside(self._background, self._engine, request, self._config.batch.micro)
        self._queue.append(AskedBatch(asked, self._prompts.state()))

    def _receive(self, one: AskedBatch, hear: Hear | None) -> tuple[Rollout, ...]:
        rollouts, waited = receive(self._topology, one.asked, hear)
        self._waited += waited
        if one.asked is not None and not one.is_restored:
            self._generated.append(one.asked.answer.result().seconds)
        return rollouts

    def measured(self) -> Metrics:
        """See `Sampler.measured`."""
        generated, waited = self._generated, self._waited
        self._generated, self._waited = [], 0.0
        if self._engine is None:
            return {}
        return {"time/generate_s": (sum(generated), len(generated)), "time/pool_wait_s": (waited, 1.0)}

    def state(self) -> BatchesState:
        """See `Sampler.state`; behind the batches that were handed out."""
        return self._handed_out

    def ahead(self) -> KeepAhead:
        """See `Sampler.ahead`."""
        return partial(
            kept_ahead, tuple(self._queue), self._config.algorithm.samples_per_prompt, self._topology
        )

    def restore(self, state: BatchesState, ahead: Sequence[Rollout] = ()) -> None:
        """See `Sampler.restore`."""
        self._pool.restore(state)
        self._handed_out = state
        samples = self._config.algorithm.samples_per_prompt
        for batch in batched(ahead, self._config.responses_per_step):
            own = share_of(batch, samples, self._topology)
            prompts = self._prompts.next_batch()
            assert [prompt.token_ids for prompt in prompts for _ in range(samples)] == [
                rollout.prompt_ids for rollout in own
            ], "data and batch were found to be those of the checkpoint"
            asked = answered(own) if self._topology.is_replica_lead else None
            self._queue.append(AskedBatch(asked, self._prompts.state(), is_restored=True))

    def close(self) -> None:
        """See `Sampler.close`."""
        if self._background is not None:
            self._background.close()
        self._pool.close()


def kept_ahead(asked: Iterable[AskedBatch], samples: int, topology: Topology) -> tuple[Rollout, ...]:
    """The rollouts of batches in flight, of all replicas, once they are there; all ranks must call this.

    A batch that failed ends them: its prompts will be put to a later version of the policy.

    Args:
        samples: responses to each prompt.

    Returns:
        them on the lead, in the order of the prompts, which is the same for any number of replicas.
    """
    kept: list[Rollout] = []
    for one in asked:
        answer = None if one.asked is None else one.asked.answer.result()
        if topology.any(answer is not None and answer.failure is not None):
            say(
                "warning: the pool failed while it sampled ahead, so the checkpoint lacks rollouts: the resumed run "
                "draws them with newer weights, and differs from an undisturbed one",
                topology.is_lead,
            )
            break
        kept += in_order_of_prompts(() if answer is None else answer.rollouts, samples, topology)
    return tuple(kept)


def share_of(batch: Sequence[Rollout], samples: int, topology: Topology) -> tuple[Rollout, ...]:
    """This replica's rollouts of a whole batch, as `Batches` deals prompts: every n-th from its own number on."""
    groups = list(batched(batch, samples))[topology.data_rank :: topology.data_size]
    return tuple(rollout for group in groups for rollout in group)
