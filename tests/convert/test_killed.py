"""A conversion leaves its whole result or nothing under the name it was asked for, whenever it ends."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import convert
from convert_faults import edit_hf
from tiny_families import write_family

from rto_megatron.convert.conversion import Bar, Proofs, convert_to_hf, convert_to_megatron
from rto_megatron.convert.conversion_options import Advance, Options
from rto_megatron.convert.megatron_source import open_megatron
from rto_megatron.errors import ModelFolderError, RecipeError

OPTIONS, PROOFS = Options(None, 100_000, None), Proofs(digest=True, logits=None)


def killing(stage: str, num_parameters: int) -> Bar:
    """A progress bar that ends the process, as `kill -9` does, after so many steps of a stage."""

    @contextmanager
    def bar(title: str, size: int) -> Iterator[Advance]:
        steps = 0

        def advance(nbytes: int) -> None:
            nonlocal steps
            steps += 1
            if (title, steps) == (stage, num_parameters):
                os.kill(os.getpid(), signal.SIGKILL)

        yield advance

    return bar


def run_and_die(work: Callable[[], object]) -> None:
    """Runs in a child process, which must be killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the child ended with status {os.waitstatus_to_exitcode(status)}"
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("moment", [("convert", 1), ("convert", 3), ("convert", 15), ("verify", 4)])
def test_killed_import_leaves_no_target_and_starts_again(
    models: Path, tmp_path: Path, moment: tuple[str, int]
) -> None:
    target, partial = tmp_path / "target", tmp_path / ".partial_target"
    run_and_die(
        lambda: convert_to_megatron(
            models / "llama", target, OPTIONS, PROOFS, killing(*moment), dry_run=False
        )
    )
    assert not target.exists()
    assert partial.is_dir()
    with pytest.raises(ModelFolderError):
        convert("verify", models / "llama", partial / "release" if moment[0] == "convert" else target)
    (partial / "left_over").write_text("of the first try")
    convert("hf-to-megatron", models / "llama", target)
    convert("verify", models / "llama", target)
    assert not partial.exists()
    assert not (target / "left_over").exists()


@pytest.mark.parametrize("moment", [("convert", 1), ("convert", 3), ("convert", 21), ("verify", 4)])
def test_killed_export_leaves_no_target_and_starts_again(
    models: Path, tmp_path: Path, moment: tuple[str, int]
) -> None:
    target, partial = tmp_path / "target", tmp_path / ".partial_target"
    source = open_megatron(models / "llama_megatron", None, None)
    run_and_die(lambda: convert_to_hf(source, target, OPTIONS, PROOFS, killing(*moment), dry_run=False))
    assert not target.exists()
    assert partial.is_dir()
    if moment[0] == "convert":
        with pytest.raises(ModelFolderError):
            convert("verify", partial, models / "llama_megatron")
    convert("megatron-to-hf", models / "llama_megatron", target)
    convert("verify", target, models / "llama_megatron")
    assert not partial.exists()


def test_refused_conversion_leaves_nothing(models: Path, tmp_path: Path) -> None:
    write_family(tmp_path / "llama", "llama", num_hidden_layers=1)
    edit_hf(tmp_path / "llama", lambda tensors: tensors.popitem())
    with pytest.raises(ModelFolderError, match="is missing"):
        convert("hf-to-megatron", tmp_path / "llama", tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def a_folder(target: Path) -> None:
    target.mkdir()
    (target / "precious").write_text("mine")


KINDS: dict[str, Callable[[Path], object]] = {
    "folder": a_folder,
    "empty folder": lambda target: target.mkdir(),
    "file": lambda target: target.write_text("mine"),
    "link to nothing": lambda target: target.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
def test_existing_target_is_refused_and_left_as_it_is(
    models: Path, tmp_path: Path, command: str, kind: str
) -> None:
    target = tmp_path / "target"
    KINDS[kind](target)
    before = [(path, path.lstat().st_mtime_ns) for path in (target, *tmp_path.rglob("*"))]
    with pytest.raises(
        RecipeError, match="target exists already and is never written over; name another one, or remove it"
    ):
        convert(command, models / ("llama" if command == "hf-to-megatron" else "llama_megatron"), target)
    assert [(path, path.lstat().st_mtime_ns) for path in (target, *tmp_path.rglob("*"))] == before


def test_target_that_appears_meanwhile_is_not_replaced(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"

    @contextmanager
    def bar(title: str, size: int) -> Iterator[Advance]:
        if title == "verify":
            a_folder(target)
        yield lambda nbytes: None

    with pytest.raises(RecipeError, match="target exists already"):
        convert_to_megatron(models / "llama", target, OPTIONS, PROOFS, bar, dry_run=False)
    assert [path.name for path in target.iterdir()] == ["precious"]


@pytest.mark.parametrize("where", ["file/target", "/proc/target", "x" * 300])
def test_place_that_cannot_be_written_is_a_user_error(models: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"cannot make .*name another target"):
        convert("hf-to-megatron", models / "llama", tmp_path / where)


def test_file_in_the_way_of_the_partial_folder_is_a_user_error(models: Path, tmp_path: Path) -> None:
    (tmp_path / ".partial_target").write_text("mine")
    with pytest.raises(RecipeError, match=r"cannot make \S*\.partial_target \(File exists\)"):
        convert("hf-to-megatron", models / "llama", tmp_path / "target")
    assert (tmp_path / ".partial_target").read_text() == "mine"


@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf"])
def test_dry_run_finds_faults_and_writes_nothing(models: Path, tmp_path: Path, command: str) -> None:
    source = models / ("llama" if command == "hf-to-megatron" else "llama_megatron")
    convert(command, source, tmp_path / "target", "--dry-run")
    assert list(tmp_path.iterdir()) == []


def test_names_are_printed_as_they_are(models: Path, tmp_path: Path) -> None:
    """A name with brackets is no markup of the terminal."""
    assert "[/red]target: written" in convert("hf-to-megatron", models / "llama", tmp_path / "[/red]target")
