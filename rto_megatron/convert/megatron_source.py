"""What a user names as a Megatron checkpoint: a run of this program, a converted folder, or Megatron-LM's own."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rto_megatron.convert.megatron_args import shape_of_args
from rto_megatron.engine.source import WEIGHTS, find_source, has_language_model
from rto_megatron.errors import UserError
from rto_megatron.models.config_files import config_of, shape_of
from rto_megatron.models.hf_config import read_config
from rto_megatron.models.shape import ModelShape
from rto_megatron.storage.megatron_common import read_args
from rto_megatron.storage.megatron_folder import (
    MegatronFolder,
    find_megatron,
    require_tokenizer_of_conversion,
)
from rto_megatron.storage.megatron_tensors import has_scalar_head
from rto_megatron.storage.torch_dist_reader import TorchDistReader

# Of no consequence for the weights, or not known to Megatron's arguments.
_NOT_COMPARED = {"family", "vocab_size", "max_positions", "init_std", "latent"}


@dataclass(frozen=True)
class MegatronSource:
    """One model in Megatron's format, with everything that is needed to read it."""

    folder: Path
    reader: TorchDistReader
    shape: ModelShape
    has_scalar_head: bool
    config: dict[str, Any]  # a config.json
    hf_files: Path | None
    notes: tuple[str, ...]


def open_megatron(path: Path, hf_files: Path | None, scalar: bool | None) -> MegatronSource:
    """Finds and opens a checkpoint.

    Args:
        hf_files: a folder with config.json and tokenizer, where the checkpoint has none beside it or another is wanted.
        scalar: look for a reward model or critic, or for a language model; null: what there is.

    Raises:
        UserError: nothing usable there, or config.json describes another model than the checkpoint's arguments.
    """
    if not path.is_dir():
        raise UserError(
            f"{path} is no folder; expected a Megatron checkpoint, a run folder or one of its checkpoints"
        )
    found = find_megatron(path) or _of_run(path, scalar)
    require_tokenizer_of_conversion(found)
    reader = TorchDistReader(found.weights)
    is_scalar = has_scalar_head(reader)
    if scalar is not None and scalar != is_scalar:
        kinds = {True: "a reward model or critic", False: "a language model"}
        raise UserError(f"{found.weights} holds {kinds[is_scalar]}; --head asks for {kinds[scalar]}")
    files = hf_files or found.hf_files
    if files is None:
        return _from_args(path, reader, is_scalar)
    config = read_config(files)
    shape = shape_of(config)
    _compare_with_args(reader, shape, is_scalar, files)
    return MegatronSource(path, reader, shape, is_scalar, config.values, files, ())


def _of_run(path: Path, scalar: bool | None) -> MegatronFolder:
    if (path / WEIGHTS).is_dir():
        found = find_megatron(path / WEIGHTS)
        assert found is not None
        return found
    if (path / "config.json").is_file():
        raise UserError(f"{path} is a Hugging Face folder; expected a Megatron checkpoint or a run folder")
    # A run keeps both a policy and a critic: the policy is its result.
    is_scalar = scalar if scalar is not None else not has_language_model(path)
    source = find_source(path, is_scalar, is_random=False, key="SOURCE")
    return MegatronFolder(source.path / WEIGHTS, source.hf_folder)


def _from_args(path: Path, reader: TorchDistReader, is_scalar: bool) -> MegatronSource:
    args = read_args(reader.folder)
    if args is None:
        raise UserError(
            f"{path} has no config.json beside it and no Megatron-LM arguments in it; name a folder with the model's "
            "config.json and tokenizer as --hf-files"
        )
    shape = shape_of_args(args, path)
    rows = reader.shape("embedding.word_embeddings.weight")[0]
    note = f"config.json made from Megatron-LM's arguments; {shape.vocab_size} of {rows} vocabulary rows kept"
    if shape.vocab_size > rows:
        shape = replace(shape, vocab_size=rows)
    config = config_of(
        shape, is_scalar, str(reader.dtype("embedding.word_embeddings.weight")).removeprefix("torch.")
    )
    return MegatronSource(
        path, reader, shape, is_scalar, config, None, (note, "no tokenizer: add one by hand")
    )


def _compare_with_args(reader: TorchDistReader, shape: ModelShape, is_scalar: bool, files: Path) -> None:
    """Refuses a config.json that says something else than the run's arguments."""
    args = read_args(reader.folder)
    if args is None or shape.latent is not None:
        return
    described, trained = asdict(shape), asdict(shape_of_args(args, reader.folder))
    differing = [
        f"{name}={value!r}, trained with {trained[name]!r}"
        for name, value in described.items()
        if name not in _NOT_COMPARED and value != trained[name] and not (is_scalar and name == "is_tied")
    ]
    if differing:
        raise UserError(
            f"{files / 'config.json'} does not describe the model in {reader.folder}:\n  "
            + "\n  ".join(differing)
        )
