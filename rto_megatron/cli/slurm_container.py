"""Images in which a job's steps run: through the pyxis plugin of srun, or as a command of Apptainer's in each task."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

# Each would keep the job's variables from the ranks: addresses, the attempt, SLURM_JOB_ID.
_HIDES_VARIABLES = ("APPTAINER_CLEANENV", "APPTAINER_CONTAINALL")


def pyxis_options(image: str, folders: Sequence[Path]) -> tuple[str, ...]:
    """Options of srun that run a step's tasks in `image`, which shows `folders` under their own paths."""
    mounts = ",".join(f"{folder}:{folder}" for folder in folders)
    return (
        f"--container-image={_absolute(image)}",
        f"--container-mounts={mounts}",
        "--no-container-mount-home",
    )


def pyxis_problems(folders: Sequence[Path]) -> list[str]:
    """Which folders pyxis cannot show: it splits its list at commas, colons and spaces, and knows no quotes."""
    return [
        f"--container: pyxis cannot show {folder}, as a comma, colon or space in a path ends it; rename the folder, or "
        "use --apptainer"
        for folder in folders
        if re.search(r"[,:\s]", str(folder))
    ]


def apptainer_command(image: str, folders: Sequence[Path], has_gpus: bool) -> tuple[str, ...]:
    """What stands before a command to run it in `image`, which shows `folders` under their own paths.

    --mount and not --bind, whose paths end at commas and colons: it reads fields as CSV does.
    """
    environment = [part for name in _HIDES_VARIABLES for part in ("-u", name)]
    mounts = [part for folder in folders for part in ("--mount", _mount(folder))]
    gpus = ["--nv"] if has_gpus else []
    return "env", *environment, "apptainer", "exec", *gpus, *mounts, _absolute(image)


def _mount(folder: Path) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(["type=bind", f"source={folder}", f"destination={folder}"])
    return line.getvalue()


def _absolute(image: str) -> str:
    """A file's path, which must not hang on the folder of a step; names of registries stay as they are."""
    path = Path(image)
    return str(path.absolute()) if path.exists() else image
