"""The steps of a simulation on real tensors: what torch's own allocator gave and took, as its profiler tells."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from rto_megatron.config.plan import StagePlan
from rto_megatron.models.shape import ModelShape
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.device import prepare
from rto_megatron.simulation.lone_rank import joined
from rto_megatron.simulation.outcome import SimulatedRank
from rto_megatron.simulation.rank_steps import SimulatedStep
from rto_megatron.simulation.rank_tally import RankTally
from rto_megatron.simulation.stage_steps import simulate_step


class Allocated:
    """Adds up what was allocated and freed."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def restart(self) -> None:
        """Forgets the peak."""
        self.peak = self.live

    def add(self, size: int) -> None:
        """Bytes that were allocated, or freed if there are less than none."""
        self.live += size
        self.peak = max(self.peak, self.live)


class ProfiledMachine:
    """This machine, whose allocator is listened to, in phases and between them."""

    def __init__(self) -> None:
        self.ledger = Allocated()
        self.tally = RankTally({})
        self._listen()

    def __enter__(self) -> None:
        self._hear()
        self.ledger.restart()
        self._listen()

    def __exit__(self, *raised: object) -> None:
        self._hear()
        self._listen()

    def _listen(self) -> None:
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._profile.start()

    def _hear(self) -> None:
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(trace))
            events = [
                one for one in json.loads(trace.read_text())["traceEvents"] if one["name"] == "[memory]"
            ]
        for event in sorted(events, key=lambda one: one["ts"]):
            self.ledger.add(event["args"]["Bytes"])


def measured_rank(plan: StagePlan, shapes: Mapping[str, ModelShape], most_microbatches: int) -> SimulatedRank:
    """One real rank of a job over gloo; all of them must call it."""
    topology = Topology.init(prepare(), plan.config.parallel, seed=1)
    return _measured(plan, shapes, topology, most_microbatches)


def measured_alone(
    plan: StagePlan, shapes: Mapping[str, ModelShape], most_microbatches: int
) -> SimulatedRank:
    """Rank 0 of a job with real tensors, whose group answers every collective with what it was given.

    Over gloo other threads free what collectives took, and the profiler hears of its own thread alone.
    """
    with joined(plan.config, 0, plan.world_size) as topology:
        return _measured(plan, shapes, topology, most_microbatches)


def _measured(
    plan: StagePlan, shapes: Mapping[str, ModelShape], topology: Topology, most_microbatches: int
) -> SimulatedRank:
    step = SimulatedStep(plan, shapes, topology, most_microbatches, ProfiledMachine())
    simulate_step(step)
    return step.found(topology.rank)
