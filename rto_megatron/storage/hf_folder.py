"""The tensors of a Hugging Face folder, mapped from its safetensors files and checked before one is used."""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rto_megatron.data.folders import regular_file
from rto_megatron.errors import ModelFolderError
from rto_megatron.storage.foreign_names import own_names
from rto_megatron.storage.weight_files import find_weights, unreadable

_HEADER_LENGTH, _MAX_HEADER = 8, 100_000_000  # bytes, of the safetensors format
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it is.

    Example:
        StoredTensor("model.safetensors", (32000, 64), torch.bfloat16)
    """

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class HfFolder:
    """All tensors of a folder by name; reading one maps its file's pages, and copies nothing.

    Names that a wrapper put something in front of are those of the model inside (`renamed` says so).

    Example:
        HfFolder(folder).tensor("lm_head.weight")
    """

    def __init__(self, path: Path) -> None:
        """Opens every file and reads its header.

        Raises:
            UserError: no safetensors, a damaged, missing or foreign file, an adapter beside the weights, or an index
                that does not fit its files.
        """
        self.path = path
        self._opened = ExitStack()
        self.weights = find_weights(path)
        listed = self.weights.of_tensor
        files = sorted(set(listed.values())) if listed is not None else [self.weights.name]
        self._files = {file: self._open(file, listed or {}) for file in files}
        self.tensors = {name: stored for file in files for name, stored in self._header(file).items()}
        if listed is not None:
            self._compare(listed)
        names, self.renamed = own_names(self.tensors)
        self._stored_names = {own: stored for stored, own in names.items()}
        self.tensors = {own: self.tensors[stored] for own, stored in self._stored_names.items()}

    def _open(self, file: str, listed: dict[str, str]) -> safe_open:
        path = self.path / file
        if not path.exists():
            lost = [name for name, where in listed.items() if where == file]
            raise unreadable(path, FileNotFoundError("no such file"), lost)
        real = regular_file(self.path, file)
        try:
            opened: safe_open = self._opened.enter_context(safe_open(real, "pt"))
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error, _beyond_end(real)) from error
        return opened

    def _header(self, file: str) -> dict[str, StoredTensor]:
        opened, tensors = self._files[file], {}
        for name in list(opened.keys()):
            part = opened.get_slice(name)
            kind = part.get_dtype()
            if kind not in DTYPES:
                raise ModelFolderError(
                    f"{self.path / file}: {name} is {kind}; expected one of {', '.join(DTYPES)}"
                )
            tensors[name] = StoredTensor(file, tuple(part.get_shape()), DTYPES[kind])
        return tensors

    def _compare(self, listed: dict[str, str]) -> None:
        for name, file in listed.items():
            found = self.tensors.get(name)
            if found is None or found.file != file:
                raise ModelFolderError(
                    f"{self.path / self.weights.name} says that {name} is in {file}, which does not hold it; fetch or "
                    "export the model again"
                )
        extra = sorted(self.tensors.keys() - listed.keys())
        if extra:
            raise ModelFolderError(
                f"{self.path / self.tensors[extra[0]].file} holds {extra[0]}, which {self.weights.name} does not list "
                f"({len(extra)} such tensors); fetch or export the model again"
            )

    def tensor(self, name: str) -> Tensor:
        """The tensor, over the pages of its file: do not write to it."""
        tensor: Tensor = self._files[self.tensors[name].file].get_tensor(self._stored_names[name])
        return tensor

    def read(self, name: str, size: tuple[int, ...]) -> Tensor:
        """See `models.weight_map.TensorReader`.

        Raises:
            ModelFolderError: there is no such tensor, or its shape is another.
        """
        stored = self.tensors.get(name)
        if stored is None:
            raise ModelFolderError(
                f"{self.path} has no tensor {name}; found {len(self.tensors)} tensors, e.g. {sorted(self.tensors)[:3]}"
            )
        if stored.shape != size:
            raise ModelFolderError(f"{self.path}: {name} has shape {stored.shape}, config.json says {size}")
        return self.tensor(name)

    def close(self) -> None:
        """Unmaps the files."""
        self._opened.close()


def _beyond_end(path: Path) -> list[str]:
    """Tensors that a shortened file does not hold whole; none where its header cannot be read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH), "little")
        if length > _MAX_HEADER:
            return []
        header = file.read(length)
    end = path.stat().st_size - _HEADER_LENGTH - length
    try:
        ends = {
            name: tensor["data_offsets"][1]
            for name, tensor in json.loads(header).items()
            if name != "__metadata__"
        }
        return [name for name, last in ends.items() if last > end]
    except (ValueError, LookupError, TypeError, AttributeError):
        return []
