"""Refuses to compute with what waits in host memory."""

from collections.abc import Iterable

from torch import Tensor


class ParkedError(RuntimeError):
    """Memory that was given away is used: a phase was entered that does without it, which is a bug of this program."""


def require_present(tensors: Iterable[Tensor], whose: str) -> None:
    """Raises ParkedError where the memory of a tensor is empty; what a kernel would read there, nobody knows.

    Args:
        whose: for the message.
    """
    if any(tensor.numel() and not tensor.untyped_storage().nbytes() for tensor in tensors):
        raise ParkedError(
            f"{whose} wait in host memory (offload), and are used; enter the phase that needs them first"
        )
