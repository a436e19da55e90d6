"""Checkpoints are written by the rank itself: one numbered patch of megatron-core 0.19.2, on GPUs too."""

import queue

from megatron.core.dist_checkpointing.strategies import filesystem_async

_results: queue.Queue = queue.Queue()


def _results_queue(mp_mode: str = "spawn") -> queue.Queue:
    return _results


def install() -> None:
    """W1: the results of a synchronous save pass through a queue of this process.

    Call site: prepare_write_data of dist_checkpointing/strategies/filesystem_async.py, which otherwise spawns
    a multiprocessing.Manager on each rank. That process runs the main program's imports again: 10 s for a
    save of 0.3 s, and it outlives a killed rank. The writer is the calling process in either case; only
    `async_sharded_save=True`, which this package does not use, needs a queue between processes.
    """
    filesystem_async.get_write_results_queue = _results_queue
