"""Files that are replaced as a whole."""

from pathlib import Path

from rto_megatron.errors import RunFolderError


def write_whole(path: Path, text: str) -> None:
    """Writes a file that a reader sees as it was or as it will be, and never in between; makes the folders above it.

    Raises:
        RunFolderError: a folder stands in its place, or a file in that of a folder above it.
    """
    if path.is_dir():
        raise RunFolderError(f"{path} is a folder; expected the name of a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        taken = next(one for one in path.parents if one.exists())
        raise RunFolderError(f"{path}: {taken} is no folder; name another file") from error
    partial = path.with_name(f".partial_{path.name}")
    partial.write_text(text, encoding="utf-8", errors="surrogatepass")
    partial.replace(path)
