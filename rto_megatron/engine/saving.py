"""How a checkpoint comes to stand: written aside and synced, then its manifest, the rename, the pointer, in this order.

Whenever the process is killed, the newest folder under a final name is whole, and what is not is removed by the next
save. Names are below <run>/checkpoints.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from rto_megatron.engine.integrity import SAVING_ERRORS, CheckpointError, room_error, write_error
from rto_megatron.parallel.collectives import Json
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform import faults
from rto_megatron.platform.patience import patiently
from rto_megatron.platform.sync_save import ShardWriter, plan_shards
from rto_megatron.storage.checkpoints import CHECKPOINTS, POINTER, STATE, finished_checkpoints
from rto_megatron.storage.file_digests import (
    MANIFEST,
    WEIGHTS,
    CheckpointManifest,
    FileDigest,
    checkpoint_name,
    file_digests,
    file_names,
)
from rto_megatron.storage.megatron_folder import HF_FILES
from rto_megatron.storage.ownership import close_to_others

_HEADERS = 1.01  # of torch.save, `.metadata` and the manifest, over the numbers alone
_ALLOWANCE = 1 << 20


class Saving:
    """One checkpoint on its way; all ranks must call its methods together.

    Example:
        saving = Saving(run_dir, step=100, keep=2, topology=topology)
    """

    def __init__(self, run_dir: Path, step: int, keep: int, topology: Topology) -> None:
        self._run_dir, self._step, self._keep, self._topology = run_dir, step, keep, topology
        self.final = run_dir / CHECKPOINTS / checkpoint_name(step)
        self._partial = self.final.with_name(f".partial_{self.final.name}")
        self._writers: dict[str, ShardWriter] = {}
        self._num_bytes = 0
        self._writing: Future[dict[str, FileDigest]] | None = None

    def prepare(self, hf_folders: Mapping[str, Path], state: Json, texts: Mapping[str, str]) -> None:
        """Makes the folder aside, with everything but the weights.

        Args:
            texts: name -> contents of further files, on the lead.

        Raises:
            CheckpointError: the checkpoint exists, or the folder cannot be made.
        """
        error = None
        if self._topology.is_lead:
            try:
                error = patiently(self._make_folder, hf_folders, {**texts, STATE: json.dumps(state)})
            except OSError as failure:
                error = self._failed(failure)
        self._topology.raise_together(error, *SAVING_ERRORS)

    def _make_folder(
        self, hf_folders: Mapping[str, Path], texts: Mapping[str, str]
    ) -> CheckpointError | None:
        if self.final.exists():
            return CheckpointError(
                f"{self.final} exists already, and a checkpoint is never overwritten; name another run.dir"
            )
        # Only one level: a run folder that vanished must not be made anew on the disk below.
        self.final.parent.mkdir(exist_ok=True)
        for leftover in [*self.final.parent.glob(".partial_*"), *self.final.parent.glob(".removed_*")]:
            shutil.rmtree(leftover)
        for role, folder in hf_folders.items():
            (self._partial / role / WEIGHTS).mkdir(parents=True)
            shutil.copytree(
                folder, self._partial / role / HF_FILES, ignore=shutil.ignore_patterns("*.safetensors*")
            )
        for name, text in texts.items():
            (self._partial / name).write_text(text)
        return None

    def plan(self, states: Mapping[str, ShardedStateDict]) -> None:
        """Shares the state of every role out over the ranks, and looks for room.

        Raises:
            DiskFull: there is none; nothing was written.
        """
        for role, state in states.items():
            self._writers[role] = plan_shards(state, self._partial / role / WEIGHTS)
        own = sum(writer.num_bytes for writer in self._writers.values())
        self._num_bytes = int(sum(self._topology.gather_all(own, int)) * _HEADERS) + _ALLOWANCE
        error = None
        if self._topology.is_lead:
            error = room_error(self.final.parent, self._num_bytes)
            if error is not None:
                shutil.rmtree(self._partial)
        self._topology.raise_together(error, *SAVING_ERRORS)

    def start(self) -> None:
        """Writes this rank's part from a copy in the host's memory, beside whatever follows, until `finish`."""
        for writer in self._writers.values():
            writer.copy()
        executor = ThreadPoolExecutor(1, "checkpoint")
        self._writing = executor.submit(self._write)
        executor.shutdown(wait=False)

    def _write(self) -> dict[str, FileDigest]:
        digests: dict[str, FileDigest] = {}
        for role, writer in self._writers.items():
            digests |= patiently(self._write_role, role, writer)
        return digests

    def _write_role(self, role: str, writer: ShardWriter) -> dict[str, FileDigest]:
        writer.write()
        faults.at("ckpt_shard", self._step)
        return file_digests(self._partial, [f"{role}/{WEIGHTS}/{name}" for name in writer.files])

    def finish(self) -> Path:
        """Waits for every rank's part and makes the checkpoint stand.

        Raises:
            DiskFull, CheckpointError: on every rank; older checkpoints are as they were.
        """
        own: dict[str, FileDigest] = {}
        error = None
        try:
            own = self._write() if self._writing is None else self._writing.result()
        except OSError as failure:
            error = self._failed(failure)
        self._raise_and_clear(error)
        try:
            for writer in self._writers.values():
                writer.finish()
        except OSError as failure:
            # Only the lead writes here, and the others wait for it: they learn of its end from their connection.
            raise self._failed(failure) from failure
        parts = self._topology.gather_all(own, dict[str, FileDigest])
        error = None
        try:
            faults.at("ckpt_manifest", self._step)
            if self._topology.is_lead:
                self._make_stand(parts)
        except OSError as failure:
            error = self._failed(failure)
        self._raise_and_clear(error)
        return self.final

    def _make_stand(self, parts: Sequence[Mapping[str, FileDigest]]) -> None:
        digests = {name: digest for part in parts for name, digest in part.items()}
        others = [name for name in file_names(self._partial) if name not in digests]
        manifest = CheckpointManifest(self._step, digests | file_digests(self._partial, others))
        (self._partial / MANIFEST).write_text(manifest.to_json())
        for path in [*self._partial.rglob("*"), self._partial]:
            close_to_others(path)
            _sync(path)
        faults.at("ckpt_rename", self._step)
        self._partial.rename(self.final)
        _sync(self.final.parent)
        faults.at("ckpt_pointer", self._step)
        patiently(point_to, self.final)
        for old in finished_checkpoints(self._run_dir)[: -self._keep]:
            # Under another name first: a folder that is half removed must not look like a checkpoint.
            shutil.rmtree(old.rename(old.with_name(f".removed_{old.name}")))

    def _failed(self, failure: OSError) -> CheckpointError:
        return write_error(failure, self._partial, self._num_bytes)

    def _raise_and_clear(self, error: CheckpointError | None) -> None:
        try:
            self._topology.raise_together(error, *SAVING_ERRORS)
        except CheckpointError:
            if self._topology.is_lead:
                shutil.rmtree(self._partial, ignore_errors=True)  # its bytes are what others need
            raise


def point_to(checkpoint: Path) -> None:
    """Makes `latest` name a checkpoint, as a whole."""
    pointer = checkpoint.with_name(POINTER)
    partial = checkpoint.with_name(f"{POINTER}.partial")
    partial.write_text(f"{checkpoint.name}\n")
    _sync(partial)
    partial.replace(pointer)
    _sync(pointer.parent)


def _sync(path: Path) -> None:
    """Puts a file, or a directory's entries, on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
