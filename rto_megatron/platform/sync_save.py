"""Checkpoints are written by the rank itself: one numbered patch of megatron-core 0.19.2, on GPUs too."""

import queue
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from rto_megatron.platform.patches import replace


def _results_queue(mp_mode: str = "spawn") -> queue.Queue[object]:
    return queue.Queue()


def install() -> None:
    """W1: the results of a save pass through a queue of this process, one for each save.

    Call site: prepare_write_data of dist_checkpointing/strategies/filesystem_async.py, which otherwise spawns
    a multiprocessing.Manager on each rank. That process runs the main program's imports again: 10 s for a
    save of 0.3 s, and it outlives a killed rank. Here a rank writes its files itself, in a thread if need be.
    """
    replace(filesystem_async, "get_write_results_queue", _results_queue)


class ShardWriter:
    """This rank's part of one torch_dist folder, planned; use `plan_shards`.

    Example:
        writer = ShardWriter(request)
        writer.copy()
    """

    def __init__(self, request: AsyncRequest) -> None:
        self._request = request
        self._planned: list[filesystem_async.WriteBucket] = (
            request.async_fn_args[1] if request.async_fn else []
        )
        self._copied: list[filesystem_async.WriteBucket] | None = None
        self._is_written = False

    @property
    def num_bytes(self) -> int:
        """The size of tensors and objects; file headers come on top."""
        return sum(
            sum(len(data.getbuffer()) for _, data in objects) + sum(tensor.nbytes for _, tensor in tensors)
            for _, _, (objects, tensors) in self._planned
        )

    @property
    def files(self) -> list[str]:
        """What `write` writes into the folder."""
        return [name for _, name, _ in self._planned]

    def copy(self) -> None:
        """Takes the numbers of this moment: what happens to the tensors before `write` does not reach the files."""
        # `.to("cpu")` of a tensor on the host is that tensor.
        live = {id(tensor) for _, _, (_, tensors) in self._planned for _, tensor in tensors}
        self._copied = [
            (path, name, (objects, [(i, t.clone() if id(t) in live else t) for i, t in tensors]))
            for path, name, (objects, tensors) in self._on_host()
        ]

    def write(self) -> None:
        """Writes and syncs the files, once; after an error they can be written again. No other rank takes part.

        Raises:
            OSError: what the disk said, which megatron's own writer turns into an AssertionError without it.
        """
        if not self._planned or self._is_written:
            return
        results = {}
        for number, bucket in enumerate(self._on_host() if self._copied is None else self._copied):
            _, results[number] = filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                self._request.async_fn.args[0], number, bucket, None, None, use_fsync=True
            )
            if isinstance(results[number], Exception):
                raise _of_the_disk(results[number])
        self._request.async_fn_args[2].put(results)
        self._copied, self._is_written = None, True

    def finish(self) -> None:
        """Writes `.metadata` and metadata.json when all ranks have written; all ranks must call it."""
        for finalize in self._request.finalize_fns:
            finalize()

    def _on_host(self) -> list[filesystem_async.WriteBucket]:
        return self._request.preload_fn() if self._planned else []


def _of_the_disk(error: BaseException) -> BaseException:
    """torch.save, which cannot close its archive any more, covers what the disk said with an error of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error


def plan_shards(shards: ShardedStateDict, folder: Path) -> ShardWriter:
    """Agrees on who writes what into an existing, empty folder; all ranks must call it, nothing is written."""
    request = dist_checkpointing.save(
        shards, str(folder), TorchDistSaveShardedStrategy(), async_sharded_save=True, async_strategy="mcore"
    )
    return ShardWriter(request)
