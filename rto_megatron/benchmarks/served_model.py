"""The Hugging Face folder that a pool serves: the one that was named, or the export of a checkpoint."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from rto_megatron.convert.conversion import Bar, Proofs, convert_to_hf
from rto_megatron.convert.conversion_options import Options
from rto_megatron.convert.megatron_source import open_megatron
from rto_megatron.storage.weight_files import find_weights

_MAX_FILE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class ServedModel:
    """A folder that vLLM reads, and what tells its weights apart from others.

    Example:
        ServedModel(folder=Path("models/rto"), weights="/data/models/rto 5f0e2a91c3d4")
    """

    folder: Path
    weights: str


def served_model(path: Path, exports: Path, bar: Bar) -> ServedModel:
    """Finds the model, and exports it where it is a checkpoint: proved tensor by tensor, and once for each checkpoint.

    Args:
        path: Hugging Face folder, run folder (its newest checkpoint counts), one checkpoint, or Megatron-LM's.
        exports: receives the exported folder, under the checkpoint's name.
        bar: shows the export.

    Raises:
        UserError: there is no language model, or it cannot be exported.
    """
    if (path / "config.json").is_file():
        find_weights(path)
        return ServedModel(path, _identity(path))
    source = open_megatron(path, None, False)
    identity = _identity(source.reader.folder)
    target = exports / identity.rpartition(" ")[2]
    if not target.exists():
        exports.mkdir(parents=True, exist_ok=True)
        convert_to_hf(source, target, Options(None, _MAX_FILE_BYTES, False), Proofs(True, None), bar, False)
    return ServedModel(target, identity)


def _identity(folder: Path) -> str:
    """Where it is, and a hash of its files' names, sizes and times, as reading all weights takes minutes."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    looks = repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])
    return f"{folder.resolve()} {sha256(looks.encode()).hexdigest()[:12]}"
