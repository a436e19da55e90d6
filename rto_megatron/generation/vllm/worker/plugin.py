"""What runs inside vLLM's workers: receive a push into host memory, prove it, and load it only when told to.

vLLM's `update_weights` prepares and its `finish_weight_update` commits. Until the commit the old weights
serve on. Named on vLLM's command line as worker extension, which makes every worker import this module before
its weight-transfer engine is made.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from vllm.config import VllmConfig, WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.utils.nccl import unpinned_nccl_env

from rto_megatron.generation.vllm.worker.coverage import Coverage, load_weights, rehearse, tied_parameters
from rto_megatron.generation.vllm.worker.landing import Landing
from rto_megatron.generation.vllm.worker.receiver import Receiver, Staged
from rto_megatron.weight_sync.control_channel import TransportError
from rto_megatron.weight_sync.manifest import Manifest
from rto_megatron.weight_sync.sender import agree_on_manifest
from rto_megatron.weight_sync.shared import open_communicator
from rto_megatron.weight_sync.transport import Communicator, Rendezvous

_BACKEND = "rto"
_log = init_logger(__name__)


@dataclass(kw_only=True)
class InitInfo(WeightTransferInitInfo):
    """Body of /init_weight_transfer_engine: the meeting point, this server's first rank and what will be pushed.

    Example:
        InitInfo(rendezvous=rendezvous, first_rank=1, manifest=manifest)
    """

    rendezvous: str
    first_rank: int
    manifest: str


@dataclass(kw_only=True)
class UpdateInfo(WeightTransferUpdateInfo):
    """Body of /update_weights: the version to prepare.

    Example:
        UpdateInfo(version=3)
    """

    version: int = -1


class RtoWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The receiving end of a push in one worker.

    Example:
        WeightTransferEngineFactory.register_engine("rto", RtoWeightTransferEngine)
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._communicator: Communicator | None = None
        self._manifest = Manifest(0, ())
        self._staged: Staged | None = None
        self._coverage: Coverage | None = None  # of the present manifest, once rehearsed

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Joins the communicator of the senders and all workers.

        Raises:
            ValueError: a manifest of another release.
            TransportError: the ranks did not meet.
        """
        self.shutdown()
        with self._one_voice():
            meeting = Rendezvous.from_json(init_info.rendezvous)
            manifest = Manifest.from_json(init_info.manifest)
            if manifest != self._manifest:
                self._manifest, self._coverage = manifest, None
            parallel = self.parallel_config
            rank = init_info.first_rank + parallel.data_parallel_index * parallel.world_size + parallel.rank
            device = self.device if meeting.device_type == "cuda" else torch.device("cpu")
            communicator = open_communicator(meeting, rank, device)
            # What VLLM_BATCH_INVARIANT sets for vLLM's own groups the trainer has not, and NCCL would hang.
            with unpinned_nccl_env():
                communicator.join()
            self._communicator = communicator

    @contextmanager
    def _one_voice(self) -> Iterator[None]:
        """Leaves it to the server's last worker to fail; all fail together, as every phase ends with an agreement.

        vLLM's executor stops reading its workers' answers at the first error. What it left unread would pass for the
        answer to the next request, and a server with several workers could never be pushed to again.
        """
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            if self.parallel_config.rank == self.parallel_config.world_size - 1:
                raise
            _log.warning("weight push failed on worker %d: %s", self.parallel_config.rank, error)

    def shutdown(self) -> None:
        """Leaves the communicator and forgets what was staged."""
        self._communicator = None
        self._staged = None

    def start_weight_update(self) -> None:
        """Forgets what an unfinished push left behind."""
        self._staged = None

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Prepares: receives all buckets and proves them; the model is not touched.

        Raises:
            DisagreementError: some rank refused; the communicator stays usable.
            TransportError: the communicator is lost.
        """
        with self._one_voice():
            if self._communicator is None:
                raise TransportError("this worker is in no communicator; the trainer must open one")
            failure = ""
            try:
                self.receive_weights(self.parse_update_info(update_info))
            except TransportError as error:
                failure = str(error)
            if failure:
                self._leave(failure)

    def _leave(self, failure: str) -> None:
        # The group goes with the last reference to it, and a traceback would keep one.
        self.shutdown()
        gc.collect()
        raise TransportError(failure)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Receives and proves every bucket of a push; see `update_weights`."""
        communicator = self._communicator
        assert communicator is not None
        if self._coverage is None:
            self._coverage = rehearse(self.model, self.model_config, self._manifest.tensors().values())
        problems = self._coverage.problems[:5]
        refusal = f"the push does not fit the served model: {'; '.join(problems)}" if problems else None
        agree_on_manifest(self._manifest, update_info.version, communicator, refusal)
        receiver = Receiver(self._manifest, self._coverage.needs, communicator)
        self._staged = receiver.receive(update_info.version)

    def finish_weight_update(self) -> None:
        """Commits: loads the prepared weights through vLLM's layerwise reload, which keeps device addresses.

        Returns once every worker of every server has proved that its parameters hold what was sent.

        Raises:
            RuntimeError: nothing was prepared.
            DisagreementError: a worker, this one or another, loaded something else.
            TransportError: the communicator is lost.
        """
        with self._one_voice():
            staged, communicator = self._staged, self._communicator
            if staged is None or communicator is None:
                raise RuntimeError("nothing was prepared, so there is nothing to commit")
            self._staged = None
            fault = self._load(staged)
            failure = ""
            try:
                communicator.agree(fault, staged.token)
            except TransportError as error:
                failure = str(error)
            if failure:
                del communicator
                self._leave(failure)

    def _load(self, staged: Staged) -> str | None:
        assert self._coverage is not None
        landing = Landing(self.model, staged.expected, self._coverage.places)
        held = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        # What vLLM derives from weights, as it does for attention over latents, is gone until the reload ends.
        expected = held & {name for name, _ in self.model.named_parameters()}
        if self.device.type == "cpu":
            _forget_expert_kernels(self.model)
        # Layers with padded parameters are loaded when the reload is finalised.
        with landing.watch():
            try:
                tensors = staged.tensors(self._manifest.tensors())
                announced = ((name, landing.announce(name, full)) for name, full in tensors)
                loaded = set(load_weights(self.model, announced))
            finally:
                finalize_layerwise_reload(self.model, self.model_config)
        # The reload processes a tied parameter for its first owner only. The output layer of a CPU keeps a packed
        # copy and would go on with the old one.
        for _, module in tied_parameters(self.model):
            pack: Callable[..., None] = module.quant_method.process_weights_after_loading  # type: ignore[union-attr, assignment]  # unknown to torch's Module
            pack(module)
        if expected - loaded:
            return f"parameters left out by vLLM's loader: {sorted(expected - loaded)[:5]}"
        return landing.faults()


class RtoWorkerExtension:
    """Mixed into vLLM's worker, which offers its methods under /collective_rpc.

    Example:
        worker.leave_weight_update()
    """

    _weight_update_active: bool  # the worker's own

    def leave_weight_update(self) -> None:
        """Closes a session that a trainer left open; vLLM would refuse the next on every worker (`_one_voice`)."""
        self._weight_update_active = False


def _forget_expert_kernels(model: nn.Module) -> None:
    """Has experts packed for a CPU's kernels again, which vLLM does with the first load only."""
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            module.quant_method.moe_kernel = None


if _BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(_BACKEND, RtoWeightTransferEngine)

if torch.cpu._is_amx_tile_supported():
    # Linux grants AMX to a process that asks for it. vLLM's bf16 attention does not ask; unless oneDNN happened to, its
    # first tile instruction ends the worker with SIGILL.
    torch.cpu._init_amx()
