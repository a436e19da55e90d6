"""Megatron checkpoints from strangers: nothing outside is read, nothing is run, and no damage is a traceback."""

import builtins
import mmap
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert_faults import (
    Touch,
    edit_metadata,
    place_of,
    read_metadata,
    repacked,
    replace_saved,
    require_refused,
    saved,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from rto_megatron.errors import ModelFolderError, UserError
from rto_megatron.platform.safe_metadata import UNREADABLE
from rto_megatron.storage.mapped_tensor import mapped_tensor
from rto_megatron.storage.megatron_common import read_args
from rto_megatron.storage.torch_dist_reader import TorchDistReader

ROOT = Path(__file__).parents[2]
FC2 = "decoder.layers.mlp.linear_fc2.weight"
COMMON = "common_state/shard_0_1"
SIZE = (1, 64, 96)  # of a chunk of FC2


@pytest.fixture
def megatron(copy: Callable[[str], Path]) -> Path:
    """A copy of the Megatron checkpoint."""
    return copy("llama_megatron")


# --- .metadata -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "name"), [(os.system, r"posix\.system"), (builtins.eval, r"(__builtin__|builtins)\.eval")]
)
def test_metadata_that_would_run_something_is_refused_and_not_run(
    megatron: Path, by: Callable[[str], object], name: str
) -> None:
    metadata = read_metadata(megatron / "release")
    metadata.planner_data = Touch(megatron / "touched", by)
    (megatron / "release" / ".metadata").write_bytes(pickle.dumps(metadata))
    require_refused("megatron-to-hf", megatron, rf"\.metadata names {name}, .*nothing of it was run")
    assert not (megatron / "touched").exists()


@pytest.mark.parametrize(
    "where", ["../../elsewhere.distcp", "{}/elsewhere.distcp", "release/../../elsewhere.distcp"]
)
def test_metadata_that_names_a_file_outside_is_refused(megatron: Path, where: str) -> None:
    weights = megatron / "release"
    shutil.copy(weights / "__0_0.distcp", megatron.parent / "elsewhere.distcp")

    def change(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = where.format(megatron.parent)

    edit_metadata(weights, change)
    require_refused(
        "megatron-to-hf", megatron, r"\.metadata names \S*elsewhere.distcp, which is not a plain file"
    )


def test_link_in_place_of_data_is_refused(megatron: Path) -> None:
    file = megatron / "release" / "__0_0.distcp"
    file.rename(megatron.parent / "elsewhere.distcp")
    file.symlink_to("../../elsewhere.distcp")
    require_refused(
        "megatron-to-hf", megatron, r"names __0_0\.distcp, which is not a plain file of the folder"
    )


def test_metadata_with_any_byte_damaged_is_a_user_error_or_read(megatron: Path) -> None:
    weights = megatron / "release"
    whole = (weights / ".metadata").read_bytes()
    num_refused = 0
    for at in range(0, len(whole), 23):
        for content in (whole[:at], whole[:at] + bytes([whole[at] ^ (1 + at % 255)]) + whole[at + 1 :]):
            (weights / ".metadata").write_bytes(content)
            try:
                reader = TorchDistReader(weights)
                [reader.shape(key) for key in reader.entries]
            except UserError as error:
                assert str(weights) in str(error)  # some changes only rename an entry
                num_refused += 1
    assert num_refused > len(whole) / 23


def test_metadata_with_wrong_contents_is_a_user_error(megatron: Path) -> None:
    weights = megatron / "release"

    def refused(change: Callable[[Metadata], object]) -> None:
        whole = (weights / ".metadata").read_bytes()
        edit_metadata(weights, lambda metadata: change(metadata) and None)
        with pytest.raises(ModelFolderError, match=r"release.*damaged"):
            TorchDistReader(weights)
        (weights / ".metadata").write_bytes(whole)

    refused(lambda m: setattr(m, "state_dict_metadata", [1]))
    refused(lambda m: setattr(m, "storage_data", None))
    refused(lambda m: setattr(m.state_dict_metadata[FC2], "chunks", 7))
    refused(lambda m: setattr(m.state_dict_metadata[FC2], "size", None))
    refused(lambda m: setattr(m.state_dict_metadata[FC2], "properties", "float"))
    refused(lambda m: setattr(m.state_dict_metadata[FC2].chunks[0], "offsets", [0, 0]))
    refused(lambda m: setattr(next(iter(m.storage_data.values())), "offset", "0"))
    refused(lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", 5))


def test_metadata_that_asks_for_much_memory_is_refused(megatron: Path) -> None:
    # An empty list, to be remembered at place 2^20: the unpickler would make room for all before.
    (megatron / "release" / ".metadata").write_bytes(b"\x80\x04]r\x00\x00\x10\x00.")
    require_refused(
        "megatron-to-hf", megatron, r"\.metadata is damaged \(it remembers 1048576 things in 9 bytes\)"
    )


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"sharded_backend": "zarr"}', b"{}"])
def test_damaged_metadata_json_is_a_user_error(megatron: Path, content: bytes) -> None:
    (megatron / "release" / "metadata.json").write_bytes(content)
    require_refused("megatron-to-hf", megatron, r"metadata\.json")


# --- tensors in .distcp files ----------------------------------------------------------------------------------------


def numbers() -> bytes:
    return saved(torch.ones(SIZE))


def pickled(change: Callable[[bytes], bytes]) -> bytes:
    """A saved tensor that says something else about itself; the change must change something."""

    def checked(content: bytes) -> bytes:
        changed = change(content)
        assert changed != content
        return changed

    return repacked(numbers(), {"/data.pkl": checked})


STRIDES = b"M\x00\x18K`K\x01"  # (6144, 96, 1)


SAVED: dict[str, tuple[Callable[[], bytes], str]] = {
    "no archive": (lambda: bytes(30_000), "."),
    "cut archive": (lambda: numbers()[:-40] + bytes(1000), "."),
    "no numbers": (lambda: repacked(numbers(), {"/data/0": lambda _: b""}) + bytes(30_000), "."),
    "fewer numbers": (lambda: repacked(numbers(), {"/data/0": lambda c: c[:-8]}) + bytes(8), "."),
    "compressed": (
        lambda: repacked(
            saved(torch.rand(SIZE)), {"x": bytes}, zipfile.ZIP_DEFLATED
        ) + bytes(30_000), "not stored whole|damaged",
    ),
    "offset past the end": (lambda: pickled(lambda c: c.replace(b"QK\x00", b"QM\xff\xff")), "out of bounds"),
    "strides past the end": (lambda: pickled(lambda c: c.replace(STRIDES, STRIDES[:-1] + b"\x02")), "out of bounds"),
    "a list": (lambda: saved([torch.ones(SIZE)]), "a saved list"),
    "sparse": (lambda: saved(torch.ones(SIZE).to_sparse()), "layout torch.sparse_coo"),
    "of another machine": (lambda: repacked(numbers(), {"/byteorder": lambda _: b"big"}), "order of another machine"),
    "another dtype": (lambda: saved(torch.ones(SIZE, dtype=torch.float64)), "is torch.float64"),
    "another shape": (lambda: saved(torch.ones(1, 96, 64)), r"is torch.float32 \(1, 96, 64\)"),
    "complex": (lambda: saved(torch.ones(SIZE, dtype=torch.complex64)), "is torch.complex64"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SAVED)
def test_saved_tensor_that_lies_is_refused(megatron: Path, fault: str) -> None:
    make, message = SAVED[fault]
    replace_saved(megatron / "release", FC2, make())
    require_refused("megatron-to-hf", megatron, rf"{FC2}.*{message}")


def test_numbers_of_a_saved_tensor_are_taken_as_torch_takes_them(megatron: Path) -> None:
    turned = torch.rand(1, 96, 64).transpose(1, 2)
    replace_saved(megatron / "release", FC2, saved(turned))
    assert torch.equal(TorchDistReader(megatron / "release").read(FC2, (0, 0, 0), SIZE), turned)


@pytest.mark.parametrize("by", [os.system, builtins.eval])
def test_saved_tensor_that_would_run_something_is_refused_and_not_run(
    megatron: Path, by: Callable[[str], object]
) -> None:
    evil = saved({"a": torch.ones(SIZE), "b": Touch(megatron / "touched", by)})
    replace_saved(megatron / "release", FC2, evil)
    require_refused(
        "megatron-to-hf", megatron, rf"{FC2} cannot be read \(it names \S+, .*nothing of it was run\)"
    )
    assert not (megatron / "touched").exists()


def test_saved_tensor_with_any_byte_damaged_is_unreadable_or_read() -> None:
    whole = saved(torch.ones(1, 4, 4))
    pages = mmap.mmap(-1, len(whole))
    num_refused = 0
    for at in range(len(whole)):
        pages[:] = whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        try:
            mapped_tensor(pages, 0, len(whole)).sum()
        except UNREADABLE:
            num_refused += 1
    assert num_refused > 100  # of the others most are padding or numbers, which only digests tell


# --- what lies beside tensors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [os.system, builtins.eval])
def test_arguments_that_would_run_something_are_refused_and_not_run(
    megatron: Path, by: Callable[[str], object]
) -> None:
    weights = megatron / "release"
    evil = {"args": Touch(megatron / "touched", by), "iteration": 0}
    torch.save(evil, weights / "common.pt")
    require_refused(
        "megatron-to-hf", megatron, r"common state cannot be read \(it names \S+, .*nothing of it was run"
    )
    (weights / "common.pt").unlink()
    content = saved([evil])
    (weights / "other.distcp").write_bytes(content)

    def change(metadata: Metadata) -> None:
        place = metadata.storage_data[MetadataIndex(COMMON)]
        place.relative_path, place.offset, place.length = "other.distcp", 0, len(content)

    edit_metadata(weights, change)
    require_refused(
        "megatron-to-hf", megatron, rf"object {COMMON} cannot be read \(it names \S+, .*nothing of it was run"
    )
    assert not (megatron / "touched").exists()


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", saved([1]), saved({"args": 3}), saved({"args": {"a": 1}})]
)
def test_common_state_without_arguments_is_refused_or_not_missed(megatron: Path, content: bytes) -> None:
    (megatron / "release" / "common.pt").write_bytes(content)
    try:
        assert read_args(megatron / "release") is None
    except UserError as error:
        assert "common state cannot be read" in str(error)  # either is right


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{"tokenizer_files": 3}', b'{"tokenizer_files": ["a"]}'],
)
def test_damaged_report_is_a_user_error(megatron: Path, content: bytes) -> None:
    (megatron / "conversion_report.json").write_bytes(content)
    require_refused("megatron-to-hf", megatron, r"conversion_report\.json is damaged")


@pytest.mark.parametrize("content", [b"", b"../../elsewhere", b"\xff\xfe", b"-1", b"7"])
def test_damaged_tracker_is_a_user_error(megatron: Path, content: bytes) -> None:
    (megatron / "latest_checkpointed_iteration.txt").write_bytes(content)
    require_refused("megatron-to-hf", megatron, r"latest_checkpointed_iteration\.txt")


def test_refusal_is_one_message_with_status_2_and_no_traceback(megatron: Path) -> None:
    weights = megatron / "release"
    path, start, length = place_of(weights, FC2)
    os.truncate(path, start + length // 2)
    command = [
        sys.executable,
        "-m",
        "rto_megatron.cli.main",
        "convert",
        "megatron-to-hf",
        megatron,
        megatron / "out",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert shown.returncode == 2
    assert "should end at byte" in shown.stderr
    assert "Traceback" not in shown.stdout + shown.stderr
    assert not (megatron / "out").exists()
