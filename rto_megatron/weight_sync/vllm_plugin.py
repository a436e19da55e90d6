"""What runs inside vLLM's workers: receive a push into host memory, prove it, and load it only when told to.

vLLM's `update_weights` prepares and its `finish_weight_update` commits. Until the commit the old weights
serve on, at the price of one copy of the model in host memory. Named on vLLM's command line as worker
extension, which makes every worker import this module before its weight-transfer engine is made.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rto_megatron.weight_sync.coverage import tied_parameters, uncovered
from rto_megatron.weight_sync.digest import digest
from rto_megatron.weight_sync.manifest import Bucket, Manifest, bucket_buffer, payload, slot_view, trailer
from rto_megatron.weight_sync.sender import agree_on_manifest
from rto_megatron.weight_sync.transport import Communicator, DisagreementError, Rendezvous, TransportError

_BACKEND = "rto"


@dataclass(kw_only=True)
class InitInfo(WeightTransferInitInfo):
    """Body of /init_weight_transfer_engine: the meeting point and the rank of this server's first worker."""

    rendezvous: str
    first_rank: int


@dataclass(kw_only=True)
class UpdateInfo(WeightTransferUpdateInfo):
    """Body of /update_weights: a manifest to prepare, or the wish to leave an unfinished session."""

    manifest: str = ""
    abort: bool = False


class RtoWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The receiving end of a push in one worker."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._communicator: Communicator | None = None
        self._staged: list[tuple[Bucket, Tensor]] = []
        self._checked_sha256 = ""

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Joins the communicator of the senders and all workers."""
        self.shutdown()
        meeting = Rendezvous.from_json(init_info.rendezvous)
        parallel = self.parallel_config
        rank = init_info.first_rank + parallel.data_parallel_index * parallel.world_size + parallel.rank
        device = self.device if meeting.device_type == "cuda" else torch.device("cpu")
        self._communicator = Communicator(meeting, rank, device)

    def shutdown(self) -> None:
        """Leaves the communicator and forgets what was staged."""
        self._communicator = None
        self._staged = []

    def start_weight_update(self) -> None:
        """Forgets what an unfinished push left behind."""
        self._staged = []

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Prepares: receives all buckets and proves them; the model is not touched.

        Raises:
            DisagreementError: some rank refused; the communicator stays usable.
            TransportError: the communicator is lost.
        """
        typed = self.parse_update_info(update_info)
        if typed.abort:
            raise DisagreementError("weight update aborted on request")
        if self._communicator is None:
            raise TransportError("this worker is in no communicator; the trainer must open one")
        failure = ""
        try:
            self.receive_weights(typed)
        except TransportError as error:
            failure = str(error)
        if failure:
            # Gloo tells only the neighbours of a lost rank. Its sockets close when the last reference to
            # the group goes, and then the others hear at once; a traceback would keep that reference.
            self.shutdown()
            gc.collect()
            raise TransportError(failure)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Receives and proves every bucket of a push; see `update_weights`."""
        communicator = self._communicator
        assert communicator is not None
        try:
            manifest = Manifest.from_json(update_info.manifest)
        except ValueError as error:
            # The senders already wait for this rank: it must tell them.
            communicator.agree(str(error))
            raise
        agree_on_manifest(manifest, communicator, self._refusal(manifest))
        received = []
        damaged = []
        for number, bucket in enumerate(manifest.buckets()):
            buffer = bucket_buffer(bucket, communicator.device)
            communicator.broadcast(buffer, bucket.sender)
            if digest(payload(buffer)) != int(trailer(buffer)):
                names = [slot.spec.name for slot in bucket.slots]
                damaged.append(f"bucket {number} ({names[0]} to {names[-1]})")
            # A cuda buffer moves to host memory: staging must not compete with the cache for device memory.
            received.append((bucket, buffer.cpu()))
        communicator.agree(f"digest mismatch in {', '.join(damaged[:5])}" if damaged else None)
        self._staged = received

    def finish_weight_update(self) -> None:
        """Commits: loads the prepared weights through vLLM's layerwise reload, which keeps device addresses.

        Raises:
            RuntimeError: nothing was prepared, or vLLM's loader left parameters out.
        """
        if not self._staged:
            raise RuntimeError("nothing was prepared, so there is nothing to commit")
        staged, self._staged = self._staged, []
        expected = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        try:
            loaded = set(self.model.load_weights(_tensors(staged)))
        finally:
            finalize_layerwise_reload(self.model, self.model_config)
        # The reload processes a tied parameter for its first owner only. The output layer of a CPU keeps a packed
        # copy and would go on with the old one.
        for _, module in tied_parameters(self.model):
            module.quant_method.process_weights_after_loading(module)
        if expected - loaded:
            raise RuntimeError(f"parameters left out by vLLM's loader: {sorted(expected - loaded)[:5]}")

    def _refusal(self, manifest: Manifest) -> str | None:
        # Tensor names, dtypes and shapes do not change between the pushes of a run, its version does.
        sha256 = Manifest(0, manifest.bucket_bytes, manifest.specs).sha256()
        if sha256 == self._checked_sha256:
            return None
        problems = uncovered(self.model, self.model_config, manifest.specs)
        if problems:
            return f"the push does not fit the served model: {'; '.join(problems[:5])}"
        self._checked_sha256 = sha256
        return None


class RtoWorkerExtension:
    """Mixed into vLLM's worker; being named is its whole use."""


def _tensors(staged: list[tuple[Bucket, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for bucket, buffer in staged:
        for slot in bucket.slots:
            yield slot.spec.name, slot_view(buffer, slot)


if _BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(_BACKEND, RtoWeightTransferEngine)

if torch.cpu._is_amx_tile_supported():
    # Linux grants AMX to a process that asks for it. vLLM's bf16 attention does not ask; unless oneDNN happened to, its
    # first tile instruction ends the worker with SIGILL.
    torch.cpu._init_amx()
