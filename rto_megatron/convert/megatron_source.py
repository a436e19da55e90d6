"""What a user names as a Megatron checkpoint: a run of this program, a converted folder, or Megatron-LM's own."""

from dataclasses import dataclass
from pathlib import Path

from rto_megatron.engine.source import find_source
from rto_megatron.errors import ModelFolderError
from rto_megatron.models.config_files import config_of, shape_of
from rto_megatron.models.hf_config import read_config
from rto_megatron.models.model_folder import misnamed
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import dtype_name
from rto_megatron.storage.checkpoints import CHECKPOINTS, LANGUAGE_ROLES, SCALAR_ROLES, find_role
from rto_megatron.storage.file_digests import WEIGHTS, first_problem
from rto_megatron.storage.megatron_args import require_agreement, shape_of_args
from rto_megatron.storage.megatron_common import read_args
from rto_megatron.storage.megatron_folder import (
    MegatronFolder,
    find_megatron,
    require_tokenizer_of_conversion,
)
from rto_megatron.storage.megatron_tensors import has_scalar_head
from rto_megatron.storage.torch_dist_reader import TorchDistReader

_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class MegatronSource:
    """One model in Megatron's format, with everything that is needed to read it.

    Example:
        source.shape.num_layers, source.config["model_type"]
    """

    reader: TorchDistReader
    shape: ModelShape
    has_scalar_head: bool
    config: dict[str, object]  # a config.json
    hf_files: Path | None
    notes: tuple[str, ...]


def open_megatron(path: Path, hf_files: Path | None, scalar: bool | None) -> MegatronSource:
    """Finds and opens a checkpoint.

    Args:
        hf_files: a folder with config.json and tokenizer, where the checkpoint has none beside it or another is wanted.
        scalar: look for a reward model or critic, or for a language model; null: what there is.

    Raises:
        ModelFolderError: nothing usable there, or config.json describes another model than the checkpoint's arguments.
    """
    if not path.is_dir():
        raise ModelFolderError(
            f"{misnamed(path)}; expected a Megatron checkpoint, a run folder or one of its checkpoints"
        )
    found = find_megatron(path) or _of_run(path, scalar)
    require_tokenizer_of_conversion(found)
    reader = TorchDistReader(found.weights)
    is_scalar = has_scalar_head(reader)
    if scalar is not None and scalar != is_scalar:
        kinds = {True: "a reward model or critic", False: "a language model"}
        raise ModelFolderError(f"{found.weights} holds {kinds[is_scalar]}; --head asks for {kinds[scalar]}")
    files = hf_files or found.hf_files
    if files is None:
        return _from_args(path, reader, is_scalar)
    config = read_config(files)
    shape = shape_of(config)
    require_agreement(config, shape, is_scalar, found.weights)
    return MegatronSource(reader, shape, is_scalar, config.values, files, ())


def require_hugging_face(path: Path, instead: str) -> None:
    """Refuses the other side of a conversion.

    Args:
        instead: the command that takes what `path` is.

    Raises:
        ModelFolderError: `path` is a Megatron checkpoint, a run or one of its checkpoints.
    """
    if not path.is_dir() or (path / "config.json").is_file():
        return
    is_run = (path / CHECKPOINTS).is_dir() or (path / WEIGHTS).is_dir() or any(path.glob(f"*/{WEIGHTS}"))
    if is_run or find_megatron(path) is not None:
        raise ModelFolderError(
            f"{path} is a Megatron checkpoint or a run folder; expected a Hugging Face folder. It is taken by {instead}"
        )


def _of_run(path: Path, scalar: bool | None) -> MegatronFolder:
    if (path / "config.json").is_file():
        raise ModelFolderError(
            f"{path} is a Hugging Face folder; expected a Megatron checkpoint or a run folder. The other way round is "
            f"rto convert hf-to-megatron {path} TARGET"
        )
    if (path / WEIGHTS).is_dir():
        role = path
    else:
        # A run keeps both a policy and a critic: the policy is its result.
        # Where it has neither, a policy is what was expected.
        has_policy, has_scalar = (
            find_role(path, roles) is not None for roles in (LANGUAGE_ROLES, SCALAR_ROLES)
        )
        is_scalar = scalar if scalar is not None else has_scalar and not has_policy
        role = find_source(path, is_scalar, is_random=False, key="SOURCE").path
    problem = first_problem(role)
    if problem is not None:
        raise ModelFolderError(problem)
    found = find_megatron(role / WEIGHTS)
    assert found is not None
    return found


def _from_args(path: Path, reader: TorchDistReader, is_scalar: bool) -> MegatronSource:
    args = read_args(reader.folder)
    if args is None:
        raise ModelFolderError(
            f"{path} has no config.json beside it and no Megatron-LM arguments in it; name a folder with the model's "
            "config.json and tokenizer as --hf-files"
        )
    shape = shape_of_args(args, path)
    if _EMBEDDING not in reader.entries:
        raise ModelFolderError(
            f"{path} has no {_EMBEDDING}; expected the checkpoint of a language or reward model"
        )
    rows = reader.shape(_EMBEDDING)[0]
    if shape.vocab_size > rows:
        raise ModelFolderError(
            f"{path}: the embedding has {rows} rows, its arguments say vocab_size={shape.vocab_size}"
        )
    notes = (
        f"config.json made from Megatron-LM's arguments; {shape.vocab_size} of {rows} vocabulary rows kept",
        "no tokenizer: add one by hand",
    )
    config = config_of(shape, is_scalar, dtype_name(reader.dtype(_EMBEDDING)))
    return MegatronSource(reader, shape, is_scalar, config, None, notes)
