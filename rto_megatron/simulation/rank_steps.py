"""One step of a stage on one rank, by the trainer's own parts: every model is built, asked and trained."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rto_megatron.config.plan import StagePlan
from rto_megatron.config.step_phases import NEEDED, StepPhase
from rto_megatron.data.cut import Layout
from rto_megatron.data.limits import limits_of
from rto_megatron.data.prepared import PreparedData
from rto_megatron.engine.absent import AbsentModel, RoleModel
from rto_megatron.engine.megatron import Model, TrainedModel
from rto_megatron.engine.source import WeightSource
from rto_megatron.errors import RecipeError
from rto_megatron.models.experts import routers
from rto_megatron.models.shape import ModelShape
from rto_megatron.parallel.topology import Topology
from rto_megatron.planning.colocated_memory import largest_bucket_bytes
from rto_megatron.planning.memory import weight_bytes
from rto_megatron.simulation.fake_machine import FakeMachine
from rto_megatron.simulation.held import held_roles
from rto_megatron.simulation.ledger import Ledger
from rto_megatron.simulation.lone_rank import announce_shapes, names_of_groups
from rto_megatron.simulation.made_data import EOS, made_step
from rto_megatron.simulation.outcome import SimulatedPhase, SimulatedRank
from rto_megatron.simulation.rank_tally import RankTally
from rto_megatron.simulation.routing import share_out_evenly
from rto_megatron.trainer.guard import Update
from rto_megatron.trainer.setup import Setup
from rto_megatron.types import ValueScale


@dataclass(frozen=True)
class KnownShape(WeightSource):
    """A model of which nothing but its shape is known; its weights are drawn.

    Example:
        KnownShape.of(shape).shape()
    """

    known: ModelShape | None = None

    @classmethod
    def of(cls, shape: ModelShape) -> "KnownShape":
        """A source without a folder."""
        return cls("random", Path("simulated"), Path("simulated"), shape)

    def shape(self) -> ModelShape:
        """See `WeightSource.shape`."""
        assert self.known is not None
        return self.known

    def scale(self) -> ValueScale:
        """That of a model without one."""
        return ValueScale()


class Peak(Protocol):
    """Tells the most bytes that lived at a time.

    Example:
        ledger.restart()
        ledger.peak
    """

    @property
    def peak(self) -> int:
        """Since the last restart."""
        ...

    def restart(self) -> None:
        """Forgets the peak."""
        ...


class Machine(Protocol):
    """On which a step is taken: a fake one, or a real one whose memory is measured.

    Example:
        with machine:
            model.token_outputs(batches)
        machine.ledger
    """

    @property
    def ledger(self) -> Peak:
        """Of its memory."""
        ...

    @property
    def tally(self) -> RankTally:
        """Of what is done there."""
        ...

    def __enter__(self) -> object: ...

    def __exit__(self, *raised: object) -> bool | None: ...


class SimulatedStep:
    """What the phases of a step share: the machine, the sequences, and what was found of the phases before.

    Args:
        shapes: role -> shape, of every model that the stage loads.
        most_microbatches: of an optimizer step, at most so many are simulated.
        machine: None: a fake one.

    Example:
        step = SimulatedStep(plan, shapes, topology, most_microbatches=2)
        with step.phase("score"): ...
    """

    def __init__(
        self,
        plan: StagePlan,
        shapes: Mapping[str, ModelShape],
        topology: Topology,
        most_microbatches: int,
        machine: Machine | None = None,
    ) -> None:
        training = plan.facts.training
        assert training is not None, "checked: what is not trained is not simulated"
        self.plan = plan
        batch = training.batch
        device = topology.device.torch_device
        layout = Layout(batch.micro, batch.packed, topology.row_multiple, device, batch.tokens)
        self.setup = _setup(plan, shapes, topology, layout)
        self.made = made_step(plan, layout, most_microbatches)
        self.machine = machine or FakeMachine(Ledger(), RankTally(names_of_groups(topology)))
        self._training = training
        self._models: dict[str, Model] = {}
        self._phases: list[SimulatedPhase] = []
        self._start = time.process_time()
        self.where = "before its first phase"  # the phase that is simulated, for errors

    def hold(self, found: Mapping[str, RoleModel | None]) -> None:
        """Makes models known that were built: what they take is told apart from what phases take."""
        present = {name: model for name, model in found.items() if model is not None}
        self._models = {n: model for n, model in present.items() if not isinstance(model, AbsentModel)}
        for model in self._models.values():
            for router in routers(model.module):
                share_out_evenly(router)

    def neighbours_send(self, num_sequences: int) -> None:
        """Pipeline stages hear from here on of micro-batches of so many sequences."""
        length = self.made.row_tokens
        if self.setup.layout.packed:
            announce_shapes(num_sequences * length, 1)
        else:
            announce_shapes(length, num_sequences)

    @contextmanager
    def phase(self, name: StepPhase, title: str | None = None) -> Iterator[None]:
        """Measures what is done inside.

        Args:
            title: None: the phase's name.
        """
        ledger, tally = self.machine.ledger, self.machine.tally
        ledger.restart()
        tally.restart()
        self.where = f"in phase {title or name}"
        with self.machine:
            yield
        held = held_roles(self._models)
        total = sum(role.total for role in held)
        away = set(self._training.offload) - NEEDED[name]
        parked = sum(size for role in held for part, size in role.parts.items() if part in away)
        self._phases.append(
            SimulatedPhase(
                title or name,
                resident=total - parked,
                working=ledger.peak - total,
                flops=tally.flops,
                traffic=tally.traffic(),
                reads=tally.reads(),
                parked=parked,
            )
        )

    def take(self, updates: Sequence[Update]) -> None:
        """The passes of an optimizer step, then the step, as the guard of a run makes them."""
        reached = {name: _gradients_of(model) for name, model in self._models.items()}
        with self.phase("update"):
            settled = [update.accumulate(_as_it_is) for update in updates]
            for settle in settled:
                settle()
        for name, model in self._models.items():
            if isinstance(model, TrainedModel) and any(reached.values()):
                _require_all(name, model, reached[name])
        with self.phase("update", "optimizer step"):
            for update in updates:
                update.apply()

    def found(self, rank: int) -> SimulatedRank:
        """All phases, the weight push among them."""
        return SimulatedRank(
            rank,
            held_roles(self._models),
            (*self._phases, *self._push()),
            self.made.num_items * (2 if self.made.is_pair else 1),
            self.made.num_microbatches,
            time.process_time() - self._start,
        )

    def _push(self) -> tuple[SimulatedPhase, ...]:
        """By arithmetic: two buckets beside what stays."""
        pool, policy = self.plan.facts.pool, self._models.get("policy")
        if pool is None or policy is None:
            return ()
        held = held_roles(self._models)
        away = set(self._training.offload) - NEEDED["push"]
        parked = sum(size for role in held for part, size in role.parts.items() if part in away)
        bucket = largest_bucket_bytes(
            policy.shape,
            weight_bytes(self._training.precision),
            policy.topology.tensor_size,
            pool.bucket_mb << 20,
        )
        resident = sum(role.total for role in held) - parked
        return (SimulatedPhase("push", resident, 2 * bucket, 0.0, (), (), parked),)


def _setup(plan: StagePlan, shapes: Mapping[str, ModelShape], topology: Topology, layout: Layout) -> Setup:
    """A stage's surroundings where no file is read."""
    sources: dict[str, WeightSource] = {
        role.name: KnownShape.of(shapes[role.name]) for role in plan.roles if role.shares is None
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    prepared = PreparedData(Path("simulated"), tokenizer, limits_of(plan.config), EOS)
    return Setup(topology, sources, tokenizer, EOS, layout, prepared, cost=None)


def _as_it_is[M](loss: Callable[..., M]) -> Callable[..., M]:
    return loss


def _gradients_of(model: Model) -> set[str]:
    """Fills with the names of parameters whose gradient is computed."""
    reached: set[str] = set()
    if isinstance(model, TrainedModel):
        for name, parameter in model.module.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, name=name: reached.add(name))
    return reached


def _require_all(role: str, model: TrainedModel, reached: set[str]) -> None:
    missing = [
        name for name, one in model.module.named_parameters() if one.requires_grad and name not in reached
    ]
    if missing:
        raise RecipeError(
            f"no gradient reaches {len(missing)} parameters of {role}, the first {missing[:3]}; the loss does not read "
            "them, so the job would train a part of the model"
        )
