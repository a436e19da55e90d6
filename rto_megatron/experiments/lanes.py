"""Runs the experiment's stages in one process, one after another; what is finished is not run again."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.config import schema
from rto_megatron.config.load import load_stage
from rto_megatron.config.overrides import as_override
from rto_megatron.data.tokenizer import load_tokenizer
from rto_megatron.engine.source import find_sources
from rto_megatron.experiments.curves import best_factor, run_name, seed_folder
from rto_megatron.experiments.design import Arm, Experiment
from rto_megatron.lifecycle.run_lock import held
from rto_megatron.parallel.topology import Topology
from rto_megatron.reporting.evaluation import FILE_NAME
from rto_megatron.reporting.progress import say
from rto_megatron.trainer.evaluate import evaluate
from rto_megatron.trainer.offline import train_offline
from rto_megatron.trainer.online import build_algorithm, train_online
from rto_megatron.trainer.parts import planned_parts

# Writes the data and models of a seed, from which all arms start; what is there is kept.
MakeModels = Callable[["Lane", Path, int], None]


@dataclass(frozen=True)
class Lane:
    """One process with one inference server of its own.

    Example:
        lane.tune(design.tuning_seeds)
    """

    experiment: Experiment
    make_models: MakeModels
    root: Path
    topology: Topology
    server: str
    token_file: Path
    variables: tuple[str, ...] = ()  # overrides of every stage
    overrides: tuple[str, ...] = ()  # of every training stage

    def tune(self, seeds: Iterable[int]) -> None:
        """PPO and RTO at every learning rate, on those of `seeds` that the design tunes on."""
        for seed in seeds:
            self.make_models(self, seed_folder(self.root, seed), seed)
            if seed in self.experiment.design.tuning_seeds:
                for arm in (arm for arm in self.experiment.arms if arm.name in ("ppo", "rto")):
                    for factor in self.experiment.design.factors:
                        self._run(arm, factor, seed)

    def compare(self, seeds: Iterable[int]) -> None:
        """All arms on `seeds`, each at the learning rate that its family did best with."""
        best = {name: best_factor(self.experiment, self.root, name) for name in ("ppo", "rto")}
        design = self.experiment.design
        when = "before" if len(design.factors) == 1 else f"on seeds {design.tuning_seeds}"
        say(f"factors of the learning rate, chosen {when}: {best}", True)
        for seed in seeds:
            self.make_models(self, seed_folder(self.root, seed), seed)
            for arm in self.experiment.arms:
                self._run(arm, best[arm.tuned_as], seed)

    def learn(self, stage: str, folder: Path, seed: int) -> None:
        """An offline stage of a seed, unless it is finished."""
        if not (folder / stage / "hf").exists():
            config = self._load(schema.OfflineStage, stage, folder, f"run.seed={seed}", *self.overrides)
            with held(config.run.dir):
                train_offline(config, self.topology)

    def evaluate(self, system: str, folder: Path, *overrides: str) -> None:
        """A policy of a seed on held-out prompts, unless that was done."""
        self.sample("evaluate", folder, f"vars.system={system}", *overrides)

    def sample(self, recipe: str, folder: Path, *overrides: str) -> None:
        """What a recipe of stage `evaluate` samples and rates, unless that was done."""
        config = self._load(schema.EvaluateStage, recipe, folder, *self._pool(), *overrides)
        if not (config.run.dir / FILE_NAME).exists():
            with held(config.run.dir):
                evaluate(config, self.topology)

    def _run(self, arm: Arm, factor: float, seed: int) -> None:
        folder, name = seed_folder(self.root, seed), run_name(arm.name, factor)
        if (folder / "evaluations" / name / FILE_NAME).exists():
            return
        say(f"seed {seed}: {name}", True)
        method = ALGORITHMS[arm.stage]
        has_dpo = isinstance(method, OnlineMethod) and method.has_dpo
        config = self._load(
            schema.ReinforcementStage,
            arm.recipe,
            folder,
            f"stage={arm.stage}",
            f"run.seed={seed}",
            as_override("run.dir", folder / name),
            *([as_override("models.dpo", folder / "dpo")] if has_dpo else []),
            *arm.overrides,
            *self._pool(),
            *self.overrides,
        )
        lr = config.optimizer.lr * factor
        config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": lr})})
        algorithm = None
        if arm.control is not None:
            tokenizer = load_tokenizer(find_sources(config)["policy"].hf_folder)
            algorithm = arm.control(build_algorithm(config, tokenizer), folder)
        if not (folder / name / "hf").exists():
            with held(config.run.dir):
                parts = replace(planned_parts(), algorithm=algorithm)
                train_online(config, self.topology, parts=parts)
        self.evaluate(name, folder)
        # Optimizers of all arms and seeds would fill a disk, and nothing reads them any more: the export is kept.
        shutil.rmtree(folder / name / "checkpoints")

    def _pool(self) -> tuple[str, ...]:
        return f"rollout.servers={json.dumps([self.server])}", as_override(
            "rollout.token_file", self.token_file
        )

    def _load[S: schema.Stage](self, kind: type[S], recipe: str, folder: Path, *overrides: str) -> S:
        return load_stage(
            self.experiment.recipes / f"{recipe}.yaml",
            kind,
            [as_override("vars.root", folder), *self.variables, *overrides],
        )
