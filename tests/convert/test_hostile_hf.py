"""Hugging Face folders from strangers: nothing outside is read, nothing is run, and no damage is a traceback."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import convert
from convert_faults import (
    Touch,
    edit_hf,
    edit_index,
    require_refused,
    split_hf,
    write_index,
    write_safetensors,
)
from safetensors.torch import load_file
from tiny_families import write_family

from rto_megatron.errors import UserError
from rto_megatron.storage.hf_folder import HfFolder
from rto_megatron.storage.weight_files import INDEX, SINGLE

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def hf(copy: Callable[[str], Path]) -> Path:
    """A copy of the Hugging Face folder."""
    return copy("llama")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_never_opened(hf: Path, name: str) -> None:
    (hf / SINGLE).unlink()
    torch.save({Q: Touch(hf / "touched", os.system)}, hf / name)
    require_refused("hf-to-megatron", hf, rf"found \['{name}'\], which are pickles and never read here")
    write_index(hf, {Q: name})
    require_refused("hf-to-megatron", hf, rf"{name} is missing or damaged \(SafetensorError")
    assert not (hf / "touched").exists()


@pytest.mark.parametrize(
    "where", ["/{}/elsewhere.safetensors", "../elsewhere.safetensors", "x/../../elsewhere"]
)
def test_index_that_names_a_file_outside_is_refused(hf: Path, where: str) -> None:
    split_hf(hf, Q)
    shutil.copy(hf / "b.safetensors", hf.parent / "elsewhere.safetensors")
    edit_index(hf, Q, where.format(hf.parent))
    require_refused("hf-to-megatron", hf, r"index\.json names files outside its folder: \['.*elsewhere")


@pytest.mark.parametrize("name", [SINGLE, "b.safetensors", INDEX])
def test_link_to_a_file_outside_is_refused(hf: Path, name: str) -> None:
    if name != SINGLE:
        split_hf(hf, Q)
    (hf / name).rename(hf.parent / "elsewhere")
    (hf / name).symlink_to("../elsewhere")
    require_refused("hf-to-megatron", hf, rf"llama/{name} is a link to \S*elsewhere, outside the folder")


def test_pipe_in_place_of_a_file_is_refused_and_not_waited_for(hf: Path) -> None:
    split_hf(hf, Q)
    (hf / "b.safetensors").unlink()
    os.mkfifo(hf / "b.safetensors")
    require_refused("hf-to-megatron", hf, r"b\.safetensors is not a regular file")


def test_snapshot_of_hugging_faces_cache_converts(models: Path, hf: Path) -> None:
    split_hf(hf, Q)
    repository = hf.parent / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(hf.iterdir())):
        file.rename(repository / "blobs" / f"blob{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{number}")
    convert("hf-to-megatron", snapshot, hf.parent / "target")
    convert("verify", models / "llama", hf.parent / "target")
    assert not any(path.is_symlink() for path in (hf.parent / "target").rglob("*"))


VALUES = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS: dict[str, tuple[object, bytes, int | None]] = {
    "longer than the file": ({"a": VALUES}, bytes(8), 1000),
    "of 2^60 bytes": ({"a": VALUES}, bytes(8), 2**60),
    "of 2^64 - 1 bytes": ({"a": VALUES}, bytes(8), 2**64 - 1),
    "of 200 MB": ({"a": VALUES}, bytes(8), 200_000_000),
    "cut in the middle": ({"a": VALUES}, bytes(8), 20),
    "of no bytes": ({}, b"", 0),
    "that is a list": ([VALUES], bytes(8), None),
    "with tensors over one another": ({"a": VALUES, "b": {**VALUES, "data_offsets": [4, 12]}}, bytes(12), None),
    "with a hole": ({"a": VALUES, "b": {**VALUES, "data_offsets": [12, 20]}}, bytes(20), None),
    "past the end": ({"a": VALUES, "b": {**VALUES, "data_offsets": [8, 16]}}, bytes(8), None),
    "with offsets that do not fit the shape": ({"a": {**VALUES, "shape": [3]}}, bytes(8), None),
    "with a shape that overflows": ({"a": {**VALUES, "shape": [2**40, 2**40]}}, bytes(8), None),
    "with negative offsets": ({"a": {**VALUES, "data_offsets": [-8, 0]}}, bytes(8), None),
    "with offsets turned round": ({"a": {**VALUES, "data_offsets": [8, 0]}}, bytes(8), None),
    "with words for numbers": ({"a": {**VALUES, "data_offsets": "x"}}, bytes(8), None),
    "with an unknown dtype": ({"a": {**VALUES, "dtype": "PICKLE"}}, bytes(8), None),
    "with bytes after the last tensor": ({"a": VALUES}, bytes(9), None),
}  # fmt: skip


@pytest.mark.parametrize("fault", HEADERS)
def test_header_that_lies_is_refused(hf: Path, fault: str) -> None:
    write_safetensors(hf / SINGLE, *HEADERS[fault])
    require_refused("hf-to-megatron", hf, rf"{SINGLE} is missing or damaged \(SafetensorError")


def test_header_of_200_mb_is_refused_though_the_file_is_that_long(hf: Path) -> None:
    write_safetensors(hf / SINGLE, {"a": VALUES}, b"", 200_000_000)
    os.truncate(hf / SINGLE, 300_000_000)  # sparse
    require_refused("hf-to-megatron", hf, rf"{SINGLE} is missing or damaged .*[Tt]oo ?[Ll]arge")


@pytest.mark.parametrize("at", range(0, 400, 7))
def test_damaged_header_is_a_user_error(hf: Path, at: int) -> None:
    content = bytearray((hf / SINGLE).read_bytes())
    for value in (content[at] ^ 1, 0, 255):
        content[at] = value
        (hf / SINGLE).write_bytes(content)
        try:
            HfFolder(hf).close()
        except UserError as error:
            assert SINGLE in str(error)  # some changes leave a valid header


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"weight_map": 3}', b"\xff\xfe{}", b'{"weight_map": {"a": 1}}']
)
@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_damaged_json_is_a_user_error(hf: Path, name: str, content: bytes) -> None:
    if name == INDEX:  # which is read only where there is no single file
        split_hf(hf, Q)
    (hf / name).write_bytes(content)
    require_refused("hf-to-megatron", hf, str(hf))


def test_head_with_a_bias_of_many_numbers_is_refused(tmp_path: Path) -> None:
    write_family(tmp_path / "reward", "llama", is_scalar=True, num_hidden_layers=1)
    edit_hf(tmp_path / "reward", lambda t: t.update({"score.bias": torch.ones(3)}))
    require_refused("hf-to-megatron", tmp_path / "reward", r"score\.bias has shape \(3,\)")


def test_code_that_a_model_brings_is_neither_run_nor_carried(hf: Path) -> None:
    code = f"open({str(hf / 'touched')!r}, 'w')\nclass Model: pass\nclass Config: pass\n"
    (hf / "modeling_evil.py").write_text(code)
    config = json.loads((hf / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (hf / "config.json").write_text(json.dumps(config))
    target, back = hf.parent / "target", hf.parent / "back"
    convert("hf-to-megatron", hf, target)
    convert("megatron-to-hf", target, back)
    for folder in (target / "hf", back):
        assert "auto_map" not in json.loads((folder / "config.json").read_text())
        assert not list(folder.rglob("*.py"))
    convert("verify", hf, target)
    assert not (hf / "touched").exists()


def test_tensors_of_the_source_are_not_written_to(models: Path, hf: Path) -> None:
    before = (hf / SINGLE).read_bytes()
    convert("hf-to-megatron", hf, hf.parent / "target", "--dtype", "bf16")
    assert (hf / SINGLE).read_bytes() == before
    assert load_file(hf / SINGLE).keys() == load_file(models / "llama" / SINGLE).keys()
