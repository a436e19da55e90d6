"""What an experiment is: arms that start from the same models, and everything that could be chosen after the fact."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rto_megatron.algorithms.reinforcement import PolicyOptimization
from rto_megatron.errors import RunFolderError
from rto_megatron.reporting.evaluation import Evaluation

Rows = Sequence[Sequence[str]]  # of a table, the first its head
# Changes a method into one that no recipe can name, knowing the folder of the seed.
Control = Callable[[PolicyOptimization, Path], PolicyOptimization]


@dataclass(frozen=True)
class Design:
    """What is run.

    Example:
        Design(seeds=(1, 2, 3), tuning_seeds=(1,), factors=(0.5, 1.0, 2.0))
    """

    seeds: tuple[int, ...]  # each has a task, data and models of its own, shared by all arms
    tuning_seeds: tuple[int, ...]
    factors: tuple[float, ...]  # of the recipe's learning rate, for the policy of PPO and of RTO
    threshold: float = 0.9  # of PPO's final gain over the start, per seed
    window: int = 5  # steps over which curves are averaged
    matched_kl: float = 10.0  # nats per response at which returns are compared


@dataclass(frozen=True)
class Arm:
    """One way to train from the same models on the same prompts.

    Example:
        Arm(name="rto", stage="rto", tuned_as="rto", overrides=("algorithm.beta_dpo=0.05",))
    """

    name: str
    stage: str
    tuned_as: Literal["ppo", "rto"]  # whose learning rate it takes
    overrides: tuple[str, ...] = ()
    recipe: str = "reinforcement"  # the file that `overrides` and the stage change
    control: Control | None = None


@dataclass(frozen=True)
class Experiment:
    """Arms, a design, and what their true reward is called.

    Example:
        Experiment("Episodes to learn", design, arms, Path("launchers/recipes/sample_efficiency"), start="sft")
    """

    title: str
    design: Design
    arms: tuple[Arm, ...]
    recipes: Path
    start: str  # the system that all arms start from, by its name in the folder of evaluations
    source: str | None = None  # of `rewards` that is the true one; None: the table of the synthetic task
    beside: Callable[["Experiment", Path], Rows] | None = None  # makes one more table of the finished runs

    @property
    def metric(self) -> str:
        """The true reward of a step's responses, in metrics.jsonl."""
        return "task/true_return" if self.source is None else f"reward/{self.source}/mean"

    def earned(self, evaluation: Evaluation) -> float:
        """The mean true reward of an evaluated policy.

        Raises:
            RunFolderError: it was evaluated without it.
        """
        known = evaluation.true_return if self.source is None else evaluation.rewards.get(self.source)
        if known is None:
            raise RunFolderError(
                f"the evaluation {evaluation.name!r} has no true return; set evaluate.true_reward (or the source "
                f"{self.source} of rewards) and evaluate it again"
            )
        return known.mean


def on_first_seeds(experiment: Experiment, seeds: int) -> Experiment:
    """The experiment on the first `seeds` seeds."""
    chosen = experiment.design.seeds[:seeds]
    tuned = tuple(seed for seed in experiment.design.tuning_seeds if seed in chosen)
    return replace(experiment, design=replace(experiment.design, seeds=chosen, tuning_seeds=tuned))


def tuned_before(experiment: Experiment, factor: float) -> Experiment:
    """The experiment with PPO's and RTO's learning rate fixed."""
    return replace(experiment, design=replace(experiment.design, factors=(factor,)))
