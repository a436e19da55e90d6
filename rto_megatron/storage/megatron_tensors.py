"""A Megatron checkpoint seen as the Hugging Face tensors that it holds, through the family's map."""

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from rto_megatron.errors import ModelFolderError, refuse_if
from rto_megatron.models.parameters import stored_parameters
from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import GateUpRows, MappedParameter, VocabRows, merge
from rto_megatron.storage.megatron_names import NOT_WEIGHTS, CheckpointSlot, slots, stored_shape
from rto_megatron.storage.torch_dist_reader import TorchDistReader

HEAD = "output_layer.weight"


class MegatronTensors:
    """Reads whole parameters, one at a time, whatever layout the checkpoint was written in.

    Example:
        MegatronTensors(reader, shape, has_scalar_head=False).read("lm_head.weight", (32000, 64))
    """

    def __init__(self, reader: TorchDistReader, shape: ModelShape, has_scalar_head: bool) -> None:
        """Finds every parameter.

        Raises:
            UserError: all entries that are missing, of another shape, or left over, by name.
        """
        self._reader = reader
        self.parameters = stored_parameters(shape, has_scalar_head)
        self._slots: dict[str, CheckpointSlot] = {}
        self._of_name = {name: p for p in self.parameters for name in p.hf}
        self._latest: tuple[str, tuple[Tensor, ...]] = ("", ())
        problems = [problem for p in self.parameters for problem in self._find(p, shape)]
        used = {slot.key for slot in self._slots.values()}
        problems += [
            f"{key} {reader.shape(key)} is left over: config.json describes no such parameter"
            for key in sorted(reader.entries.keys() - used)
            if not NOT_WEIGHTS.match(key)
        ]
        refuse_if(
            problems,
            f"{reader.folder} does not hold the {shape.family} model of config.json",
            ModelFolderError,
        )

    def _find(self, parameter: MappedParameter, shape: ModelShape) -> list[str]:
        candidates = slots(parameter, shape)
        slot = next((s for s in candidates if s.key in self._reader.entries), None)
        if slot is None:
            return [f"{candidates[0].key} is missing ({parameter.megatron})"]
        self._slots[parameter.megatron] = slot
        found, want = self._reader.shape(slot.key), (*slot.sizes, *stored_shape(parameter))
        if found == want or _is_padded_otherwise(parameter, found):
            return []
        if parameter.megatron == HEAD and not isinstance(parameter.layout, VocabRows):
            return [
                f"{slot.key} {found} is the head of a language model; expected the scalar head {want} of a reward "
                "model or critic, which never takes a row of the other"
            ]
        return [f"{slot.key} has shape {found}, config.json says {want}"]

    @property
    def folder(self) -> Path:
        """Where the checkpoint is."""
        return self._reader.folder

    def whole(self, parameter: MappedParameter) -> Tensor:
        """The parameter as one tensor rank would hold it, with the checkpoint's padding and dtype.

        Raises:
            UserError: the bytes cannot be read.
        """
        slot = self._slots[parameter.megatron]
        return self._rows(parameter, 0, self._reader.shape(slot.key)[len(slot.sizes)])

    def _rows(self, parameter: MappedParameter, first: int, count: int) -> Tensor:
        slot = self._slots[parameter.megatron]
        _, *others = self._reader.shape(slot.key)[len(slot.sizes) :]
        offsets = (*slot.index, first, *(0 for _ in others))
        box = self._reader.read(slot.key, offsets, (*(1 for _ in slot.sizes), count, *others))
        return box.view(count, *others)

    def hf(self, parameter: MappedParameter) -> tuple[Tensor, ...]:
        """The Hugging Face tensors that a parameter holds, in the checkpoint's dtype."""
        if isinstance(parameter.layout, GateUpRows):  # stored apart, and mapped where they are read apart
            rows = parameter.hf_shapes[0][0]
            return tuple(self._rows(parameter, first, rows) for first in (0, rows))
        return merge(parameter.layout, [self.whole(parameter)])

    def dtype(self) -> torch.dtype:
        """The dtype that holds every tensor without loss."""
        wanted = (p for p in self.parameters if not p.is_float32)
        found = {self._reader.dtype(self._slots[p.megatron].key) for p in wanted}
        return found.pop() if len(found) == 1 else torch.float32

    def left_aside(self) -> dict[str, str]:
        """Entries of a run that are no weights, by their first word."""
        others = Counter(key.split(".")[0] for key in self._reader.entries if NOT_WEIGHTS.match(key))
        return {
            f"{word} ({count} entries)": "state of a run, or a predictor of further tokens"
            for word, count in others.items()
        }

    def read(self, name: str, size: tuple[int, ...]) -> Tensor:
        """See `models.weight_map.TensorReader`; tensors of one parameter should be asked for one after the other."""
        parameter = self._of_name[name]
        if self._latest[0] != parameter.megatron:
            self._latest = (parameter.megatron, self.hf(parameter))
        tensor = self._latest[1][parameter.hf.index(name)]
        if tuple(tensor.shape) != size:
            raise ModelFolderError(
                f"{self.folder}: {name} has shape {tuple(tensor.shape)}, expected {size} by the model's "
                "config.json; take the checkpoint's own"
            )
        return tensor


def _is_padded_otherwise(parameter: MappedParameter, found: tuple[int, ...]) -> bool:
    """Megatron pads the vocabulary by its own tensor size; only the rows of real tokens matter."""
    if not isinstance(parameter.layout, VocabRows):
        return False
    return (
        len(found) == 2 and found[0] >= parameter.layout.vocab_size and found[1] == parameter.hf_shapes[0][1]
    )


def has_scalar_head(reader: TorchDistReader) -> bool:
    """Whether the checkpoint is a reward model's or critic's: its head has one row."""
    return HEAD in reader.entries and reader.shape(HEAD)[0] == 1
