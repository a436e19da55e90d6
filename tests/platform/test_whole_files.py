"""A file that is replaced is the old one or the new one."""

from pathlib import Path

import pytest

from rto_megatron.errors import RunFolderError
from rto_megatron.platform.whole_files import write_whole


def test_an_open_reader_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_whole(path, "old")
    with path.open() as reader:
        write_whole(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new" and [*path.parent.iterdir()] == [path]


def test_a_folder_in_its_place_and_a_file_above_it_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="folder is a folder; expected the name of a file to write"):
        write_whole(tmp_path / "folder", "new")
    for below in ("a.txt", "b/a.txt"):
        with pytest.raises(RunFolderError, match=rf"file/{below}: .*file is no folder"):
            write_whole(tmp_path / "file" / below, "new")
