"""Where a role's weights come from: a Hugging Face folder, a checkpoint of a stage or of Megatron-LM, a seeded draw."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rto_megatron.config import checks, schema
from rto_megatron.config.roles import roles_of
from rto_megatron.errors import UserError
from rto_megatron.models.config_files import read_shape
from rto_megatron.models.model_folder import code_problems, misnamed, misnamed_folder
from rto_megatron.models.shape import ModelShape
from rto_megatron.storage.file_digests import WEIGHTS
from rto_megatron.storage.megatron_folder import HF_FILES, find_megatron, require_tokenizer_of_conversion
from rto_megatron.storage.weight_files import adapter_problem
from rto_megatron.types import ValueScale

CHECKPOINTS = "checkpoints"
POINTER = "latest"  # <run>/checkpoints/latest: the name of the newest finished checkpoint
LANGUAGE_ROLES = ("policy_ema", "policy")  # where a run keeps an average of the policy, that is its result
SCALAR_ROLES = ("reward", "critic")


@dataclass(frozen=True)
class WeightSource:
    """A place to load one model from."""

    kind: Literal["hugging_face", "checkpoint", "megatron", "random"]
    path: Path  # the Hugging Face folder, <checkpoint>/<role>, or the folder with Megatron-LM's .metadata
    hf_folder: Path  # config.json and the tokenizer

    def shape(self) -> ModelShape:
        """Sizes, from config.json."""
        return read_shape(self.hf_folder)

    def scale(self) -> ValueScale:
        """Mean and std of the reward model's scores; 0 and 1 where config.json has none."""
        mean, std = self._mean_and_std()
        return ValueScale(0.0 if mean is None else float(mean), 1.0 if std is None else float(std))

    def has_scale(self) -> bool:
        """True if config.json has both; without them scores and values are used as the head gives them."""
        return None not in self._mean_and_std()

    def _mean_and_std(self) -> tuple[float | None, float | None]:
        config = json.loads((self.hf_folder / "config.json").read_text())
        return config.get("mean"), config.get("std")


def find_source(path: Path, has_scalar_head: bool, is_random: bool, key: str) -> WeightSource:
    """Tells what `path` is.

    Args:
        path: a Hugging Face folder, a run folder (its last checkpoint counts), one checkpoint, or what
            `rto convert hf-to-megatron` wrote.
        has_scalar_head: look for a reward model or critic, else for a language model.
        is_random: take only config.json and tokenizer from a Hugging Face folder.
        key: the configuration key, for errors.

    Raises:
        UserError: nothing usable there; says what was found.
    """
    if not path.is_dir():
        raise UserError(f"{key}: {misnamed(path)}")
    if (path / "config.json").is_file():
        if not is_random and (problem := adapter_problem(path)) is not None:
            raise UserError(f"{key}: {problem}")
        return WeightSource("random" if is_random else "hugging_face", path, path)
    megatron = find_megatron(path)
    if megatron is not None:
        if megatron.hf_files is None:
            raise UserError(
                f"{key}: {path} is a Megatron-LM checkpoint without config.json and tokenizer; put them into "
                f"{path / HF_FILES}, or convert it (rto convert megatron-to-hf {path} DIR) and name DIR"
            )
        require_tokenizer_of_conversion(megatron)
        return WeightSource("random" if is_random else "megatron", megatron.weights, megatron.hf_files)
    if (problem := pointer_problem(path)) is not None:
        raise UserError(f"{key}: {problem}; put it back, or name one of the checkpoints that are left")
    checkpoint = latest_checkpoint(path) if (path / CHECKPOINTS).is_dir() else path
    roles = SCALAR_ROLES if has_scalar_head else LANGUAGE_ROLES
    for role in roles:
        if checkpoint is not None and (checkpoint / role / WEIGHTS).is_dir():
            return WeightSource("checkpoint", checkpoint / role, checkpoint / role / HF_FILES)
    if checkpoint == path and (known := misnamed_folder(path)) is not None:
        raise UserError(f"{key}: {known}")
    found = sorted(p.name for p in (checkpoint or path).iterdir())[:8]
    raise UserError(
        f"{key}: {checkpoint or path} holds neither config.json nor a finished checkpoint of "
        f"{' or '.join(roles)}; found {found}"
    )


def find_sources(config: schema.Stage) -> dict[str, WeightSource]:
    """Role -> source of every model that the stage loads.

    Raises:
        UserError: names every model that is not there, or that would run code of its own.
    """
    checks.refuse(checks.model_problems(config))
    sources: dict[str, WeightSource] = {}
    problems: list[UserError] = []
    for role in roles_of(config):
        if role.shares is not None:
            continue
        # A reward model is trained from a language model.
        is_scalar = role.has_value_head and not isinstance(config, schema.RewardModelStage)
        try:
            sources[role.name] = find_source(
                role.path, is_scalar, config.models.random_init, key=f"models.{role.name}"
            )
        except UserError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    checks.refuse(map(str, problems))
    checks.refuse(
        f"models.{role}: {problem}"
        for role, source in sources.items()
        for problem in code_problems(source.hf_folder)
    )
    return sources


def has_language_model(path: Path) -> bool:
    """Whether a run folder or checkpoint holds a policy."""
    checkpoint = latest_checkpoint(path) if (path / CHECKPOINTS).is_dir() else path
    return checkpoint is not None and any((checkpoint / role / WEIGHTS).is_dir() for role in LANGUAGE_ROLES)


def finished_checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first; unfinished ones are never under a final name."""
    folders = (run_dir / CHECKPOINTS).glob("step_*")
    return sorted((f for f in folders if is_step_name(f.name)), key=_step_of)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest finished checkpoint of a run."""
    folders = finished_checkpoints(run_dir)
    return folders[-1] if folders else None


def pointer_problem(run_dir: Path) -> str | None:
    """Whether the pointer names a checkpoint that is newer than all there are: one that stood and is gone."""
    pointer, name, newest = run_dir / CHECKPOINTS / POINTER, pointed_name(run_dir), latest_checkpoint(run_dir)
    if name is None:
        return None
    if newest is None:
        return f"{pointer} holds {name!r}, and no checkpoint is beside it; one stood there before"
    if is_step_name(name) and _step_of(newest) < _step_of(Path(name)):
        return f"{pointer} names {name}, which is missing; the newest there is {newest.name}"
    return None


def pointed_name(run_dir: Path) -> str | None:
    """What the pointer holds; None where there is none, as before the end of the first save."""
    try:
        return (run_dir / CHECKPOINTS / POINTER).read_text().strip()
    except FileNotFoundError:
        return None


def is_step_name(name: str) -> bool:
    """Whether a checkpoint can have this name."""
    return re.fullmatch(r"step_\d{6,}", name) is not None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))
