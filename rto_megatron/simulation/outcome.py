"""What a simulation found: of every kind of rank what it holds, and what each phase of a step takes."""

from collections.abc import Mapping
from dataclasses import dataclass

from rto_megatron.simulation.rank_tally import DeviceRead, Traffic


@dataclass(frozen=True)
class HeldRole:
    """What a rank holds of a role, in bytes.

    Example:
        HeldRole("policy", stage=0, num_parameters=10**9, parts={"policy": 2 * 10**9, "gradients": 4 * 10**9})
    """

    name: str
    stage: int  # pipeline stage
    num_parameters: int
    parts: Mapping[str, int]  # by the names of `offload`: weights by the role's, gradients, optimizer

    @property
    def total(self) -> int:
        """The bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class SimulatedPhase:
    """What a phase of a step takes of a rank, and does there.

    Example:
        SimulatedPhase("score", resident=2**34, working=2**30, flops=1e15, traffic=(), reads=(), parked=0)
    """

    name: str
    resident: int  # bytes of models, gradients and optimizers that are on the device
    working: int  # bytes beside them at the peak: activations, gradients in flight, buffers
    flops: float  # of the passes that were simulated
    traffic: tuple[Traffic, ...]
    reads: tuple[DeviceRead, ...]
    parked: int = 0  # bytes that wait in host memory

    @property
    def peak(self) -> int:
        """Bytes on the device at the most."""
        return self.resident + self.working


@dataclass(frozen=True)
class SimulatedRank:
    """One kind of rank.

    Example:
        max(phase.peak for phase in rank.phases)
    """

    rank: int
    roles: tuple[HeldRole, ...]
    phases: tuple[SimulatedPhase, ...]
    num_sequences: int  # that the simulated passes read
    num_microbatches: int  # in which an optimizer step was simulated
    seconds: float  # of a core that the simulation took

    @property
    def peak(self) -> int:
        """Bytes on the device in the phase that takes most."""
        return max(phase.peak for phase in self.phases)
