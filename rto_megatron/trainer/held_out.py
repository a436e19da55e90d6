"""Evaluations on held-out prompts during a run that samples: scores, lengths, pass@k; every response is kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import batched
from math import comb

from rto_megatron.config import schema
from rto_megatron.data.true_reward import TrueReward
from rto_megatron.generation.contract import NoServersLeft, Sampling
from rto_megatron.reporting.progress import say
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.opinions import Roles
from rto_megatron.trainer.run import Run
from rto_megatron.trainer.sampler import sample
from rto_megatron.trainer.scoring import close_rollouts
from rto_megatron.trainer.setup import Setup
from rto_megatron.trainer.unseen import UNSEEN, keep_rows, load_unseen, numbers_of
from rto_megatron.types import Metrics, Prompt, Rewards, Rollout

FOLDER = "evaluations"


@dataclass(frozen=True)
class HeldOut:
    """The prompts of `data.eval` and how they are answered; every rank has one, and all call its methods together.

    Example:
        run.record(HeldOut(config, setup, pool, sampler.push, prompts, table).measured(run, roles))
    """

    config: schema.ReinforcementStage
    setup: Setup
    pool: ConnectedPool
    push: Callable[[int], dict[str, float]]  # of the sampler, which waits for what it has in flight
    prompts: Sequence[Prompt]  # of all replicas; empty: there is nothing to evaluate
    table: TrueReward | None

    def measured(self, run: Run, roles: Roles) -> Metrics:
        """Sums for the logs where the step that is being made ends with an evaluation; the pool then holds its weights.

        A pool that is lost here is told of, and ends the run at the next push, when this step is finished.
        """
        step = run.step + 1
        if not self.prompts or not run.is_due(self.config.run.eval_every, step):
            return {}
        topology = self.setup.topology
        own = self.prompts[topology.data_rank :: topology.data_size]
        repeated = [prompt for prompt in own for _ in range(self.config.evaluate.num_samples)]
        try:
            self.push(step)
            drawn = sample(topology, self.pool.engine, repeated, self._sampling(), step)
            self.pool.rest()
        except NoServersLeft as failure:
            say(f"warning: step {step} is not evaluated: {failure}", topology.is_lead)
            return {}
        closed = close_rollouts(drawn, self.setup.eos, self.config.algorithm.truncated)
        roles.memory.enter("judge")
        rewards = roles.reward.unnormalized().rate(closed)
        path = self.config.run.dir / FOLDER / f"step_{step:06d}.jsonl"
        keep_rows(path, drawn, numbers_of(rewards), self.config.evaluate.num_samples, self.setup)
        return self._sums(drawn, rewards)

    def _sampling(self) -> Sampling:
        how, config = self.config.evaluate, self.config
        return Sampling(
            max_tokens=config.sampling.max_response_tokens,
            eos_ids=self.setup.eos.ids,
            min_tokens=config.sampling.min_response_tokens,
            temperature=how.temperature,
            top_p=how.top_p or 1.0,
            top_k=how.top_k,
            seed=config.run.seed * 1009 + self.setup.topology.data_rank + (1 << 80),
        )

    def _sums(self, drawn: Sequence[Rollout], rewards: Rewards) -> Metrics:
        count, config, scores = float(len(drawn)), self.config.evaluate, rewards.score_B.tolist()
        sums = {
            "eval/score": (sum(scores), count),
            "eval/response_tokens": (float(sum(len(r.response_ids) for r in drawn)), count),
            "eval/truncated_fraction": (float(sum(r.finish_reason == "length" for r in drawn)), count),
        }
        for name, given_B in rewards.given.items():
            sums[f"eval/reward/{name}/mean"] = (float(given_B.sum()), count)
        if self.table is not None:
            returns = [self.table.returns(r.prompt_ids, r.response_ids) for r in drawn]
            sums["eval/true_return"] = (sum(returns), count)
        if config.pass_score is not None:
            sums |= pass_sums(scores, config.num_samples, config.pass_score)
        return sums


def load_held_out(config: schema.ReinforcementStage, setup: Setup) -> tuple[Prompt, ...]:
    """The held-out prompts of all replicas, none if the recipe names none; all ranks must call it.

    Raises:
        DataError: on every rank; there are fewer than replicas.
    """
    if config.data.eval is None:
        return ()
    # Rewards read columns by the id, and rows of both files may be numbered alike.
    found = load_unseen(config, setup)
    return tuple(replace(prompt, id=f"{UNSEEN}{prompt.id}") for prompt in found)


def pass_sums(scores: Sequence[float], num_samples: int, pass_score: float) -> Metrics:
    """pass@k of the prompts.

    Args:
        scores: of the responses, those to one prompt side by side.
        pass_score: the lowest that passes.
    """
    passes = [sum(one >= pass_score for one in group) for group in batched(scores, num_samples)]
    sums = {}
    for k in pass_ks(num_samples):
        chances = [pass_at_k(num_samples, passed, k) for passed in passes]
        sums[f"eval/pass_at_{k}"] = (sum(chances), float(len(chances)))
    return sums


def pass_ks(num_samples: int) -> list[int]:
    """The powers of two up to the number of samples, and that number."""
    return sorted({num_samples, *(1 << power for power in range(num_samples.bit_length()))})


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The chance that at least one of k of the samples passes, drawn without putting back.

    Source: arXiv 2107.03374, eq. 1.
    """
    return 1.0 - comb(num_samples - num_passed, k) / comb(num_samples, k)
