"""Where a role's weights come from: a Hugging Face folder, a checkpoint of a stage or of Megatron-LM, a seeded draw."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rto_megatron.config import checks, schema
from rto_megatron.config.roles import roles_of
from rto_megatron.errors import ModelFolderError, UserError
from rto_megatron.models.config_files import read_shape
from rto_megatron.models.model_folder import code_problems, misnamed, misnamed_folder
from rto_megatron.models.shape import ModelShape
from rto_megatron.storage.checkpoints import (
    LANGUAGE_ROLES,
    SCALAR_ROLES,
    checkpoint_of,
    find_role,
    pointer_problem,
    step_of,
)
from rto_megatron.storage.megatron_folder import HF_FILES, find_megatron, require_tokenizer_of_conversion
from rto_megatron.storage.weight_files import adapter_problem
from rto_megatron.types import ValueScale


@dataclass(frozen=True)
class WeightSource:
    """A place to load one model from.

    Example:
        WeightSource("hugging_face", Path("models/sft"), Path("models/sft"))
    """

    kind: Literal["hugging_face", "checkpoint", "megatron", "random"]
    path: Path  # the Hugging Face folder, <checkpoint>/<role>, or the folder with Megatron-LM's .metadata
    hf_folder: Path  # config.json and the tokenizer

    @property
    def step(self) -> int | None:
        """Finished steps of the stage whose checkpoint it is; None: it is none of a stage."""
        return step_of(self.path.parent) if self.kind == "checkpoint" else None

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
        ModelFolderError: nothing usable there; says what was found.
    """
    if not path.is_dir():
        raise ModelFolderError(f"{key}: {misnamed(path)}")
    if (path / "config.json").is_file():
        if not is_random and (problem := adapter_problem(path)) is not None:
            raise ModelFolderError(f"{key}: {problem}")
        return WeightSource("random" if is_random else "hugging_face", path, path)
    megatron = find_megatron(path)
    if megatron is not None:
        if megatron.hf_files is None:
            raise ModelFolderError(
                f"{key}: {path} is a Megatron-LM checkpoint without config.json and tokenizer; put them into "
                f"{path / HF_FILES}, or convert it (rto convert megatron-to-hf {path} DIR) and name DIR"
            )
        require_tokenizer_of_conversion(megatron)
        return WeightSource("random" if is_random else "megatron", megatron.weights, megatron.hf_files)
    if (problem := pointer_problem(path)) is not None:
        raise ModelFolderError(f"{key}: {problem}; put it back, or name one of the checkpoints that are left")
    roles = SCALAR_ROLES if has_scalar_head else LANGUAGE_ROLES
    role = find_role(path, roles)
    if role is not None:
        if is_random:
            raise ModelFolderError(
                f"{key}: {role} is a checkpoint, whose weights would not be read with models.random_init=true; set "
                f"that to false to start from them, or name {role / HF_FILES}, its config.json and tokenizer"
            )
        return WeightSource("checkpoint", role, role / HF_FILES)
    checkpoint = checkpoint_of(path)
    if checkpoint == path and (known := misnamed_folder(path)) is not None:
        raise ModelFolderError(f"{key}: {known}")
    found = sorted(p.name for p in (checkpoint or path).iterdir())[:8]
    raise ModelFolderError(
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
        try:
            has_head = role.has_value_head and not role.is_head_fresh
            key = f"models.{role.name}"
            sources[role.name] = find_source(role.path, has_head, config.models.random_init, key)
        except UserError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    checks.refuse(map(str, problems), ModelFolderError)
    own_code = [
        f"models.{role}: {problem}"
        for role, source in sources.items()
        for problem in code_problems(source.hf_folder)
    ]
    checks.refuse(own_code, ModelFolderError)
    return sources
