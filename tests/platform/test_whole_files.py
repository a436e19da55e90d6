"""A file that is replaced is the old one or the new one."""

from pathlib import Path

from rto_megatron.platform.whole_files import write_whole


def test_an_open_reader_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_whole(path, "old")
    with path.open() as reader:
        write_whole(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new" and [*path.parent.iterdir()] == [path]
