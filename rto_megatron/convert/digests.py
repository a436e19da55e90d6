"""sha256 of tensors by name, in a thread beside the comparing."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Semaphore
from types import TracebackType

import torch
from torch import Tensor

_WAITING = 2  # bounds the tensors that are kept alive for the thread


def tensor_digest(tensor: Tensor) -> str:
    """Hex sha256 over dtype, shape and bytes: a transposed tensor has another digest even where it is all zeros."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Digests:
    """Collects digests; the tensors must not change until the thread has read them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="digests")
        self._room = Semaphore(_WAITING)
        self._of_name: dict[str, Future[str]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Has a tensor hashed; waits while too many are waiting."""
        self._room.acquire()
        future = self._thread.submit(tensor_digest, tensor)
        future.add_done_callback(lambda _: self._room.release())
        self._of_name[name] = future

    def by_name(self) -> dict[str, str]:
        """All digests."""
        return {name: future.result() for name, future in self._of_name.items()}

    def __enter__(self) -> "Digests":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
