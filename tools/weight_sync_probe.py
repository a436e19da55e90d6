"""What `benchmark_weight_sync.py` asks of vLLM's workers; its servers name it as their worker extension."""

import torch
from weight_sync_measures import DigestClock, PeakMemory, RawBroadcast

from rto_megatron.generation.vllm.worker import landing, receiver
from rto_megatron.generation.vllm.worker.plugin import RtoWorkerExtension
from rto_megatron.weight_sync.manifest import Manifest
from rto_megatron.weight_sync.shared import open_communicator
from rto_megatron.weight_sync.transport import Rendezvous

_CLOCK = DigestClock(landing, receiver)


class ProbeExtension(RtoWorkerExtension):
    """Methods for vLLM's /collective_rpc, whose arguments are strings."""

    rank: int  # vLLM's worker has these two
    device: torch.device
    _raw: RawBroadcast
    _memory: PeakMemory

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
        self._memory = PeakMemory()
        _CLOCK.take()

    def probe_stop(self) -> str:
        """Seconds on digests and bytes of peak memory of the push."""
        return f"{_CLOCK.take()} {self._memory.above()}"
