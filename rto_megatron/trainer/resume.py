"""What a run may change between its attempts, and what it may not."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from rto_megatron.config import schema
from rto_megatron.config.rewards import Source
from rto_megatron.data.batches import BatchesState
from rto_megatron.engine.integrity import CheckpointError
from rto_megatron.errors import RunFolderError
from rto_megatron.generation.rollout_lines import load_rollouts, rollout_lines
from rto_megatron.parallel.collectives import Json
from rto_megatron.section import unread_keys
from rto_megatron.types import Rollout

# Where and how a run is computed, watched and stored, not what it computes. `run.steps` is the exception: it may
# grow, and the learning-rate schedule of the steps still to do follows the new length.
_FREE = (
    "run.dir",
    "run.steps",
    "run.collective_timeout_s",
    "run.save_every",
    "run.keep_checkpoints",
    "run.max_skipped_updates",
    "run.async_save",
    "run.resume_from_older",
    "run.eval_every",
    "run.samples_every",
    "run.keep_rollouts",
    "run.loggers",
    "run.peak_tflops",
    "run.profile",
    "parallel",
    "precision.recompute",
    "precision.kernels",
    "precision.fp8",
    "precision.fp32_parts",
    "batch.micro",
    "batch.tokens",
    "batch.packed",
    "batch.share_prompts",
    "data.eval",
    "data.eval_samples",
    "data.layout",
    "data.cache",
    "data.true_reward",
    "models.allow_unverified_reference",
    "offload",
    "rollout",
    "evaluate",
)
# What the samples and the losses depend on, of sections that are free otherwise.
_FIXED = ("rollout.ahead", "rollout.old_logprobs")
ROLLOUTS_AHEAD = "rollouts_ahead.jsonl"  # <checkpoint>/rollouts_ahead.jsonl, where any were drawn

# Where a source is asked, how long and how often.
_FREE_OF_REWARDS = ("name", "timeout_s", "url", "batch", "concurrency", "retries", "token_file", "token_env")
# Keys that sources did not have, and what they did then.
_BEFORE_OF_REWARDS: Mapping[str, Json] = {"overlong_buffer_tokens": None}
# What runs did whose checkpoints do not say.
_BEFORE: Mapping[str, Json] = {
    "rewards": [],
    "rollout.ahead": 0,
    "rollout.old_logprobs": "trainer",
    "algorithm.pool_importance_mode": "token_truncate",
    "data.loss_on": "last",
    "data.empty_thoughts": "learn",
}

# Mappings whose entries a recipe names: they are compared as a whole, so that one that came or went is seen.
_WHOLE = ("data.template",)


@dataclass(frozen=True)
class LoopState:
    """What the next step needs beside the models, in a resumed run as in an undisturbed one.

    Example:
        LoopState(data=batches.state(), kl=controller.state()).to_json()
    """

    data: BatchesState
    # A loop without texts writes an empty mapping.
    pretraining: Annotated[BatchesState | None, BeforeValidator(lambda state: state or None)] = None
    kl: Mapping[str, float] = field(default_factory=dict)  # of the controller; empty: a loop without one

    def to_json(self) -> dict[str, Json]:
        """The part of state.json that `read_state` reads back."""
        texts: dict[str, Json] = {} if self.pretraining is None else asdict(self.pretraining)
        sampling: dict[str, Json] = {"pretraining": texts, "kl": dict(self.kl)} if self.kl else {}
        return {"data": asdict(self.data), **sampling}


@dataclass(frozen=True)
class RunState:
    """What a checkpoint keeps of its run: <checkpoint>/state.json, in which the loop's part lies flat.

    Example:
        RunState(step=100, loop=loop).to_json()
    """

    step: int
    loop: LoopState
    refused_in_a_row: int = 0  # updates
    config: Mapping[str, Json] = field(default_factory=dict)  # `fixed_keys` of the attempt that wrote it

    def to_json(self) -> dict[str, Json]:
        """The contents of state.json."""
        counts: dict[str, Json] = {"step": self.step, "refused_in_a_row": self.refused_in_a_row}
        return {**self.loop.to_json(), **counts, "config": dict(self.config)}


def read_state(state: dict[str, Json], checkpoint: Path) -> RunState:
    """The contents of a state.json.

    Raises:
        CheckpointError: another program wrote it.
    """
    try:
        return TypeAdapter(RunState).validate_python({**state, "loop": state})
    except ValidationError as error:
        raise CheckpointError(
            f"{checkpoint}: state.json is not what a run writes ({error.errors()[0]['msg']}); name another run.dir"
        ) from error


def fixed_keys(config: schema.Stage) -> dict[str, Json]:
    """Dotted key -> value of everything that every attempt of a run must share."""
    given = _flat(config.model_dump(mode="json"), "")
    # Recipes that set them are refused, and runs were begun with them set.
    unread = unread_keys(config)
    fixed = {key: value for key, value in given.items() if key not in unread and not _is_free(key)}
    if isinstance(config, schema.ReinforcementStage):
        fixed |= {"rewards": [source.name for source in config.rewards], **_of_rewards(config.rewards)}
    return fixed


def _of_rewards(sources: Sequence[Source]) -> dict[str, Json]:
    """What of each source decides its numbers; of a function its file may lie elsewhere, with the same content."""
    found: dict[str, Json] = {}
    for source in sources:
        for key, value in source.model_dump(mode="json", exclude=set(_FREE_OF_REWARDS)).items():
            known = value.rpartition(":")[2] if key == "function" and str(value).count(".py:") else value
            found[f"rewards.{source.name}.{key}"] = known
    return found


def _before_of_rewards(saved: Mapping[str, Json]) -> dict[str, Json]:
    names = saved.get("rewards")
    assert isinstance(names, list | None), "fixed_keys made it"
    return {
        f"rewards.{name}.{key}": value for name in names or () for key, value in _BEFORE_OF_REWARDS.items()
    }


def _flat(tree: dict[str, Json], prefix: str) -> dict[str, Json]:
    flat: dict[str, Json] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) and key not in _WHOLE else {key: value}
    return flat


def _is_free(key: str) -> bool:
    return key not in _FIXED and any(key == free or key.startswith(f"{free}.") for free in _FREE)


def texts_ahead(rollouts: tuple[Rollout, ...]) -> dict[str, str]:
    """The file of rollouts that were drawn ahead, by its name; none where there are none."""
    return {ROLLOUTS_AHEAD: rollout_lines(rollouts)} if rollouts else {}


def read_ahead(checkpoint: Path) -> tuple[Rollout, ...]:
    """The rollouts that a checkpoint holds, of all replicas, in the order of the prompts."""
    path = checkpoint / ROLLOUTS_AHEAD
    return tuple(load_rollouts(path)) if path.exists() else ()


def require_same(saved: Mapping[str, Json], wanted: dict[str, Json], run_dir: Path) -> None:
    """Refuses to go on with a run under another configuration; keys that only one side knows are not compared.

    A key that came to the schema later counts in an older checkpoint as what all runs did before.

    Args:
        saved: `fixed_keys` of the attempt that wrote the checkpoint.
        wanted: `fixed_keys` of this one.

    Raises:
        RunFolderError: lists every key with both values.
    """
    known = {**_BEFORE, **_before_of_rewards(saved), **saved}
    changes = [
        f"  {key}: {known[key]!r} in the checkpoint, {value!r} in the configuration"
        for key, value in wanted.items()
        if key in known and known[key] != value
    ]
    if changes:
        raise RunFolderError(
            f"{run_dir} holds a checkpoint of a run that was configured differently:\n"
            + "\n".join(changes)
            + "\nset these keys back to resume it, or name another run.dir to start a new run"
        )
