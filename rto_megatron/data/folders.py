"""Files of a folder that came from elsewhere: what it names must lie in it."""

from pathlib import Path

from rto_megatron.errors import UserError


def regular_file(folder: Path, name: str) -> Path:
    """The path of `folder`/`name`, a file of this folder.

    Links inside the folder are followed, and those of Hugging Face's cache, where snapshots/<revision>/<file> points
    to blobs/<hash> of the same model.

    Raises:
        UserError: the name or the link leads elsewhere.
    """
    path = folder / name
    if Path(name).name != name:
        raise UserError(f"{folder}: {name} is not a plain file name; expected a file of the folder itself")
    target, home = path.resolve(), folder.resolve()
    homes = {home, home.parent.parent / "blobs"} if home.parent.name == "snapshots" else {home}
    if target.parent not in homes:
        raise UserError(f"{path} is a link to {target}, outside its folder; replace it by the file itself")
    return path
