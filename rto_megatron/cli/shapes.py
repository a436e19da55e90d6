"""Shapes of models that may not be on this machine, and how many parameters they have."""

import re
from dataclasses import dataclass
from pathlib import Path

from rto_megatron.errors import UserError
from rto_megatron.models.shape import ModelShape, read_shape


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
        rope_scaling_factor=None if version == "3" else 32.0,
        is_tied=version != "3",
        init_std=0.02,
    )


KNOWN_SHAPES = {
    "llama-3-8b": _llama(32, 4096, 14336, 32, 128, "3"),
    "llama-3-70b": _llama(80, 8192, 28672, 64, 128, "3"),
    "llama-3.2-1b": _llama(16, 2048, 8192, 32, 64, "3.2"),
    "llama-3.2-3b": _llama(28, 3072, 8192, 24, 128, "3.2"),
}

# Where a model folder, or the run folder of an earlier stage, keeps the Hugging Face configuration.
_PLACES = (".", "hf", "model")


@dataclass(frozen=True)
class FoundShape:
    """A shape and where it was taken from."""

    shape: ModelShape
    source: str


def find_shape(model: Path, assumed: str | None) -> FoundShape | None:
    """The shape of `model`: its config.json, else `assumed`, else what its name says; else None.

    Raises:
        UserError: config.json is there and cannot be used, or `assumed` is no embedded shape.
    """
    folder = _folder_with_config(model)
    if folder is not None:
        return FoundShape(read_shape(folder), "config.json")
    if assumed is not None:
        if assumed not in KNOWN_SHAPES:
            raise UserError(
                f"--assume {assumed}: no such embedded shape; known are {', '.join(KNOWN_SHAPES)}"
            )
        return FoundShape(KNOWN_SHAPES[assumed], f"assumed {assumed}")
    spoken_of = re.search(r"llama-?(3(?:\.\d)?)-?(\d+b)", str(model).lower())
    name = f"llama-{spoken_of[1]}-{spoken_of[2]}" if spoken_of else ""
    return FoundShape(KNOWN_SHAPES[name], f"{name}, by its name") if name in KNOWN_SHAPES else None


def hugging_face_folder(model: Path) -> Path:
    """The folder of `model` (a model folder or an earlier stage's run folder) that holds its config.json.

    Raises:
        UserError: it is not on this machine.
    """
    folder = _folder_with_config(model)
    if folder is None:
        raise UserError(
            f"models.policy={model}: no config.json there; run the stage that makes it first, or fetch a "
            f"hub model with `hf download {model} --local-dir DIR` and name DIR"
        )
    return folder


def _folder_with_config(model: Path) -> Path | None:
    folders = (model / place for place in _PLACES)
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def layer_parameters(shape: ModelShape) -> int:
    """Parameters of one decoder layer: attention, gated feed-forward and two norms."""
    attention = shape.hidden_size * shape.head_dim * 2 * (shape.num_heads + shape.num_kv_heads)
    return attention + 3 * shape.hidden_size * shape.ffn_hidden_size + 2 * shape.hidden_size


def num_parameters(shape: ModelShape, has_value_head: bool) -> int:
    """Parameters of the model; a value head (one output) stands in for the vocabulary's output matrix."""
    embedding = shape.vocab_size * shape.hidden_size
    output = shape.hidden_size if has_value_head else (0 if shape.is_tied else embedding)
    return shape.num_layers * layer_parameters(shape) + embedding + shape.hidden_size + output
