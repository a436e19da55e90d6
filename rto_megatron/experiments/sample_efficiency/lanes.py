"""Runs the experiment's stages in one process, one after another; what is finished is not run again."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.config import schema
from rto_megatron.config.load import load_stage
from rto_megatron.config.overrides import as_override
from rto_megatron.data.synthetic import SIZES_LONG, write_synthetic_task
from rto_megatron.data.synthetic_source import LONG
from rto_megatron.data.tokenizer import load_tokenizer
from rto_megatron.data.true_reward import TrueReward
from rto_megatron.experiments.sample_efficiency import Design
from rto_megatron.experiments.sample_efficiency.arms import ARMS, Arm
from rto_megatron.experiments.sample_efficiency.curves import best_factor, run_name, seed_folder
from rto_megatron.lifecycle.run_lock import held
from rto_megatron.parallel.topology import Topology
from rto_megatron.reporting.evaluation import FILE_NAME
from rto_megatron.reporting.progress import say
from rto_megatron.trainer.evaluate import evaluate
from rto_megatron.trainer.offline import train_offline
from rto_megatron.trainer.online import build_algorithm, train_online
from rto_megatron.trainer.parts import planned_parts

HIDDEN_SIZE = 64
_OFFLINE = ("sft", "reward_model", "dpo")


@dataclass(frozen=True)
class Lane:
    """One process with one inference server of its own.

    Example:
        lane.tune(design, design.tuning_seeds)
    """

    root: Path
    recipes: Path
    topology: Topology
    server: str
    token_file: Path
    overrides: tuple[str, ...]  # of every training stage

    def tune(self, design: Design, seeds: Iterable[int]) -> None:
        """PPO and RTO at every learning rate, on those of `seeds` that the design tunes on."""
        for seed in seeds:
            self._models(seed)
            if seed in design.tuning_seeds:
                for arm in (arm for arm in ARMS if arm.name in ("ppo", "rto")):
                    for factor in design.factors:
                        self._run(arm, factor, seed)

    def compare(self, design: Design, seeds: Iterable[int]) -> None:
        """All arms on `seeds`, each at the learning rate that its family did best with."""
        best = {name: best_factor(self.root, name, design) for name in ("ppo", "rto")}
        say(f"factors of the learning rate, chosen on seeds {design.tuning_seeds}: {best}", True)
        for seed in seeds:
            self._models(seed)
            for arm in ARMS:
                self._run(arm, best[arm.tuned_as], seed)

    def _models(self, seed: int) -> None:
        folder = seed_folder(self.root, seed)
        if not (folder / "task" / ".complete").exists():
            write_synthetic_task(folder / "task", 1000 + seed, SIZES_LONG, LONG, HIDDEN_SIZE)
            (folder / "task" / ".complete").touch()
        for stage in _OFFLINE:
            if not (folder / stage / "hf").exists():
                config = self._load(schema.OfflineStage, stage, folder, f"run.seed={seed}", *self.overrides)
                with held(config.run.dir):
                    train_offline(config, self.topology)
        for system in ("sft", "dpo"):
            self._evaluate(system, folder)

    def _run(self, arm: Arm, factor: float, seed: int) -> None:
        folder, name = seed_folder(self.root, seed), run_name(arm.name, factor)
        if (folder / "evaluations" / name / FILE_NAME).exists():
            return
        say(f"seed {seed}: {name}", True)
        method = ALGORITHMS[arm.stage]
        has_dpo = isinstance(method, OnlineMethod) and method.has_dpo
        config = self._load(
            schema.ReinforcementStage,
            "reinforcement",
            folder,
            f"vars.method={arm.stage}",
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
            task = folder / "task"
            built = build_algorithm(config, load_tokenizer(task / "tokenizer"))
            algorithm = arm.control(built, TrueReward.load(task / "true_reward.json"))
        if not (folder / name / "hf").exists():
            with held(config.run.dir):
                parts = replace(planned_parts(), algorithm=algorithm)
                train_online(config, self.topology, parts=parts)
        self._evaluate(name, folder)

    def _evaluate(self, system: str, folder: Path) -> None:
        if not (folder / "evaluations" / system / FILE_NAME).exists():
            config = self._load(
                schema.EvaluateStage, "evaluate", folder, f"vars.system={system}", *self._pool()
            )
            with held(config.run.dir):
                evaluate(config, self.topology)

    def _pool(self) -> tuple[str, ...]:
        return f"rollout.servers={json.dumps([self.server])}", as_override(
            "rollout.token_file", self.token_file
        )

    def _load[S: schema.Stage](self, kind: type[S], recipe: str, folder: Path, *overrides: str) -> S:
        return load_stage(
            self.recipes / f"{recipe}.yaml", kind, [as_override("vars.root", folder), *overrides]
        )


def smaller(design: Design, seeds: int) -> Design:
    """The design on the first `seeds` seeds."""
    chosen = design.seeds[:seeds]
    return replace(design, seeds=chosen, tuning_seeds=tuple(s for s in design.tuning_seeds if s in chosen))
