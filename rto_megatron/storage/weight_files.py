"""Chooses the files of a Hugging Face folder that are its weights, as transformers does; others beside them are named.

Source: transformers 5.19, modeling_utils.py:_get_resolved_checkpoint_files, integrations/peft.py:maybe_load_adapters.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rto_megatron.data.folders import regular_file
from rto_megatron.errors import ModelFolderError, UserError
from rto_megatron.models.hf_config import NAMED_WEIGHTS, read_config

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Of any program and format; a trainer's own training_args.bin or optimizer.pt is none.
_WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"),
    *("consolidated*.pth", "tf_model.h5", "flax_model.msgpack", "*.gguf"),
)
_SHOWN = 5


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a folder.

    Attributes:
        name: the single file, or the index.
        of_tensor: tensor name -> file name, as the index says; null: there is one file alone.
        unread: other files of weights in the folder.

    Example:
        WeightFiles("model.safetensors", None, unread=()).note()
    """

    name: str
    of_tensor: dict[str, str] | None
    unread: tuple[str, ...]

    def note(self) -> str | None:
        """What to say about files that are not read; None without any."""
        if not self.unread:
            return None
        more = f" and {len(self.unread) - _SHOWN} more" if len(self.unread) > _SHOWN else ""
        return (
            f"weights are read from {self.name}, which transformers takes; not read are "
            f"{', '.join(self.unread[:_SHOWN])}{more} beside it"
        )


def find_weights(folder: Path) -> WeightFiles:
    """The file that config.json names, else the single file, else the index.

    Raises:
        ModelFolderError: none of them, an adapter beside them, or an index that is damaged or names files elsewhere.
    """
    if (problem := adapter_problem(folder)) is not None:
        raise ModelFolderError(problem)
    name = _named(folder) or next((n for n in (SINGLE, INDEX) if (folder / n).is_file()), None)
    if name is None:
        raise ModelFolderError(f"{folder} has neither {SINGLE} nor {INDEX}{_remedy(folder)}")
    of_tensor = _index(folder, name) if name.endswith(".index.json") else None
    read = {name, *(of_tensor or {}).values()}
    found = {path.name for pattern in _WEIGHTS for path in folder.glob(pattern)}
    return WeightFiles(name, of_tensor, tuple(sorted(found - read)))


def holds_weights(folder: Path) -> bool:
    """Whether there is a file of weights, of any program and format."""
    return any(path.is_file() for pattern in _WEIGHTS for path in folder.glob(pattern))


def adapter_problem(folder: Path) -> str | None:
    """What to say about an adapter in the folder; None without one."""
    found = [name for name in _ADAPTER if (folder / name).is_file()]
    if not found:
        return None
    return (
        f"{folder} holds an adapter ({', '.join(found)}): where peft is installed, transformers puts it on top of the "
        "base weights, and here it would be lost. Merge it (peft's merge_and_unload, then save_pretrained) and name "
        "the folder of the merged model; if the base alone is meant, move these files away"
    )


def _named(folder: Path) -> str | None:
    """The file that config.json asks for, which goes before all others."""
    if not (folder / "config.json").is_file():
        return None
    config = read_config(folder)
    name = config.values.get(NAMED_WEIGHTS)
    if name is None:
        return None
    if Path(str(name)).name != name or not name.endswith((".safetensors", ".safetensors.index.json")):
        config.refuse(f"{NAMED_WEIGHTS} is {name!r}; expected a safetensors file of the folder or its index")
    return str(name)


def _index(folder: Path, name: str) -> dict[str, str]:
    index = folder / name
    try:
        files = json.loads(regular_file(folder, name).read_text())["weight_map"]
        names = {str(tensor): str(file) for tensor, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(index, error) from error
    outside = sorted({file for file in names.values() if Path(file).name != file})
    if outside:
        raise ModelFolderError(
            f"{index} names files outside its folder: {outside[:3]}; expected plain file names"
        )
    return names


def _remedy(folder: Path) -> str:
    if unsafe := sorted(path.name for pattern in _UNSAFE for path in folder.glob(pattern)):
        return (
            f"; found {unsafe[:3]}, which are pickles and never read here: save the model as safetensors with "
            "transformers' save_pretrained on a machine where you trust them"
        )
    if quantized := sorted(path.name for path in folder.glob("*.gguf")):
        return f"; found {quantized[:3]}, llama.cpp's format: take the model's release in safetensors"
    return "; expected a Hugging Face folder with safetensors"


def unreadable(path: Path, error: Exception, lost: Sequence[str] = ()) -> UserError:
    """What to say about a file that cannot be read, and about tensors that are lost with it."""
    more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    tensors = f", which loses {', '.join(sorted(lost)[:_SHOWN])}{more}" if lost else ""
    return ModelFolderError(
        f"{path} is missing or damaged ({type(error).__name__}: {error}){tensors}; fetch or export the model again"
    )
