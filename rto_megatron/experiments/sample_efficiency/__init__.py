"""How many episodes PPO, RTO and RTO's ablations need, on a task whose true reward is known.

Everything that could be chosen after the fact is fixed here.
"""

from pathlib import Path

from rto_megatron.experiments.design import Design, Experiment
from rto_megatron.experiments.sample_efficiency.arms import ARMS

DESIGN = Design(seeds=(0, 1, 2, 3, 4), tuning_seeds=(0, 1), factors=(1 / 3, 1.0, 3.0))
EXPERIMENT = Experiment(
    "Episodes to learn a known reward", DESIGN, ARMS, Path("launchers/recipes/sample_efficiency"), start="sft"
)
