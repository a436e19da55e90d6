"""Writes a Megatron checkpoint from Hugging Face tensors, one parameter at a time."""

from collections.abc import Sequence

from torch import Tensor

from rto_megatron.models.shape import ModelShape
from rto_megatron.models.weight_map import GateUpRows, MappedParameter, VocabRows
from rto_megatron.storage.megatron_names import extra_state, slots, stored_shape
from rto_megatron.storage.torch_dist_writer import TorchDistWriter


class MegatronWriter:
    """Puts parameters where Megatron-LM with TransformerEngine looks for them.

    Example:
        MegatronWriter(writer, shape).write(parameter, tensors)
    """

    def __init__(self, writer: TorchDistWriter, shape: ModelShape) -> None:
        self._writer, self._shape = writer, shape

    def write(self, parameter: MappedParameter, tensors: Sequence[Tensor]) -> None:
        """Writes one parameter and the extra state of its layer.

        Args:
            tensors: those of `parameter.hf`, in its order.
        """
        slot, whole = slots(parameter, self._shape)[0], stored_shape(parameter)
        for row, piece in _pieces(parameter, tensors):
            offsets = (*slot.index, row, *(0 for _ in whole[1:]))
            chunk = piece.contiguous().view(*(1 for _ in slot.sizes), *piece.shape)
            self._writer.tensor(slot.key, (*slot.sizes, *whole), offsets, chunk)
        state = extra_state(parameter, self._shape)
        if state is not None:
            # What a linear layer without low-precision state keeps there.
            self._writer.bytes_object(state, [None])


def _pieces(parameter: MappedParameter, tensors: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """(first row, rows) of the stored parameter; gate and up go as they are, which Megatron does as well."""
    if isinstance(parameter.layout, GateUpRows):
        return [(0, tensors[0]), (tensors[0].shape[0], tensors[1])]
    if isinstance(parameter.layout, VocabRows):
        rows, padding = tensors[0], stored_shape(parameter)[0] - tensors[0].shape[0]
        zeros = rows.new_zeros(padding, *rows.shape[1:])
        return [(0, rows), (rows.shape[0], zeros)] if padding else [(0, rows)]
    return [(0, parameter.layout.shard(tensors, 0, 1))]
