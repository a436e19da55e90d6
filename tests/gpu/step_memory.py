"""One step of RTO with all five models in a process of its own: `simulated` or `measured` prints bytes at the peaks.

Usage: python tests/gpu/step_memory.py simulated|measured SIZE
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from simulation.real_memory import measured_alone

from rto_megatron.config.load import load_recipe
from rto_megatron.config.plan import StagePlan, plan_stage
from rto_megatron.models.shape import ModelShape
from rto_megatron.planning.shapes import KNOWN_SHAPES
from rto_megatron.platform.device import prepare
from rto_megatron.simulation.lone_rank import joined
from rto_megatron.simulation.outcome import SimulatedRank
from rto_megatron.simulation.rank_steps import SimulatedStep
from rto_megatron.simulation.rank_tally import RankTally
from rto_megatron.simulation.stage_steps import simulate_step
from rto_megatron.simulation.whole_job import simulate_job

RECIPE = Path(__file__).parents[2] / "launchers/recipes/quickstart/rto.yaml"
KEYS = (
    "precision.dtype=bf16",
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "data.max_prompt_tokens=256",
    "sampling.max_response_tokens=256",
    "batch.micro=2",
    "batch.train=4",
    "batch.rollout=4",
)


class Allocator:
    """The most that torch's allocator gave of the GPU."""

    @property
    def peak(self) -> int:
        """Bytes since the last restart."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def restart(self) -> None:
        """Forgets the peak."""
        torch.cuda.reset_peak_memory_stats()


class CudaMachine:
    """This machine's GPU."""

    def __init__(self) -> None:
        self.ledger, self.tally = Allocator(), RankTally({})

    def __enter__(self) -> None:
        self.ledger.restart()

    def __exit__(self, *raised: object) -> None:
        torch.cuda.synchronize()


def planned(size: int) -> tuple[StagePlan, dict[str, ModelShape]]:
    """Models of `size` hidden numbers in every role."""
    shape = replace(
        KNOWN_SHAPES["llama-3-8b"],
        num_layers=4,
        hidden_size=size,
        ffn_hidden_size=11 * size // 4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=size // 8,
        vocab_size=16 * size,
    )
    plan = plan_stage(load_recipe(RECIPE, KEYS), 1)
    return plan, {role.name: shape for role in plan.roles}


def measured(plan: StagePlan, shapes: Mapping[str, ModelShape]) -> SimulatedRank:
    """The step on the GPU, or on the CPU where there is none."""
    if not torch.cuda.is_available():
        return measured_alone(plan, shapes, 2)
    with joined(plan.config, 0, plan.world_size) as topology:
        step = SimulatedStep(plan, shapes, topology, 2, CudaMachine())
        simulate_step(step)
        return step.found(topology.rank)


def main() -> None:
    """Prints phase -> bytes, and role -> bytes of each part."""
    how, size = sys.argv[1], int(sys.argv[2])
    prepare()
    plan, shapes = planned(size)
    rank = measured(plan, shapes) if how == "measured" else simulate_job(plan, shapes, 2)[0]
    held = {role.name: dict(role.parts) for role in rank.roles}
    print(json.dumps({"peaks": {one.name: one.peak for one in rank.phases}, "held": held}), flush=True)
    os._exit(0)  # on a CPU torch's profiler still listens, and would end the process badly


if __name__ == "__main__":
    main()
