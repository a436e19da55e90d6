"""Files of a folder that came from elsewhere: what it names must lie in it."""

import stat
from pathlib import Path

from rto_megatron.errors import ModelFolderError


def regular_file(folder: Path, name: str) -> Path:
    """Where a file of the folder really lies: in the folder, or in the blobs of the cache whose snapshot it is.

    Hugging Face's cache holds <repository>/snapshots/<revision>/<name>, a link to <repository>/blobs/<hash>.

    Raises:
        ModelFolderError: it is no regular file, or leads elsewhere.
    """
    root = folder.resolve()
    try:
        real = (root / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ModelFolderError(
            f"{folder / name} leads nowhere ({error}); download the folder again"
        ) from error
    is_blob = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    if not (real.is_relative_to(root) or is_blob):
        raise ModelFolderError(
            f"{folder / name} is a link to {real}, outside the folder; put a copy of the file in its place"
        )
    if not stat.S_ISREG(real.stat().st_mode):
        raise ModelFolderError(f"{folder / name} is not a regular file; put the file itself in its place")
    return real
