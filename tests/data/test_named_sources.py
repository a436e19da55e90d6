"""Files, folders, patterns, tables and names of the hub: what a source stands for."""

import gzip
import json
from pathlib import Path

import pytest
from data.written_rows import write_lines

from rto_megatron.config.source_names import HubSet, hub_set
from rto_megatron.data.row import BadRow
from rto_megatron.data.sources import local_files, read_rows, scan_rows
from rto_megatron.errors import DataError


def numbered(folder: Path, *names: str) -> None:
    """Files of one row each, whose number is the place of the name."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        write_lines(folder / name, [{"text": str(number)}])


def texts(source: Path | str) -> list[object]:
    return [row.columns["text"] for row in read_rows(str(source))]


def test_a_folder_and_a_pattern_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    numbered(tmp_path / "set", "b.jsonl", "a.jsonl", "c.jsonl")
    (tmp_path / "set" / "README.md").write_text("no rows")
    (tmp_path / "set" / ".d.jsonl").write_text("left behind by an editor")
    assert texts(tmp_path / "set") == ["1", "0", "2"]
    assert texts(tmp_path / "set" / "[ab].jsonl") == ["1", "0"]
    assert texts(tmp_path / "**" / "*.jsonl") == ["1", "0", "2"]


def test_an_existing_name_wins_over_a_pattern_and_over_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered(tmp_path, "a.jsonl", "[a].jsonl", "b*.jsonl", "bc.jsonl")
    numbered(tmp_path / "owner", "name:split.jsonl")
    (tmp_path / "owner" / "name:train").mkdir()
    numbered(tmp_path / "owner" / "name:train", "x.jsonl", "y.jsonl")
    monkeypatch.chdir(tmp_path)
    assert texts("[a].jsonl") == ["1"]
    assert texts("b*.jsonl") == ["2"]
    assert texts("owner/name:train") == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("owner/name:train", HubSet("owner/name", None, "train")),
        ("owner/name:main:test", HubSet("owner/name", "main", "test")),
        ("name:wikitext-2-raw-v1:train", HubSet("name", "wikitext-2-raw-v1", "train")),
        ("owner/name:train[:10%]", HubSet("owner/name", None, "train[:10%]")),
        ("owner/name:main:train[100:200]+test", HubSet("owner/name", "main", "train[100:200]+test")),
        ("rows.jsonl:train", None),
        ("data/*.jsonl", None),
        ("rows.jsonl", None),
        ("owner/name", None),
    ],
)
def test_names_of_the_hub(name: str, meant: HubSet | None) -> None:
    assert hub_set(name) == meant


def test_a_config_and_a_slice_of_a_data_set_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "owner" / "name"
    for config in ("first", "second"):
        folder.joinpath(config).mkdir(parents=True)
        rows = [{"text": f"{config} {number}"} for number in range(10)]
        write_lines(folder / config / "train.jsonl", rows)
    files = {config: f"{config}/train.jsonl" for config in ("first", "second")}
    card = "".join(
        f"- config_name: {name}\n  data_files: [{{split: train, path: {path}}}]\n"
        for name, path in files.items()
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # load_dataset takes the folder of that name
    assert texts("owner/name:second:train[2:4]") == ["second 2", "second 3"]
    with pytest.raises(DataError, match="config 'third', split 'train', could not be loaded"):
        list(scan_rows("owner/name:third:train"))


def test_a_data_set_that_the_library_cannot_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted, unlike = tmp_path / "owner" / "scripted", tmp_path / "owner" / "unlike"
    for folder in (scripted, unlike):
        folder.mkdir(parents=True)
    (scripted / "scripted.py").write_text("")
    write_lines(unlike / "train-0.jsonl", [{"a": [1]}])
    write_lines(unlike / "train-1.jsonl", [{"a": "x"}])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # load_dataset takes the folder of that name
    with pytest.raises(DataError, match=r"'owner/scripted', .*Dataset scripts are no longer supported"):
        list(scan_rows("owner/scripted:train"))
    with pytest.raises(DataError, match=r"'owner/unlike', .*(array|list)"):
        list(scan_rows("owner/unlike:train"))


REFUSED = {
    "nothing matches": ("none*.jsonl", "no data file matches"),
    "a folder without files": ("empty", "holds no file ending in"),
    "a folder of folders": ("outer", "outer/inner has some"),
    "a folder of splits": (
        "splits",
        r"files of several parts of a set \(test, train\): test.jsonl, train-0.jsonl",
    ),
    "another ending": ("notes.txt", "has no ending of a data file"),
    "a pattern with another ending": ("note*", "has no ending of a data file"),
    "no such file": ("gone.jsonl", "does not exist"),
    "no name at all": ("gone", "is neither a file ending in"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_source_that_is_none_is_named(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    numbered(tmp_path / "outer" / "inner", "a.jsonl")
    numbered(tmp_path / "splits", "train-0.jsonl", "test.jsonl")
    (tmp_path / "notes.txt").write_text("a\n")
    monkeypatch.chdir(tmp_path)
    name, message = REFUSED[case]
    with pytest.raises(DataError, match=message):
        list(scan_rows(name))


def test_what_save_to_disk_wrote_is_named(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict(train=Dataset.from_list([{"text": "a"}])).save_to_disk(tmp_path / "saved")
    for folder in (tmp_path / "saved", tmp_path / "saved" / "train"):
        with pytest.raises(DataError, match=f"{folder} is what save_to_disk of datasets writes.*to_parquet"):
            list(scan_rows(str(folder)))


def test_files_of_one_split_are_one_set(tmp_path: Path) -> None:
    numbered(tmp_path, "train-1.jsonl", "train-0.jsonl")
    assert local_files(str(tmp_path)) == [tmp_path / "train-0.jsonl", tmp_path / "train-1.jsonl"]


TABLE = (
    "prompt,completion,label,margin,messages,system\n"
    '"say ""a"", twice\nplease",b,True,1.5,,\n'
    'c,"[1, 2]",false,,"[{""role"": ""user"", ""content"": ""c""}]",s\n'
)


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
def test_cells_of_a_table_have_the_types_of_their_columns(name: str, tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + TABLE.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    first, second = read_rows(str(tmp_path / name))
    assert first.where == f"{tmp_path / name} row 1"
    assert first.columns == {
        "prompt": 'say "a", twice\nplease', "completion": "b", "label": True, "margin": 1.5,
    }  # fmt: skip
    turns = [{"role": "user", "content": "c"}]
    assert second.columns == {
        "prompt": "c", "completion": "[1, 2]", "label": False, "messages": turns, "system": "s",
    }  # fmt: skip


def test_rows_of_a_table_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n1,2,3\n\n\"[{'role': 'user'}]\",2\n")
    whole, long, printed = scan_rows(str(path))
    assert not isinstance(whole, BadRow)
    assert isinstance(long, BadRow) and "has 3 cells, and the first line names 2" in long.problem
    assert isinstance(printed, BadRow) and "a list as Python prints it" in printed.problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,a\n1,2\n", "expected the name of every column"),
        (b"a,\n1,2\n", "expected the name of every column"),
        (b",a,b\n0,1,2\n", r"its first column has no name, as the index that pandas writes; .*index=False"),
        (b'a,b\n1,"2\n', "what follows row 0 is no comma-separated table"),
        (b"a,b\n1,\xff\n", "not UTF-8"),
        (json.dumps({"a": 1}).encode(), "is JSON objects, one a line; rename it to .jsonl"),
    ],
)
def test_a_table_that_is_none_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(scan_rows(str(tmp_path / "rows.csv")))
