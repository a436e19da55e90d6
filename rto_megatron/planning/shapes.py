"""Shapes of models that may not be on this machine, and how many parameters they have."""

from dataclasses import dataclass
from pathlib import Path

from rto_megatron.config.inputs import ModelsConfig
from rto_megatron.errors import ModelFolderError, RecipeError
from rto_megatron.models.config_files import read_shape
from rto_megatron.models.model_folder import misnamed, misnamed_folder
from rto_megatron.models.shape import ModelShape
from rto_megatron.planning.known_shapes import KNOWN_SHAPES, shape_spoken_of
from rto_megatron.storage.checkpoints import LANGUAGE_ROLES, SCALAR_ROLES, find_role
from rto_megatron.storage.megatron_folder import HF_FILES
from rto_megatron.storage.weight_files import holds_weights


@dataclass(frozen=True)
class FoundShape:
    """A shape and where it was taken from.

    Example:
        FoundShape(shape, source="config.json", folder=folder)
    """

    shape: ModelShape
    source: str
    folder: Path | None = None  # with the config.json, if it is on this machine


def find_shape(model: Path, assumed: str | None, role: str = "policy") -> FoundShape | None:
    """The shape of `model`: its config.json, else `assumed`, else what its name says; else None.

    Args:
        model: a model folder, an earlier stage's run folder (its last checkpoint counts), or a checkpoint.
        role: of the stage; critic and reward look for a scalar model, the others for a language model.

    Raises:
        RecipeError: config.json is there and cannot be used, or `assumed` is no embedded shape.
    """
    if assumed is not None and assumed not in KNOWN_SHAPES:
        raise RecipeError(f"--assume {assumed}: no such embedded shape; known are {', '.join(KNOWN_SHAPES)}")
    folder = _folder_with_config(model, SCALAR_ROLES if role in SCALAR_ROLES else LANGUAGE_ROLES)
    if folder is not None:
        return FoundShape(read_shape(folder), "config.json", folder)
    if assumed is not None:
        return FoundShape(KNOWN_SHAPES[assumed], f"assumed {assumed}")
    name = shape_spoken_of(str(model))
    return None if name is None else FoundShape(KNOWN_SHAPES[name], f"{name}, by its name")


def unread_weights(models: ModelsConfig) -> list[str]:
    """What to say where weights are drawn although the policy's folder holds some; one sentence or none."""
    path = models.policy
    if not models.random_init or not path.is_dir() or not holds_weights(path):
        return []
    return [
        f"models.random_init=true: weights are drawn from run.seed, and those in models.policy={path} are not read; "
        "set models.random_init=false to start from them"
    ]


def hugging_face_folder(model: Path) -> Path:
    """The folder with the config.json of language model `model`: a model folder, a run folder or a checkpoint.

    Raises:
        ModelFolderError: it is not on this machine.
    """
    folder = _folder_with_config(model, LANGUAGE_ROLES)
    if folder is None:
        known = misnamed_folder(model) if model.is_dir() else misnamed(model)
        unknown = (
            f"{model} has no config.json and no checkpoint of a policy; run the stage that makes it first"
        )
        raise ModelFolderError(f"models.policy: {known or unknown}")
    return folder


def _folder_with_config(model: Path, roles: tuple[str, ...]) -> Path | None:
    role = find_role(model, roles)
    folders = (model, *(() if role is None else (role / HF_FILES,)), model / HF_FILES)
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)
