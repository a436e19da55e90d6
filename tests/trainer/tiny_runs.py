"""Whole tiny runs: a tokenizer, data in the public layouts, model folders, and a pool without a model."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# MetricLog imports it in the rank that logs; imported here, forked ranks have it already.
import torch.utils.tensorboard  # noqa: F401
from engine.layouts import CHUNKS, CONTEXT, EXPERTS, LAYOUTS
from tiny_models import write_llama

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.config.schema import STAGES, ActorCriticStage, ReinforcementStage, Stage
from rto_megatron.data.tokenizer import train_tokenizer
from rto_megatron.errors import UserError
from rto_megatron.generation.contract import Sampling
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.device import prepare
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.offline import train_offline
from rto_megatron.trainer.online import train_online
from rto_megatron.types import Prompt, Rollout

WORDS = ["red", "blue", "green", "fox", "dog", "cat", "sun", "moon", "star", "rain", "snow", "wind"]
MODELS = {"policy": 7, "dpo": 8, "reference": 9, "reward": 10, "critic": 11}
SCALAR = ("reward", "critic")
ENGINE_VOCAB = 40  # the pool samples ids below it; ids above it stand in prompts alone
NUM_PROMPTS = 20
AHEAD = {"rollout__ahead": 1, "algorithm__pool_importance_cap": 2.0}


def write_files(root: Path) -> None:
    """Tokenizer, models/<role> and three data files."""
    train_tokenizer([" ".join(WORDS)] * 3, root / "tokenizer", vocab_size=96, byte_fallback=False)
    for role, seed in MODELS.items():
        write_llama(root / "models" / role, seed, is_scalar=role in SCALAR)
        shutil.copytree(root / "tokenizer", root / "models" / role, dirs_exist_ok=True)
    turns = [_turn("user", number) for number in range(NUM_PROMPTS)]
    answers = [_turn("assistant", number + 3) for number in range(NUM_PROMPTS)]
    ids = [f"p{number}" for number in range(NUM_PROMPTS)]
    write_rows(
        root / "prompts.jsonl",
        [{"context_messages": [t], "prompt_id": i} for t, i in zip(turns, ids, strict=True)],
    )
    write_rows(
        root / "sft.jsonl",
        [{"messages": [t, a], "prompt_id": i} for t, a, i in zip(turns, answers, ids, strict=True)],
    )
    worse = [*answers[1:], answers[0]]
    write_rows(
        root / "pairs.jsonl",
        [
            {"chosen": [t, a], "rejected": [t, b], "prompt_id": i}
            for t, a, b, i in zip(turns, answers, worse, ids, strict=True)
        ],
    )


def _turn(role: str, number: int) -> dict[str, str]:
    words = [WORDS[(number * (place + 1) + place) % len(WORDS)] for place in range(2 + number % 3)]
    return {"role": role, "content": " ".join(words)}


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def configure(stage: str, root: Path, run_dir: Path, layout: str = "one", **changes: object) -> Stage:
    """A configuration of four steps over the files of `root`; `changes` are keys with `__` for dots, or sections."""
    _, tensor, pipeline, sequence = LAYOUTS[layout]
    context, scheme = CONTEXT.get(layout, (1, "ulysses"))
    expert, expert_tensor = EXPERTS.get(layout, (1, None))
    virtual, stages = CHUNKS.get(layout, (1, None))
    adam = {"lr": 1e-3, "warmup_fraction": 0.5}
    tree: dict[str, Any] = {
        "stage": stage,
        "run": {"dir": run_dir, "steps": 4, "save_every": 2},
        "parallel": {
            "tensor": tensor,
            "context": context,
            "context_scheme": scheme,
            "pipeline": pipeline,
            "virtual": virtual,
            "stages": stages,
            "sequence": sequence,
            "expert": expert,
            "expert_tensor": expert_tensor,
        },
        "precision": {"dtype": "fp32"},
        "models": {"policy": root / "models/policy"},
        "data": {"train": str(root / "pairs.jsonl"), "max_prompt_tokens": 100},
        "batch": {"train": 4, "micro": 2},
        "optimizer": adam,
        "algorithm": {},
    }
    kind = STAGES[stage]
    if issubclass(kind, ReinforcementStage):
        sections = _sampling_sections(root, adam, issubclass(kind, ActorCriticStage))
    else:
        tree["data"] = {**tree["data"], "max_length": 200}
        sections = {
            "sft": {"data": {"train": str(root / "sft.jsonl")}},
            "reward_model": {"data": {"eval": str(root / "pairs.jsonl"), "eval_samples": 6}},
            "simpo": {},
        }.get(stage, {"models": {"reference": root / "models/reference"}})
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    for key, value in changes.items():
        section, dots, name = key.partition("__")
        tree[section] = {**tree.get(section, {}), name: value} if dots else value
    method = ALGORITHMS[stage]
    if isinstance(method, OnlineMethod) and method.config(**tree["algorithm"]).model_dump().get("beta_dpo"):
        tree["models"] = {"dpo": root / "models/dpo", "allow_unverified_reference": True, **tree["models"]}
    return kind.model_validate(tree)


def _sampling_sections(root: Path, adam: dict[str, object], has_critic: bool) -> dict[str, dict[str, object]]:
    names = ("reference", "reward", "critic") if has_critic else ("reference", "reward")
    sections: dict[str, dict[str, object]] = {
        "models": {name: root / "models" / name for name in names},
        "data": {"train": str(root / "prompts.jsonl")},
        "batch": {"rollout": 8},
        "sampling": {"max_response_tokens": 8},
    }
    return {**sections, "critic_optimizer": adam} if has_critic else sections


class HeldPush:
    """A push without weights: the engine takes the version; fails on every rank at version `dies_at`."""

    def __init__(self, engine: ScriptedEngine | None, dies_at: int | None = None) -> None:
        self._engine = engine
        self._dies_at = dies_at

    def __call__(self, version: int) -> dict[str, float]:
        if version == self._dies_at:
            raise UserError(f"the pool died in the push of version {version}")
        if self._engine is not None:
            self._engine.hold(version)
        return {}

    def close(self) -> None:
        """Nothing to leave."""


class FailingEngine(ScriptedEngine):
    """Dies when asked for version `dies_at`; labels its rollouts `age` versions too old."""

    def __init__(self, dies_at: int | None = None, age: int = 0) -> None:
        super().__init__(ENGINE_VOCAB)
        self._dies_at = dies_at
        self._age = age

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """Draws as ScriptedEngine does, with the faults."""
        if version == self._dies_at:
            raise UserError(f"the pool died at version {version}")
        drawn = super().generate(prompts, sampling, version)
        return [replace(r, weight_version=r.weight_version - self._age) for r in drawn]


def join(config: Stage) -> Topology:
    """This rank's place in the configuration's layout."""
    return Topology.init(prepare(), config.parallel, config.run.seed)


def ages(run_dir: Path) -> list[float]:
    """How many versions old the rollouts of each step were."""
    return [entry["rollout/age_steps"] for entry in read_metrics(run_dir)]


def train(
    config: Stage, dies_at: int | None = None, age: int = 0, push_dies_at: int | None = None
) -> str | None:
    """Runs a stage as one rank; returns the error for the user that ended it."""
    place = join(config)
    try:
        if isinstance(config, ReinforcementStage):
            engine = FailingEngine(dies_at, age) if place.is_replica_lead else None
            train_online(config, place, ConnectedPool(engine, HeldPush(engine, push_dies_at)))
        else:
            train_offline(config, place)
    except UserError as error:
        return str(error)
    return None
