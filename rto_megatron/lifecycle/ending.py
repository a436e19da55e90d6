"""Why a rank ended, in the words of `status.py`: written into the run folder before the process is gone."""

import errno
import os
import re
import traceback
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

import rto_megatron
from rto_megatron.errors import MachineError, UserError
from rto_megatron.lifecycle.stacks import keep_all_stacks, kept_stacks
from rto_megatron.lifecycle.status import (
    STACKS,
    ExitReason,
    Status,
    attempt_number,
    clear_status,
    note_status,
)
from rto_megatron.lifecycle.stopping import forget_old_request, signals_ask_to_stop
from rto_megatron.reporting.metrics import read_metrics

_PACKAGE = Path(rto_megatron.__file__).parent
# What gloo and NCCL say; torch raises plain RuntimeErrors for most of it.
_TIMED_OUT = ("timed out", "timeout")
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "remote process",
)
_NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")
MEMORY_KNOBS = (
    "lower batch.micro or batch.tokens, data.max_length, data.max_prompt_tokens or sampling.max_response_tokens, set "
    "precision.recompute or parallel.distributed_optimizer to true, or raise parallel.tensor; `rto check` counts bytes"
)


class LostRank(MachineError):  # noqa: N818  (a state of the run, told like a user's error)
    """Another rank is gone."""

    reason = "INFRA_LOST_RANK"


class Hang(MachineError):  # noqa: N818
    """A collective ran out of time."""

    reason = "HANG"


class OutOfMemory(MachineError):  # noqa: N818
    """The GPU or the host has no memory left."""

    reason = "OOM"


class NoSpace(MachineError):  # noqa: N818
    """A disk is full."""

    reason = "DISK"


class RankEnding:
    """Stands around a whole stage on one rank: answers signals, keeps stacks and writes why the rank ended.

    It turns an error that another rank's end, full memory, a full disk or a time limit caused into a UserError. A bug
    stays the error that it is.

    Example:
        with RankEnding(run_dir): run_stage(config)
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._rank = int(os.environ.get("RANK", "0"))
        self._attempt = attempt_number()
        self._signals = signals_ask_to_stop(run_dir)
        self._stacks = kept_stacks(run_dir, self._rank, self._attempt)

    def __enter__(self) -> Self:
        if self._rank == 0:
            clear_status(self._run_dir)
            forget_old_request(self._run_dir)
        self._signals.__enter__()
        self._stacks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        step = finished_steps(self._run_dir)
        named = None
        if error is None:
            if self._rank == 0:
                note_status(self._run_dir, Status(ExitReason.DONE, step, "", self._attempt))
        else:
            named = self._named(error)
            self._note(named or error, error, step)
        self._stacks.__exit__(None, None, None)
        self._signals.__exit__(None, None, None)
        if named is not None and named is not error:
            raise named from None

    def _named(self, error: BaseException) -> UserError | None:
        if isinstance(error, UserError):
            return error
        said = str(error).lower()
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or _says(error, said, _NO_MEMORY):
            return OutOfMemory(f"rank {self._rank} is out of memory ({error}); {MEMORY_KNOBS}")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return NoSpace(f"no space left ({error}); make room or name another run.dir, then start again")
        if _says(error, said, _TIMED_OUT):
            silent = keep_all_stacks(self._run_dir, self._rank, self._attempt, error)
            return Hang(
                f"rank {self._rank} waited longer than run.collective_timeout_s for the others ({_line(error)}); "
                + "; ".join([*silent, f"the stacks of all ranks are in {self._run_dir / STACKS}"])
            )
        if _says(error, said, _LOST):
            return LostRank(f"rank {self._rank} lost the connection to another rank ({_line(error)})")
        return None

    def _note(self, told: BaseException, error: BaseException, step: int) -> None:
        if isinstance(told, UserError):
            reason = ExitReason(told.reason)
        else:
            is_interrupt = isinstance(told, KeyboardInterrupt)
            reason = ExitReason.INTERRUPTED if is_interrupt else ExitReason.BUG
        where = site(error)
        text = str(told) if isinstance(told, UserError) else f"{type(error).__name__}: {error}"
        fingerprint = f"{type(error).__name__} in {where} after step {step}"
        note_status(self._run_dir, Status(reason, step, text, self._attempt, fingerprint))


def _says(error: BaseException, said: str, words: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(word in said for word in words)


def _line(error: BaseException) -> str:
    """What the transport says, without the place in its source and its advice."""
    return re.sub(r"^\[\S+:\d+\] ", "", str(error).splitlines()[0]).split(". ")[0]


def site(error: BaseException) -> str:
    """The innermost place of this package on the way of an error, as in trainer/run.py:_save."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_PACKAGE)
    ]
    return (
        f"{Path(frames[-1].filename).relative_to(_PACKAGE)}:{frames[-1].name}"
        if frames
        else "no place of ours"
    )


def finished_steps(run_dir: Path) -> int:
    """Steps that the run has logged, those after its last checkpoint included."""
    entries = read_metrics(run_dir)
    return int(entries[-1]["step"]) if entries else 0
