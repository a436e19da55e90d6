"""Finds the torch_dist checkpoint in what a user names: Megatron-LM's tree, one iteration of it, or bare weights."""

import json
from dataclasses import dataclass
from pathlib import Path

from rto_megatron.data.tokenizer_files import require_unchanged
from rto_megatron.errors import ModelFolderError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
HF_FILES = "hf"  # config.json and tokenizer beside the weights
REPORT = "conversion_report.json"


@dataclass(frozen=True)
class MegatronFolder:
    """A checkpoint of weights, and the Hugging Face files that belong to it.

    Example:
        MegatronFolder(weights=path / "iter_0000100", hf_files=None)
    """

    weights: Path
    hf_files: Path | None


def find_megatron(path: Path) -> MegatronFolder | None:
    """What `path` holds; None if it is nothing of Megatron's.

    Raises:
        ModelFolderError: the tracker file is damaged, or the iteration that it names is not there.
    """
    weights = path
    if (path / TRACKER).is_file():
        tracked = (path / TRACKER).read_text(errors="replace").strip()
        if tracked != RELEASE and not tracked.isdecimal():
            raise ModelFolderError(
                f"{path / TRACKER} holds {tracked[:40]!r}; expected 'release' or an iteration"
            )
        weights = path / (RELEASE if tracked == RELEASE else f"iter_{int(tracked):07d}")
        if not weights.is_dir():
            raise ModelFolderError(
                f"{path / TRACKER} names {weights.name}, which is not there; name the folder of an iteration"
            )
    elif not any((path / name).exists() for name in ("metadata.json", ".metadata")) and not any(
        path.glob("mp_rank_*")
    ):
        return None
    beside = (weights / HF_FILES, weights.parent / HF_FILES)
    return MegatronFolder(weights, next((f for f in beside if (f / "config.json").is_file()), None))


def require_tokenizer_of_conversion(folder: MegatronFolder) -> None:
    """Compares the tokenizer beside the weights with the hashes that their conversion recorded.

    Raises:
        ModelFolderError: a file changed, or the report is damaged.
    """
    report = folder.weights.parent / REPORT
    if folder.hf_files is None or not report.is_file():
        return
    try:
        recorded = dict(json.loads(report.read_text())["tokenizer_files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(f"{report} is damaged ({error}); convert the model again") from error
    require_unchanged(folder.hf_files, recorded)
