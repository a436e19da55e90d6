"""The life of a run: resume, count steps, log, save when due, export at the end."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from rto_megatron.config import checks, load, schema
from rto_megatron.engine.absent import RoleModel
from rto_megatron.engine.checkpoint import begin_save, restore
from rto_megatron.engine.exchange import add
from rto_megatron.engine.export import export_hf
from rto_megatron.engine.offload import HostMemory
from rto_megatron.engine.recovery import find_valid
from rto_megatron.engine.saving import Saving
from rto_megatron.errors import RunFolderError
from rto_megatron.generation.contract import NoServersLeft
from rto_megatron.lifecycle.start_up import take_parts, told_start
from rto_megatron.lifecycle.starting import begin_steps
from rto_megatron.lifecycle.stopping import Preempted, is_asked_to_stop
from rto_megatron.parallel.seeds import seed_step
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.peak_memory import peak_memory_gib, reset_peak_memory
from rto_megatron.reporting.loggers import SampleText, settings_of
from rto_megatron.reporting.metrics import MetricLog, reduce_metrics, with_margin
from rto_megatron.reporting.pace import LOAD_RATIO, RATIO, Pace, busiest, slow_rank, slowest
from rto_megatron.reporting.progress import progress, say
from rto_megatron.trainer.resume import (
    LoopState,
    RunState,
    fixed_keys,
    read_ahead,
    read_state,
    require_same,
    texts_ahead,
)
from rto_megatron.trainer.tracing import traced
from rto_megatron.types import Metrics, Rollout


class Run:
    """Steps from the last checkpoint (or 0) to `num_steps`.

    Args:
        config: is saved beside the run.
        models: role -> model; what checkpoints hold.
        hf_files: role -> folder with the model's config.json and tokenizer.
        num_steps: of the whole run.
        memory: from which models are brought back to be saved.

    Raises:
        CheckpointError: the newest checkpoint of the run folder is damaged.
        UserError: it is of a longer or differently configured run.

    Example:
        for step in run.steps(): run.log(train(step))
    """

    def __init__(
        self,
        config: schema.TrainStage,
        topology: Topology,
        models: Mapping[str, RoleModel],
        hf_files: dict[str, Path],
        num_steps: int,
        memory: HostMemory | None = None,
    ) -> None:
        self._config = config.run
        self._fixed_keys = fixed_keys(config)
        self._title = config.stage
        self.dir = config.run.dir
        self._topology = topology
        self._models = models
        self._hf_files = hf_files
        self._memory = memory or HostMemory()
        self.num_steps = num_steps
        checks.refuse(checks.steps_beyond(config.run.profile, num_steps))
        self._metrics: Metrics = {}
        self.pace = Pace()
        self._note = ""
        self.step = 0
        self.refused_in_a_row = 0  # updates, counted by the run's Guard
        self.state: LoopState | None = None  # of the last finished step; None at the start of a run
        self.ahead: tuple[Rollout, ...] = ()  # what the checkpoint holds of later steps
        self._begun = time.monotonic()  # the step that is being made
        self._start: dict[str, float] = {}  # parts of this start, until they are told
        self._keep_ahead: Callable[[], tuple[Rollout, ...]] = tuple
        self._saving: Saving | None = None  # the checkpoint that is being written beside the training
        self._resume()
        self._saved_step = self.step
        self._heard_at, self._is_stopping = self.step, False  # the step of which it was asked last
        self._log: MetricLog | None = None
        if topology.is_lead:
            load.save(config, self.dir)
            settings = settings_of(config.model_dump(mode="json"))
            self._log = MetricLog(self.dir, self.step, config.run.loggers, settings)
        topology.barrier()

    def _resume(self) -> None:
        found = find_valid(self.dir, self._topology, self._config.resume_from_older)
        if found is None:
            return
        state = read_state(found.state, found.path)
        self.state, self.step, self.refused_in_a_row = state.loop, state.step, state.refused_in_a_row
        if self.step > self.num_steps:
            raise RunFolderError(
                f"{self.dir} already holds step {self.step}, more than the {self.num_steps} steps asked for; "
                f"raise run.steps or name another run.dir"
            )
        require_same(state.config, self._fixed_keys, self.dir)
        self.ahead = read_ahead(found.path)
        for role, model in self._models.items():
            restore(found.path / role, model)
        for warning in found.warnings:
            say(f"warning: {warning}", self._topology.is_lead)
        say(f"resumed {self._title} from {found.path}", self._topology.is_lead)

    def steps(self) -> Iterator[int]:
        """The steps still to do, with a progress bar; each is seeded by its number, so a resume draws the same."""
        begin_steps()
        self._start = take_parts()
        with progress(self._title, self.num_steps, self._topology.is_lead, self.step) as advance:
            for step in range(self.step, self.num_steps):
                seed_step(self._config.seed, step, self._topology.tensor_rank)
                self._begun = time.monotonic()
                reset_peak_memory()
                with traced(step + 1, self._config.profile, self.dir, self._topology.rank):
                    yield step
                assert self.step == step + 1, "finish() was not called"
                advance(self._note)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Records the seconds of one phase of the step as `time/<phase>_s`, the mean over replicas."""
        start = time.monotonic()
        yield
        self.record({f"time/{phase}_s": (time.monotonic() - start, 1.0)})

    def record(self, metrics: Metrics) -> None:
        """Adds this replica's sums to those of the step."""
        self._metrics = add(self._metrics, metrics)

    def log(
        self,
        values: dict[str, float],
        derive: Callable[[Mapping[str, float]], dict[str, float]] = lambda means: {},
    ) -> dict[str, float]:
        """Reduces and writes the metrics of the step; all ranks must call it, before `finish`.

        Args:
            values: already global numbers, such as the learning rate.
            derive: makes further metrics of all others.

        Returns:
            name -> mean over all replicas.
        """
        means = {
            **with_margin(reduce_over_replicas(self._metrics, self._topology)),
            **values,
            "time/step_s": time.monotonic() - self._begun,
        }
        means |= derive(means) | self._compare_ranks(means["time/step_s"])
        self._metrics = {}
        if self._log is not None:
            self._log.write(self.step + 1, means)
        self._note = _note(means)
        if self._start:
            say(told_start(self._start, means), self._topology.is_lead)
            self._start = {}
        return means

    def show(self, texts: Sequence[SampleText]) -> None:
        """Shows responses of the last finished step in the run's loggers; only the lead has any."""
        if self._log is not None:
            self._log.samples(self.step, texts)

    def _compare_ranks(self, seconds: float) -> dict[str, float]:
        """What the models of each rank computed in the step of so many seconds, and how far apart the ranks are.

        A warning is said where the slowest rank is much slower than the median.
        """
        topology = self._topology
        own = (self.pace.take(), topology.work.take(), peak_memory_gib())
        paces, flops, gib = zip(*topology.gather_all(own, tuple[float, float, float]), strict=True)
        if (text := slow_rank(paces, self.step + 1)) is not None:
            say(text, topology.is_lead)
        found, load = slowest(paces), busiest(flops)
        tflops = sum(flops) / topology.world_size / seconds / 1e12
        peak = self._config.peak_tflops
        return {
            **({} if found is None else {RATIO: found[1]}),
            **({} if load is None else {LOAD_RATIO: load}),
            "time/model_tflops": tflops,
            "memory/peak_gib": max(gib),
            **({} if peak is None else {"time/mfu": tflops / peak}),
        }

    def finish(self, state: LoopState, keep_ahead: Callable[[], tuple[Rollout, ...]] = tuple) -> None:
        """Ends a step and saves when due, or when the run is to stop; all ranks must call it.

        Args:
            state: what the next step needs beside the models, in a resumed run as in this one.
            keep_ahead: gives the rollouts of later steps, on the lead; all ranks call it when the step is saved.

        Raises:
            Preempted: on every rank; the run was told to stop, and this step is saved.
        """
        self._finish_saving()
        self.step += 1
        self.state, self._keep_ahead = state, keep_ahead
        if self.is_saved(self.step):
            self._save()
        if self._is_stopping:
            self._finish_saving()
            raise Preempted(f"told to stop; step {self.step} of {self.num_steps} is saved in {self.dir}")

    def _save(self) -> None:
        """Saves the last finished step; under run.async_save it stands at the end of the next one."""
        self._finish_saving()
        self._memory.enter("save")
        assert self.state is not None, "no step was finished"
        state = RunState(self.step, self.state, self.refused_in_a_row, self._fixed_keys)
        texts, keep = texts_ahead(self._keep_ahead()), self._config.keep_checkpoints
        self._saving = begin_save(
            self.dir, self.step, self._models, self._hf_files, state.to_json(), keep, texts
        )
        self._saved_step = self.step
        if self._config.async_save and self.step < self.num_steps:
            self._saving.start()
        else:
            self._finish_saving()

    def _finish_saving(self) -> None:
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.finish()

    @contextmanager
    def saved_without_pool(self) -> Iterator[None]:
        """Saves the last finished step when the pool is lost inside, before any weight changed; all ranks must call it.

        Raises:
            NoServersLeft: as inside, and how to go on.
        """
        try:
            yield
        except NoServersLeft as failure:
            if self.step > self._saved_step:
                self._save()
            self._finish_saving()
            kept = f"step {self.step} is saved in {self.dir}" if self.step else "no step was finished yet"
            raise NoServersLeft(
                f"{failure}\n{kept}; start the pool again, and then the run as before: it goes on from there"
            ) from None

    def is_due(self, every: int | None, step: int) -> bool:
        """True at every `every`-th step and at the last one."""
        return step == self.num_steps or (every is not None and step % every == 0)

    def is_saved(self, step: int) -> bool:
        """True where a checkpoint follows the step that is being made; all ranks must call it.

        A request to stop that comes after the first call is heard at the next step: what is measured for a checkpoint
        is measured for every one.
        """
        if self._heard_at != step:
            is_asked = self._topology.any(is_asked_to_stop(self.dir))
            self._heard_at, self._is_stopping = step, is_asked and step < self.num_steps
        return self._is_stopping or self.is_due(self._config.save_every, step)

    def close(self, export_role: str) -> None:
        """Exports the trained model in Hugging Face format to <run>/hf; all ranks must call it."""
        folder = self.dir / "hf"
        self._memory.enter("save")
        export_hf(self._models[export_role], self._hf_files[export_role], folder)
        if self._log is not None:
            self._log.close()
        say(
            f"{self._title}: {self.num_steps} steps done; checkpoints and {folder} in {self.dir}",
            self._topology.is_lead,
        )


def reduce_over_replicas(metrics: Metrics, topology: Topology) -> dict[str, float]:
    """name -> mean over all replicas; all ranks must call it."""

    def all_sum(values: Tensor) -> Tensor:
        return topology.dp_sum(values.to(topology.device.torch_device)).cpu()

    def all_names(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted({name for group in topology.gather(list(names), list[str]) for name in group}))

    return reduce_metrics(metrics, all_sum, all_names)


_NOTES = (
    "loss",
    "accuracy",
    "ties",
    "rewards/accuracies",
    "rewards/ties",
    "rewards/margins",
    "objective/scores",
    "objective/kl",
    "rollout/response_tokens",
)


_RARE = ("ties", "rewards/ties")  # shown where there are any


def _note(means: dict[str, float]) -> str:
    noted = [name for name in _NOTES if name in means and (name not in _RARE or means[name])]
    return "  ".join(f"{name} {means[name]:.4g}" for name in noted)
