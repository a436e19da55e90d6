"""The folder of a run: prompts, responses, weights and the pool's token lie in it, so it is its owner's alone."""

import shlex
import stat
from pathlib import Path

_OF_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_run_folder(run_dir: Path) -> None:
    """Creates the folder with mode 0700; one that exists stays as it is, see `open_folder_warning`."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    run_dir.mkdir(mode=0o700, exist_ok=True)


def missing_folders(run_dir: Path) -> list[Path]:
    """The folder and those above it that `make_run_folder` would make, innermost first."""
    return [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]


def open_folder_warning(run_dir: Path) -> str | None:
    """What to say of a folder that other users can enter; None: nobody can, or there is no folder yet."""
    if not run_dir.is_dir() or not run_dir.stat().st_mode & _OF_OTHERS:
        return None
    mode = stat.S_IMODE(run_dir.stat().st_mode)
    return (
        f"warning: {run_dir} is open to other users of this machine (mode {mode:o}), with prompts, responses and "
        f"weights in it; run: chmod 700 {shlex.quote(str(run_dir))}"
    )
