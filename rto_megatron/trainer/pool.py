"""The inference pool as a trainer rank sees it: replica leads sample, every rank takes part in a push."""

import os
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from rto_megatron.config import schema
from rto_megatron.data.packing import token_batch
from rto_megatron.engine.megatron import Model
from rto_megatron.errors import UserError
from rto_megatron.parallel.topology import Topology
from rto_megatron.rollout.gate import read_token
from rto_megatron.rollout.vllm_pool import VllmPool
from rto_megatron.weight_sync.source import PolicySource
from rto_megatron.weight_sync.sync import Synchronise, SyncPlace, WeightSync, canary_token_ids
from rto_megatron.weight_sync.transport import LOOPBACK


def connect_pool(config: schema.RolloutConfig, topology: Topology) -> VllmPool | None:
    """The pool on replica leads, None elsewhere; all ranks must call it.

    Raises:
        UserError: on every rank, when the pool does not answer.
    """
    pool, error = None, None
    if topology.is_replica_lead:
        try:
            pool = VllmPool(config.servers, _token(config), config.request_timeout_s)
            pool.check_alive()
        except UserError as failure:
            error = str(failure)
    topology.raise_together(error)
    return pool


def _token(config: schema.RolloutConfig) -> str:
    if config.token_file is None:
        raise UserError("rollout.token_file is not set; name the file that `rto pool` wrote")
    return read_token(config.token_file)


class PolicyPush:
    """Pushes a policy's weights and proves them with a canary; all ranks must call it together."""

    def __init__(self, policy: Model, sync: WeightSync, tolerance: float) -> None:
        self._policy = policy
        self._sync = sync
        self._tolerance = tolerance
        self._canary_ids = canary_token_ids(
            min(policy.shape.vocab_size, 512), min(48, policy.shape.max_positions - 1)
        )

    def __call__(self, version: int) -> dict[str, float]:
        """Makes the pool hold the present weights as `version`.

        Returns:
            seconds and bytes of the push, for the logs.

        Raises:
            UserError: on every rank; the pool is paused.
        """
        times = self._sync.push(version)
        self._sync.canary(version, self._canary_ids, self._canary_logprobs(), self._tolerance)
        return {
            "sync/pause_s": times.pause_s,
            "sync/prepare_s": times.prepare_s,
            "sync/commit_s": times.commit_s,
            "sync/bytes": float(times.num_bytes),
        }

    def _canary_logprobs(self) -> list[float]:
        place = self._policy.topology
        batch = token_batch([(self._canary_ids, 1)], True, place.row_multiple, place.device.torch_device)
        (logp_T,) = self._policy.token_outputs([batch])
        return logp_T[: len(self._canary_ids) - 1].tolist()

    def close(self) -> None:
        """Leaves the communicator."""
        self._sync.close()


def meeting_host(servers: Sequence[str]) -> str:
    """The address at which senders and pool meet: loopback when all of them are on this machine.

    Otherwise it is this machine's address on the way to the first server, or to the first trainer machine, that
    is elsewhere.
    """
    elsewhere = [host for host in map(_host, servers) if not _is_loopback(host)]
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1"):
        elsewhere.append(os.environ["MASTER_ADDR"])
    if not elsewhere:
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((elsewhere[0], 9))  # picks the route, sends nothing
        return str(probe.getsockname()[0])


def _host(server: str) -> str:
    return urlsplit(server).hostname or server


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.")


def open_push(config: schema.RolloutConfig, policy: Model) -> PolicyPush:
    """The pushes of one policy; all ranks must call it."""
    topology = policy.topology

    def broadcast(text: str) -> str:
        return str(topology.lead_json(text))

    sync = WeightSync(
        source=PolicySource(policy),
        servers=config.servers,
        token=_token(config),
        place=SyncPlace(
            is_controller=topology.is_lead,
            stage=topology.pipeline_rank if topology.data_rank == 0 else None,
            sends=topology.data_rank == 0 and topology.tensor_rank == 0,
        ),
        num_senders=topology.pipeline_size,
        device=topology.device.torch_device,
        bucket_bytes=config.bucket_mb << 20,
        timeout_s=config.sync_timeout_s,
        together=Synchronise(all_raise=topology.raise_together, broadcast=broadcast),
        host=meeting_host(config.servers),
    )
    return PolicyPush(policy, sync, config.logprob_tolerance)
