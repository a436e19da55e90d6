"""The files <run>/rollouts/*.parquet: written beside the loop, pruned, and read again."""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rto_megatron.config.run_folder import make_run_folder
from rto_megatron.errors import RunFolderError
from rto_megatron.reporting.rollout_table import StepRollouts

FOLDER = "rollouts"
_NAME = re.compile(r"step_(\d{8})_replica_(\d{5})\.parquet")


class RolloutFiles:
    """Writes the rollouts of one replica, a file a step, in a thread, and removes files of steps long past.

    Example:
        files = RolloutFiles(run_dir, replica=0, num_kept=20, tabulate=tabulate)
        files.write(kept)
        files.close()
    """

    def __init__(
        self, run_dir: Path, replica: int, num_kept: int, tabulate: Callable[[StepRollouts], pa.Table]
    ) -> None:
        """Takes how a step becomes a table as `tabulate`; it is called in the thread."""
        self._folder = run_dir / FOLDER
        self._replica = replica
        self._num_kept = num_kept
        self._tabulate = tabulate
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._writing: Future[None] | None = None
        make_run_folder(self._folder)

    def write(self, kept: StepRollouts) -> None:
        """Starts to write a step, once the one before is written.

        Raises:
            RunFolderError: the one before could not be written.
        """
        self._wait()
        self._writing = self._thread.submit(self._write, kept)

    def close(self) -> None:
        """Waits for the last step.

        Raises:
            RunFolderError: it could not be written.
        """
        self._wait()
        self._thread.shutdown()

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except OSError as error:
                raise RunFolderError(
                    f"{self._folder}: cannot write rollouts ({error}); make room, or set run.keep_rollouts=null"
                ) from error

    def _write(self, kept: StepRollouts) -> None:
        path = self._folder / f"step_{kept.step:08d}_replica_{self._replica:05d}.parquet"
        partial = path.with_suffix(".partial")
        pq.write_table(self._tabulate(kept), partial, compression="zstd")
        os.replace(partial, path)
        _remove(self._folder, lambda step: step <= kept.step - self._num_kept)


def forget_after(run_dir: Path, step: int) -> None:
    """Removes the rollouts of steps after `step`, which a resumed run takes again, perhaps on fewer replicas."""
    _remove(run_dir / FOLDER, lambda one: one > step)


def _remove(folder: Path, is_due: Callable[[int], bool]) -> None:
    for path in folder.glob("step_*"):
        found = re.match(r"step_(\d+)_", path.name)
        if found and is_due(int(found[1])):
            path.unlink(missing_ok=True)  # another replica may have been faster


def kept_steps(run_dir: Path) -> dict[int, list[Path]]:
    """Step -> its files, in the order of replicas; empty where none was kept."""
    steps: dict[int, list[Path]] = {}
    for path in sorted((run_dir / FOLDER).glob("step_*.parquet")):
        if found := _NAME.fullmatch(path.name):
            steps.setdefault(int(found[1]), []).append(path)
    return steps


def read_rollouts(run_dir: Path, steps: Sequence[int] = (), columns: Sequence[str] | None = None) -> pa.Table:
    """The rollouts of a run, by step and replica, in the order in which they were sampled.

    Args:
        steps: which; none: all that are kept.
        columns: which, None: all.

    Raises:
        RunFolderError: none were kept, or not those; a file cannot be read.
    """
    kept = kept_steps(run_dir)
    if not kept:
        raise RunFolderError(f"{run_dir} holds no {FOLDER}: {WHO_WRITES_THEM}")
    missing = [str(step) for step in steps if step not in kept]
    if missing:
        raise RunFolderError(
            f"{run_dir} keeps no rollouts of step {', '.join(missing)}; it keeps those of {_ranges(sorted(kept))}; "
            "run.keep_rollouts says of how many steps they are kept"
        )
    paths = [path for step in steps or sorted(kept) for path in kept[step]]
    return pa.concat_tables([_read(path, columns) for path in paths], promote_options="default")


WHO_WRITES_THEM = (
    "stages that sample write them while run.keep_rollouts is a number of steps (20 unless the recipe says otherwise; "
    "null: none)"
)


def _read(path: Path, columns: Sequence[str] | None) -> pa.Table:
    try:
        # Of this one file, not of a data set that its folder's name could make it part of.
        return pq.ParquetFile(path).read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise RunFolderError(f"{path} cannot be read ({error}); remove it") from error


def _ranges(steps: Sequence[int]) -> str:
    """ "1-4, 7" for 1, 2, 3, 4 and 7."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
