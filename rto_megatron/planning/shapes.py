"""Shapes of models that may not be on this machine, and how many parameters they have."""

import re
from dataclasses import dataclass
from pathlib import Path

from rto_megatron.errors import ModelFolderError, RecipeError
from rto_megatron.models.config_files import read_shape
from rto_megatron.models.model_folder import misnamed, misnamed_folder
from rto_megatron.models.shape import Experts, ModelShape
from rto_megatron.storage.checkpoints import LANGUAGE_ROLES, SCALAR_ROLES, find_role
from rto_megatron.storage.megatron_folder import HF_FILES


def _llama(layers: int, hidden: int, ffn: int, heads: int, head_dim: int, version: str) -> ModelShape:
    return ModelShape(
        family="llama",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        vocab_size=128256,
        max_positions=8192 if version == "3" else 131072,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling_factor={"3": None, "3.1": 8.0, "3.2": 32.0}[version],
        is_tied=version == "3.2",
        init_std=0.02,
    )


_QWEN3_30B_A3B = ModelShape(
    family="qwen3_moe",
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=151936,
    max_positions=40960,
    norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling_factor=None,
    is_tied=False,
    init_std=0.02,
    has_qk_norm=True,
    experts=Experts(num=128, per_token=8, ffn_hidden_size=768, layers=tuple(range(48)), is_normalized=True),
)

_QWEN3_1_7B = ModelShape(
    family="qwen3",
    num_layers=28,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_positions=40960,
    norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling_factor=None,
    is_tied=True,
    init_std=0.02,
    has_qk_norm=True,
)

KNOWN_SHAPES = {
    "llama-3-8b": _llama(32, 4096, 14336, 32, 128, "3"),
    "llama-3-70b": _llama(80, 8192, 28672, 64, 128, "3"),
    "llama-3.1-8b": _llama(32, 4096, 14336, 32, 128, "3.1"),
    "llama-3.1-70b": _llama(80, 8192, 28672, 64, 128, "3.1"),
    "llama-3.2-1b": _llama(16, 2048, 8192, 32, 64, "3.2"),
    "llama-3.2-3b": _llama(28, 3072, 8192, 24, 128, "3.2"),
    "qwen3-1.7b": _QWEN3_1_7B,
    "qwen3-30b-a3b": _QWEN3_30B_A3B,
}


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
    folder = _folder_with_config(model, SCALAR_ROLES if role in SCALAR_ROLES else LANGUAGE_ROLES)
    if folder is not None:
        return FoundShape(read_shape(folder), "config.json", folder)
    if assumed is not None:
        if assumed not in KNOWN_SHAPES:
            raise RecipeError(
                f"--assume {assumed}: no such embedded shape; known are {', '.join(KNOWN_SHAPES)}"
            )
        return FoundShape(KNOWN_SHAPES[assumed], f"assumed {assumed}")
    spoken_of = re.search(r"llama-?(3(?:\.\d)?)-?(\d+b)|qwen3[-_](1\.7b|30b[-_]a3b)", str(model).lower())
    if spoken_of is None:
        return None
    version, size, qwen = spoken_of.groups()
    name = f"llama-{version}-{size}" if qwen is None else f"qwen3-{qwen.replace('_', '-')}"
    return FoundShape(KNOWN_SHAPES[name], f"{name}, by its name") if name in KNOWN_SHAPES else None


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
