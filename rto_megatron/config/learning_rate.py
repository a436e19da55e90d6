"""The learning rate of each optimizer step of a run."""

from dataclasses import dataclass

from rto_megatron.algorithms.schedule import lr_factor, warmup_steps
from rto_megatron.config.facts import facts_of
from rto_megatron.config.schema import TrainStage
from rto_megatron.config.training import OptimizerConfig


@dataclass(frozen=True)
class Rates:
    """What a schedule comes to over a run.

    Example:
        Rates(first=1e-7, highest=1e-6, last=0.0, num_updates=1000, num_warmup=30)
    """

    first: float
    highest: float
    last: float
    num_updates: int
    num_warmup: int  # updates before the highest rate


def learning_rate(config: OptimizerConfig, step: int, num_updates: int) -> float:
    """The rate of optimizer step `step` of `num_updates`."""
    warmup = warmup_steps(config.warmup_fraction, num_updates)
    return config.lr * lr_factor(step, num_updates, warmup, config.min_lr_fraction, config.schedule)


def updates_per_step(config: TrainStage) -> int:
    """Optimizer steps of one step of the run."""
    online = facts_of(config).online
    return 1 if online is None else online.responses_per_step // online.batch.train * online.algorithm.epochs


def known_rates(config: TrainStage) -> dict[str, Rates]:
    """Section of each optimizer -> its rates; nothing where the data decide how long the run is."""
    if config.run.steps is None:
        return {}
    sections = {"optimizer": config.optimizer}
    if (critic := facts_of(config).critic_optimizer) is not None:
        sections["critic_optimizer"] = critic
    return {
        name: _rates(section, config.run.steps * updates_per_step(config))
        for name, section in sections.items()
    }


def _rates(config: OptimizerConfig, num_updates: int) -> Rates:
    warmup = warmup_steps(config.warmup_fraction, num_updates)
    first, highest, last = (learning_rate(config, step, num_updates) for step in (0, warmup, num_updates - 1))
    return Rates(first, highest, last, num_updates, warmup)
