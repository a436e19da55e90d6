"""A file that grows by entries, and what a kill leaves of it."""

from pathlib import Path

import pytest

from rto_megatron.benchmarks.journal import Journal
from rto_megatron.errors import RunFolderError


def test_entries_come_back_and_a_line_that_a_kill_cut_is_gone_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path) as journal:
        assert journal.entries == ()
        journal.append({"key": "één\n", "n": 1})
    with path.open("a") as file:
        file.write('{"key": "cut by a kill, and longer than what comes after it')
    with Journal(path) as journal:
        assert journal.entries == ({"key": "één\n", "n": 1},)
        journal.append({"n": 2})
    assert path.read_text().endswith('\n{"n": 2}\n')
    with Journal(path) as journal:
        assert journal.entries == ({"key": "één\n", "n": 1}, {"n": 2})
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_line_before_the_last_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(RunFolderError, match=r"a\.jsonl:2 is no JSON object"), Journal(path):
        pass
