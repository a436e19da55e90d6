import hashlib
import os
import shutil
from pathlib import Path

import pytest

from rto_megatron.data.tokenizer import encoding_fingerprint
from rto_megatron.data.tokenizer_files import carry, require_unchanged
from rto_megatron.errors import ModelFolderError, TokenizerError

CARRIED = {
    "tokenizer.model": b"\x00\xff\n",
    "tokenizer.model.v3": b"v3",
    "tokenizer.json": b"{}\r\n",
    "tokenizer_config.json": b'{"a": "\xc3\xa9"}',
    "special_tokens_map.json": b"",
    "added_tokens.json": b"{}",
    "vocab.json": b"{ }",
    "merges.txt": b"#version\n",
    "tekken.json": b"[]",
    "qwen.tiktoken": b"IQ== 0",
    "chat_template.jinja": b"{{ x }}",
    "chat_template.json": b"{}",
    "additional_chat_templates/rag.jinja": b"{{ z }}",
    "chat_templates/tool_use.jinja": b"{{ y }}",
    "generation_config.json": b"{}",
}
LEFT = (
    "config.json",
    "model.safetensors",
    "tokenization_x.py",
    "additional_chat_templates/x.py",
    "chat_templates/x.py",
    "chat_templates/tokenizer.json",
    "chat_templates/x.tiktoken",
    "other/tokenizer.json",
    "tokenizer.json.bak",
)


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write(tmp_path / "source", CARRIED | dict.fromkeys(LEFT, b"left"))
    return tmp_path / "source"


def listing(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_the_tokenizers_files_are_copied_byte_for_byte_and_no_others(source: Path, tmp_path: Path) -> None:
    digests = carry(source, tmp_path / "new" / "target")
    assert listing(tmp_path / "new" / "target") == CARRIED
    assert digests == {name: hashlib.sha256(content).hexdigest() for name, content in CARRIED.items()}
    require_unchanged(source, digests)
    require_unchanged(tmp_path / "new" / "target", digests)
    assert carry(source, tmp_path / "new" / "target") == digests


def test_a_real_tokenizer_survives(tokenizer_folder: Path, tmp_path: Path) -> None:
    assert set(carry(tokenizer_folder, tmp_path / "t")) == {
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert encoding_fingerprint(tmp_path / "t") == encoding_fingerprint(tokenizer_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("changed", r"merges.txt changed: its sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}"),
        ("missing", "merges.txt is missing"),
        ("extra", "vocab.txt was not there"),
        ("extra template", r"chat_templates/rag.jinja was not there"),
    ],
)
def test_a_difference_is_named(source: Path, tmp_path: Path, change: str, message: str) -> None:
    digests = carry(source, tmp_path / "target")
    target = tmp_path / "target"
    (target / "config.json").write_text("a file of the model, not of its tokenizer")
    require_unchanged(target, digests)
    if change == "changed":
        (target / "merges.txt").write_bytes(CARRIED["merges.txt"] + b"\n")
    elif change == "missing":
        (target / "merges.txt").unlink()
    else:
        write(target, {"vocab.txt" if change == "extra" else "chat_templates/rag.jinja": b"x"})
    with pytest.raises(TokenizerError, match=f"{message}; restore them") as caught:
        require_unchanged(target, digests)
    assert "tokenizer.model" not in str(caught.value)


@pytest.mark.parametrize("through", ["file", "folder", "relative"])
def test_a_link_that_leads_out_of_the_folder_is_refused(source: Path, tmp_path: Path, through: str) -> None:
    write(tmp_path / "outside", {"secret": b"s", "x.jinja": b"s"})
    if through == "folder":
        shutil.rmtree(source / "chat_templates")
        (source / "chat_templates").symlink_to(tmp_path / "outside")
        name = "chat_templates/x.jinja"
    else:
        name = "tokenizer.json"
        (source / name).unlink()
        (source / name).symlink_to(
            Path("../outside/secret") if through == "relative" else tmp_path / "outside" / "secret"
        )
    for call in (lambda: carry(source, tmp_path / "target"), lambda: require_unchanged(source, {})):
        with pytest.raises(ModelFolderError, match=rf"source/{name} is a link to .*, outside the folder"):
            call()
    assert not (tmp_path / "target").exists()


def test_a_link_inside_the_folder_is_followed(source: Path, tmp_path: Path) -> None:
    (source / "vocab.txt").symlink_to("other/tokenizer.json")
    carry(source, tmp_path / "target")
    assert (tmp_path / "target" / "vocab.txt").read_bytes() == b"left"
    assert not (tmp_path / "target" / "vocab.txt").is_symlink()


@pytest.mark.parametrize("is_linked", [False, True])
def test_the_layout_of_hugging_faces_cache_works(tmp_path: Path, is_linked: bool) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "0a1b"
    for number, (name, content) in enumerate(CARRIED.items()):
        write(repository / "blobs", {f"{number:040x}": content})
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (name.count("/") + 2)
        (snapshot / name).symlink_to(f"{up}blobs/{number:040x}")
    folder = snapshot
    if is_linked:
        folder = tmp_path / "model"
        folder.symlink_to(snapshot)
    digests = carry(folder, tmp_path / "target")
    assert listing(tmp_path / "target") == CARRIED
    assert not any(path.is_symlink() for path in (tmp_path / "target").rglob("*"))
    require_unchanged(folder, digests)


@pytest.mark.parametrize(
    "target",
    ["models--other/blobs/1", "models--org--name/refs/main", "models--org--name/blobs/deep/1", "blobs/1"],
)
def test_a_snapshot_may_link_to_its_own_blobs_only(tmp_path: Path, target: str) -> None:
    hub = tmp_path / "hub"
    write(hub, {target: b"x"})
    snapshot = hub / "models--org--name" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to(hub / target)
    with pytest.raises(ModelFolderError, match="outside the folder"):
        carry(snapshot, tmp_path / "target")


def test_what_is_no_file_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "tekken.json").unlink()
    (source / "tekken.json").mkdir()
    with pytest.raises(ModelFolderError, match=r"tekken.json is not a regular file"):
        carry(source, tmp_path / "target")
    (source / "tekken.json").rmdir()
    os.mkfifo(source / "tekken.json")
    with pytest.raises(ModelFolderError, match=r"tekken.json is not a regular file"):
        carry(source, tmp_path / "target")
    (source / "tekken.json").unlink()
    (source / "tekken.json").symlink_to("gone")
    with pytest.raises(ModelFolderError, match=r"tekken.json leads nowhere"):
        carry(source, tmp_path / "target")
    with pytest.raises(TokenizerError, match="does not exist"):
        carry(tmp_path / "nowhere", tmp_path / "target")


def test_neither_the_source_nor_what_a_target_links_to_is_overwritten(source: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="into itself"):
        carry(source, source / "other" / "..")
    assert (source / "tokenizer.json").read_bytes() == CARRIED["tokenizer.json"]
    write(tmp_path, {"precious": b"p"})
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "tokenizer.json").symlink_to(tmp_path / "precious")
    carry(source, tmp_path / "target")
    assert (tmp_path / "precious").read_bytes() == b"p"
    assert (tmp_path / "target" / "tokenizer.json").read_bytes() == CARRIED["tokenizer.json"]
