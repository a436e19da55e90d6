"""Whether somebody else could have written a checkpoint: its manifest proves files whole, not where they came from."""

import os
import stat
from pathlib import Path

_OVERFLOW_UID = Path("/proc/sys/kernel/overflowuid")


def ownership_problem(folder: Path) -> str | None:
    """What is open to others in a folder or below it, or theirs; None: nothing.

    Owners are this user and root; for root also the user that a network file system makes of root.

    Raises:
        OSError: the folder cannot be read.
    """
    trusted = _trusted_owners()
    for path in [folder, *sorted(folder.rglob("*"))]:
        found = path.lstat()
        if found.st_uid not in trusted:
            return (
                f"{path} belongs to user {found.st_uid}, and this is user {os.geteuid()}: whoever writes a checkpoint "
                f"decides what the run trains on. If you trust it, make a copy of your own: cp -r {folder} ..."
            )
        if found.st_mode & stat.S_IWOTH and not stat.S_ISLNK(found.st_mode):
            return (
                f"{path} can be written by every user of this machine (mode {stat.S_IMODE(found.st_mode):o}). If "
                f"nobody changed it, close it: chmod -R o-w {folder}"
            )
    return None


def close_to_others(path: Path) -> None:
    """Takes the right to write from all but owner and group, whatever the umask was."""
    path.chmod(stat.S_IMODE(path.stat().st_mode) & ~stat.S_IWOTH)


def _trusted_owners() -> set[int]:
    if os.geteuid() == 0:
        return {0, int(_OVERFLOW_UID.read_text())}
    return {0, os.geteuid()}
