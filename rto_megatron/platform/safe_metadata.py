"""Checkpoints are read without running what they hold: numbered patches of torch.distributed.checkpoint 2.13.

A torch_dist checkpoint of megatron-core 0.19.2 has two kinds of pickles: `.metadata`, which torch hands to
pickle.load, and the byte objects inside the `.distcp` files, which torch loads with weights_only=False.
Tensors are loaded with weights_only=True already, and `metadata.json` is JSON.
"""

import collections
import contextlib
import io
import pathlib
import pickle
import pickletools
import re
import struct
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch.distributed.checkpoint import default_planner, filesystem, metadata, planner
from torch.distributed.checkpoint.api import CheckpointException

from rto_megatron.errors import ModelFolderError, UserError
from rto_megatron.platform.patches import apply_missing, replace

_ALLOWED_CLASSES = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    planner.BytesIOWriteData,
    planner.SavePlan,
    planner.TensorWriteData,
    planner.WriteItem,
    planner.WriteItemType,
    filesystem._StorageInfo,
    filesystem._StoragePrefix,
    collections.OrderedDict,
    pathlib.Path,
    pathlib.PosixPath,
    torch.Size,
    torch.serialization._get_layout,  # maps the name of a layout to the layout
)
_ALLOWED = {(each.__module__, each.__qualname__): each for each in _ALLOWED_CLASSES} | {
    ("torch", name): each for name, each in vars(torch).items() if isinstance(each, torch.dtype)
}
# What pickle raises besides UnpicklingError where its bytes are damaged.
_DAMAGED = (
    EOFError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
    OverflowError,
    MemoryError,
    struct.error,
)
# What torch raises where the bytes of a tensor are not those of a tensor.
UNREADABLE = (pickle.UnpicklingError, *_DAMAGED, AssertionError, OSError)
_applied: set[str] = set()


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> object:
        allowed = _ALLOWED.get((module_name, global_name))
        if allowed is None:
            raise ModelFolderError(
                f"the checkpoint's .metadata names {module_name}.{global_name}, which no checkpoint of this "
                "program holds; nothing of it was run. Use a checkpoint that you know to be unchanged"
            )
        return allowed


def _require_bounded(pickled: bytes) -> None:
    """Refuses what would take memory out of proportion: one damaged byte can ask for 64 GB of places to remember.

    Raises:
        ValueError, UnpicklingError: such a number, or no pickle.
    """
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name.endswith("PUT") and int(argument or 0) > len(pickled):
            raise pickle.UnpicklingError(f"it remembers {argument} things in {len(pickled)} bytes")


def read_metadata(stream: BinaryIO) -> metadata.Metadata:
    """Unpickle the contents of a `.metadata` file, building nothing but checkpoint metadata.

    Raises:
        ModelFolderError: it names a class or function outside the allow-list, or does not hold checkpoint metadata.
    """
    try:
        pickled = stream.read()
        _require_bounded(pickled)
        content = _MetadataUnpickler(io.BytesIO(pickled)).load()
    except UserError:
        raise
    except (pickle.UnpicklingError, *_DAMAGED) as error:
        raise ModelFolderError(f"the checkpoint's .metadata is damaged ({error}); use another one") from error
    if not isinstance(content, metadata.Metadata):
        raise ModelFolderError(
            f"the checkpoint's .metadata holds {type(content).__name__} instead of Metadata"
        )
    return content


def saved_tensor(stream: BinaryIO) -> torch.Tensor:
    """What torch.save wrote about a tensor, without its numbers: dtype, shape and strides, on the meta device.

    Raises:
        UNREADABLE: these bytes are no saved tensor, or name what must not be loaded.
    """
    content = torch.load(stream, map_location="meta", weights_only=True)
    if not isinstance(content, torch.Tensor):
        raise RuntimeError(f"a saved {type(content).__name__}")
    if content.layout != torch.strided or content.is_neg():
        raise RuntimeError(f"a tensor of layout {content.layout}, whose numbers do not lie as they are")
    return content


def reason(error: Exception) -> str:
    """Why torch.load refused something: its own text goes on to advise to load it without the check."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return f"it names {named[1]}, which may not be loaded; nothing of it was run"
    return (
        re.sub(r"(?s).*WeightsUnpickler error: ", "", str(error)).partition("\n")[0] or type(error).__name__
    )


@contextlib.contextmanager
def safe_reading(folder: Path) -> Iterator[None]:
    """Read a checkpoint inside this context to learn in one line why it was refused.

    torch reports what stopped a load as an AssertionError or as a CheckpointException, which is no Exception.

    Args:
        folder: the torch_dist checkpoint.

    Raises:
        ModelFolderError: `.metadata` is absent, or it or a byte object holds what must not be unpickled.
        RuntimeError: torch could not read the checkpoint for another reason, such as a missing file.
    """
    path = folder / ".metadata"
    if not path.is_file():
        raise ModelFolderError(
            f"{folder} holds no .metadata: not a torch_dist checkpoint, or one whose save did not end"
        )
    with path.open("rb") as stream:
        try:
            read_metadata(stream)
        except UserError as error:
            raise error.about(str(folder)) from error
    try:
        yield
    except CheckpointException as failure:
        for refused, _ in failure.failures.values():
            if isinstance(refused, UserError):
                raise refused.about(str(folder)) from failure
        raise RuntimeError(f"{folder}: {failure}") from failure


def s1_metadata() -> None:
    """`.metadata` is unpickled by the allow-list.

    Call site: FileSystemReader.read_metadata of torch/distributed/checkpoint/filesystem.py, and through it
    megatron's dist_checkpointing/strategies/torch.py and cached_metadata_filesystem_reader.py.
    """

    def read(self: filesystem.FileSystemReader, *args: object, rank: int | None = None) -> metadata.Metadata:
        path = self._get_metadata_path(rank)
        with self.fs.create_stream(path, "rb") as stream:
            content = read_metadata(cast(BinaryIO, stream))
        if content.storage_meta is None:
            content.storage_meta = metadata.StorageMeta()
        content.storage_meta.load_id = self.load_id
        return content

    replace(filesystem.FileSystemReader, "read_metadata", read)


def s2_byte_objects() -> None:
    """Byte objects, such as megatron's common state, are loaded with weights_only=True.

    Call site: DefaultLoadPlanner.load_bytes of torch/distributed/checkpoint/default_planner.py, used by
    load_common_state_dict of dist_checkpointing/serialization.py and by its MCoreLoadPlanner.
    """

    def load_bytes(
        self: default_planner.DefaultLoadPlanner, read_item: planner.ReadItem, value: io.BytesIO
    ) -> None:
        try:
            content = torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ModelFolderError(
                f"the checkpoint's object {read_item.storage_index.fqn} cannot be read ({reason(error)}). Use a "
                "checkpoint that you know to be unchanged"
            ) from error
        name = read_item.dest_index.fqn
        if self.flatten_state_dict:
            default_planner.set_element(self.original_state_dict, self.mappings[name], content)
        else:
            self.state_dict[name] = content

    replace(default_planner.DefaultLoadPlanner, "load_bytes", load_bytes)


PATCHES: dict[str, Callable[[], None]] = {"S1": s1_metadata, "S2": s2_byte_objects}


def install(skip: Set[str] = frozenset()) -> None:
    """Apply the patches that this process does not have yet.

    Args:
        skip: names of patches to leave out, for the tests that show what each one is for.
    """
    apply_missing(PATCHES, _applied, skip)
