"""Traces of chosen steps by torch's profiler in <run>/profile, one for each rank, for Perfetto or chrome://tracing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from rto_megatron.config.run_folder import make_run_folder

FOLDER = "profile"


@contextmanager
def traced(step: int, steps: Sequence[int], run_dir: Path, rank: int) -> Iterator[None]:
    """Traces the block if `step`, counted from 1, is one of `steps`; a step that fails leaves no trace."""
    if step not in steps:
        yield
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as trace:
        yield
    make_run_folder(run_dir / FOLDER)
    trace.export_chrome_trace(str(run_dir / FOLDER / f"step_{step:08d}_rank_{rank:05d}.json.gz"))
