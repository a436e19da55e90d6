"""What `benchmark_weight_sync.py` asks of vLLM's workers; its servers name it as their worker extension."""

import torch
from weight_sync_measures import Meter, PartClock, RawBroadcast

from rto_megatron.generation.vllm.worker import landing, receiver
from rto_megatron.generation.vllm.worker.plugin import RtoWeightTransferEngine, RtoWorkerExtension
from rto_megatron.weight_sync.manifest import Manifest
from rto_megatron.weight_sync.shared import open_communicator
from rto_megatron.weight_sync.transport import Communicator, Rendezvous

_CLOCK = PartClock()
_CLOCK.time(Communicator, "finish", "transport")
_CLOCK.time(receiver, "digest", "digest")
_CLOCK.time(receiver.Receiver, "receive", "stage")
_CLOCK.time(RtoWeightTransferEngine, "finish_weight_update", "load")
_CLOCK.time(landing, "digest", "read back")


class ProbeExtension(RtoWorkerExtension):
    """Methods for vLLM's /collective_rpc, whose arguments are strings."""

    rank: int  # vLLM's worker has these two
    device: torch.device
    _raw: RawBroadcast
    _meter: Meter

    def probe_join(self, meeting: str, first_rank: str, manifest: str) -> None:
        """Enters the communicator of the raw broadcasts."""
        met = Rendezvous.from_json(meeting)
        device = self.device if met.device_type == "cuda" else torch.device("cpu")
        communicator = open_communicator(met, int(first_rank) + self.rank, device)
        communicator.join()
        self._raw = RawBroadcast(Manifest.from_json(manifest), communicator)

    def probe_receive(self) -> None:
        """One raw broadcast."""
        self._raw.run()

    def probe_start(self) -> None:
        """A push begins."""
        self._meter = Meter(_CLOCK)

    def probe_stop(self) -> str:
        """What the push took of this worker, as JSON."""
        return self._meter.read().to_json()
