"""How many episodes PPO, RTO and RTO's ablations need, on a task whose true reward is known.

Everything that could be chosen after the fact is fixed here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Design:
    """What is run.

    Example:
        Design(seeds=(1, 2, 3), factors=(0.5, 1.0, 2.0))
    """

    seeds: tuple[int, ...] = (
        0,
        1,
        2,
        3,
        4,
    )  # each has a task, data and models of its own, shared by all arms
    tuning_seeds: tuple[int, ...] = (0, 1)
    factors: tuple[float, ...] = (
        1 / 3,
        1.0,
        3.0,
    )  # of the recipe's learning rate, for the policy of PPO and of RTO
    threshold: float = 0.9  # of PPO's final gain over SFT, per seed
    window: int = 5  # steps over which curves are averaged
    matched_kl: float = 10.0  # nats per response at which returns are compared


DESIGN = Design()
