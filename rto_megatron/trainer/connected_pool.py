"""The inference pool as a trainer rank sees it: replica leads sample, every rank takes part in a push."""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from rto_megatron.config.rollouts import RolloutConfig
from rto_megatron.data.packing import token_batch
from rto_megatron.engine.absent import RoleModel
from rto_megatron.engine.holders import num_places, run_of
from rto_megatron.engine.offload import HostMemory
from rto_megatron.errors import MachineError, PoolError, RecipeError, UserError
from rto_megatron.generation.contract import NoServersLeft, RolloutEngine, Unreachable
from rto_megatron.generation.stop_strings import Decode, StoppingEngine
from rto_megatron.generation.vllm.client.liveness import Liveness, failures_of
from rto_megatron.generation.vllm.client.phases import PoolPhases
from rto_megatron.generation.vllm.client.pushed_servers import AskPushedServers
from rto_megatron.generation.vllm.client.vllm_pool import VllmPool
from rto_megatron.generation.vllm.gate import read_token
from rto_megatron.lifecycle.status import attempt_number
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.network import host_of, is_loopback
from rto_megatron.platform.open_files import TooManyOpenFiles
from rto_megatron.reporting.progress import say
from rto_megatron.types import Metrics
from rto_megatron.weight_sync.canary import Canary, canary_token_ids
from rto_megatron.weight_sync.policy_weights import PolicySource
from rto_megatron.weight_sync.push import PushPart, WeightSync
from rto_megatron.weight_sync.transport import LOOPBACK

# Nats. Two right implementations differ by 3e-6 in fp32 and by up to 0.09 in bf16 over the canary's tokens; other
# weights differ by whole nats.
CANARY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}


class SharedGpus:
    """Turns of trainer and pool on the same GPUs; all ranks must call its methods together.

    What changes hands is the memory of activations, of the pool's weights and cache, and of what of the trainer waits
    in host memory meanwhile; everything else stays where it is in every phase.

    Args:
        memory: whose parts the trainer does without while the pool samples.
        pool: on the lead, whose servers `phases` moves; not used elsewhere.
        timeout_s: of one move of one server.

    Example:
        shared.give_to_pool()
    """

    def __init__(
        self,
        topology: Topology,
        pool: VllmPool | None,
        phases: PoolPhases,
        token: str,
        timeout_s: float,
        memory: HostMemory,
    ) -> None:
        self._memory = memory
        self._topology = topology
        self._pool = pool
        self._phases = phases
        self._token = token
        self._timeout_s = timeout_s

    def give_to_pool(self) -> None:
        """Frees what the trainer's allocator keeps for later, before the pool wakes up."""
        if self._topology.device.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        self._topology.raise_together(None)  # a server's GPUs belong to several ranks

    def leave_to_pool(self) -> None:
        """Frees what the trainer does without while the pool samples, once the weights have been sent."""
        self._memory.enter("sample")
        self.give_to_pool()

    def take_from_pool(self) -> None:
        """Puts the pool to sleep, once every replica has its rollouts.

        Raises:
            UserError: on every rank; a server keeps its memory.
        """
        self._topology.raise_together(None)
        failure = self._put_to_sleep() if self._topology.is_lead else None
        self._topology.await_all()
        self._topology.raise_together(failure)

    def _put_to_sleep(self) -> UserError | None:
        assert self._pool is not None
        members = self._pool.members
        # Those that are out as well: a server that failed a push holds memory.
        timeouts = dict.fromkeys(members.configured, self._timeout_s)
        try:
            failures = failures_of(timeouts, self._token, self._phases.make_room)
        except TooManyOpenFiles as raised:
            return raised
        for address, failure in failures.items():
            members.take_out(address, failure)
        kept: list[UserError] = [one for one in failures.values() if not isinstance(one, Unreachable)]
        return PoolError(f"the pool keeps memory that the trainer needs: {kept[0]}") if kept else None


class PolicyPush:
    """Pushes a policy's weights to every server that is alive, those that are out included, and proves them.

    All ranks must call it together.

    Args:
        pool: on replica leads; None elsewhere. It samples from the servers that the last push proved.
        tolerance: largest canary difference in nats.
        shared: where trainer and pool have the same GPUs.

    Example:
        seconds = PolicyPush(policy, sync, pool, tolerance=0.05)(3)
    """

    def __init__(
        self,
        policy: RoleModel,
        sync: WeightSync,
        pool: VllmPool | None,
        tolerance: float,
        shared: SharedGpus | None = None,
    ) -> None:
        self._policy = policy
        self._sync = sync
        self._pool = pool
        self._tolerance = tolerance
        self._shared = shared
        self._has_pushed = False
        self._canary_ids = canary_token_ids(
            min(policy.shape.vocab_size, 512), min(48, policy.shape.max_positions - 1)
        )

    def __call__(self, version: int) -> dict[str, float]:
        """Makes the pool hold the present weights as `version`.

        Returns:
            servers, seconds and bytes of the push, for the logs.

        Raises:
            NoServersLeft: on every rank; no server is alive, or none came through the push.
            UserError: on every rank; no server was alive at the first push, the pool is paused, or this process may
            open no more files.
        """
        self._share_losses()
        servers = self._alive()
        canary = Canary(self._canary_ids, self._canary_logprobs(), self._tolerance)
        if self._shared is not None:
            self._shared.give_to_pool()
        leave = None if self._shared is None else self._shared.leave_to_pool
        report = self._sync.push(version, servers, canary, leave)
        self._has_pushed = True
        if self._pool is not None:
            self._pool.members.settle(report.serving, report.lost)
        times = report.times
        return {
            "pool/servers": float(len(report.serving)),
            "sync/pause_s": times.pause_s,
            "sync/prepare_s": times.prepare_s,
            "sync/commit_s": times.commit_s,
            "sync/canary_s": times.canary_s,
            "sync/bytes": float(times.num_bytes),
        }

    def _share_losses(self) -> None:
        """The lead tells of servers that only another replica saw fail."""
        lost = {} if self._pool is None else dict(self._pool.members.out)
        for seen in self._policy.topology.gather(lost, dict[str, str]):
            if self._pool is not None:
                for address, reason in seen.items():
                    if address in self._pool.members.serving:
                        self._pool.members.take_out(address, PoolError(reason))

    def _alive(self) -> tuple[str, ...]:
        """What the lead finds alive among all configured servers."""
        topology = self._policy.topology
        servers: tuple[str, ...] = ()
        failure: UserError | None = None
        if topology.is_lead:
            assert self._pool is not None
            try:
                servers = self._pool.alive()
                failure = None if servers else self._none_answers(str(self._pool.members.none_left()))
            except TooManyOpenFiles as raised:
                failure = raised
        topology.raise_together(failure, NoServersLeft)
        return servers

    def _none_answers(self, reasons: str) -> UserError:
        """At its first push of all a run has met no server: the recipe or the pool is wrong, and no restart helps."""
        if self._has_pushed or attempt_number() > 1:
            return NoServersLeft(reasons)
        return PoolError(
            f"none of rollout.servers answers, and nothing was done yet: {reasons}; correct the addresses, or start "
            "the pool first (rto pool)"
        )

    def _canary_logprobs(self) -> list[float]:
        topology = self._policy.topology
        batch = token_batch(
            [(self._canary_ids, 1)], True, topology.row_multiple, topology.device.torch_device
        )
        (logp_T,) = self._policy.token_outputs([batch])
        return logp_T[: len(self._canary_ids) - 1].tolist()

    def close(self) -> None:
        """Leaves the communicator."""
        self._sync.close()


class Push(Protocol):
    """Makes whatever samples hold the present weights as a version.

    Example:
        metrics = push(3)
    """

    def __call__(self, version: int) -> dict[str, float]:
        """See `PolicyPush.__call__`."""
        ...

    def close(self) -> None:
        """See `PolicyPush.close`."""
        ...


@dataclass(frozen=True)
class ConnectedPool:
    """The pool as the loop sees it.

    Example:
        ConnectedPool(engine, push)
    """

    engine: RolloutEngine | None  # on replica leads
    push: Push
    shared: SharedGpus | None = None  # where trainer and pool have the same GPUs
    measured: Callable[[], Metrics] = dict  # sums for the logs about the requests since the last call

    def stopping_at(self, strings: tuple[str, ...], decode: Decode) -> "ConnectedPool":
        """The same pool, whose responses end at some texts too."""
        if not strings or self.engine is None:
            return self
        return replace(self, engine=StoppingEngine(self.engine, strings, decode))

    def rest(self) -> None:
        """Ends sampling until the next push; all ranks must call it."""
        if self.shared is not None:
            self.shared.take_from_pool()


def connect_pool(config: RolloutConfig, policy: RoleModel, memory: HostMemory | None = None) -> ConnectedPool:
    """The configured pool, for pushes of one policy; all ranks must call it. No server is asked yet.

    Args:
        memory: where parts of the trainer wait while a pool on its GPUs samples; None: nothing does.

    Raises:
        UserError: on every rank, when no server is named or there is no proper token.
    """
    topology = policy.topology
    pool, token, host, failure = None, "", "", None
    try:
        token = _token(config)
        host = meeting_host(config.servers)
        if topology.is_replica_lead:
            pool = _pool(config, token, topology.is_lead)
    except UserError as raised:
        failure = raised
    topology.raise_together(failure, NoServersLeft)
    measured: Callable[[], Metrics] = dict if pool is None else pool.measured
    if not config.colocated:
        return ConnectedPool(pool, open_push(config, policy, pool, token, host), measured=measured)
    phases = PoolPhases()
    shared = SharedGpus(topology, pool, phases, token, config.sync_timeout_s, memory or HostMemory())
    push = open_push(config, policy, pool, token, host, phases, shared)
    return ConnectedPool(pool, push, shared, measured)


def _pool(config: RolloutConfig, token: str, is_lead: bool) -> VllmPool:
    return VllmPool(
        config.servers,
        token,
        config.request_timeout_s,
        config.retries,
        Liveness(config.probe_interval_s, config.probe_timeout_s),
        lambda line: say(line, is_lead),
    )


def _token(config: RolloutConfig) -> str:
    if config.token_file is None:
        raise RecipeError("rollout.token_file is not set; name the file that `rto pool` wrote")
    return read_token(config.token_file)


def meeting_host(servers: Sequence[str]) -> str:
    """The address at which senders and pool meet: loopback when all of them are on this machine.

    Otherwise it is this machine's address on the way to the first server, or to the first trainer machine, that
    is elsewhere.

    Raises:
        MachineError: there is no way to it, or its name is unknown.
    """
    elsewhere = [host for host in map(host_of, servers) if not is_loopback(host)]
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1"):
        elsewhere.append(os.environ["MASTER_ADDR"])
    if not elsewhere:
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((elsewhere[0], 9))  # picks the route, sends nothing
        except OSError as error:
            raise MachineError(
                f"this machine finds no way to {elsewhere[0]} ({error.strerror}); correct the address in "
                "rollout.servers, or name the machine by an address that this one reaches"
            ) from error
        return str(probe.getsockname()[0])


def open_push(
    config: RolloutConfig,
    policy: RoleModel,
    pool: VllmPool | None,
    token: str,
    host: str,
    phases: PoolPhases | None = None,
    shared: SharedGpus | None = None,
) -> PolicyPush:
    """The pushes of one policy; all ranks must call it.

    Args:
        host: where senders and servers meet; see `meeting_host`.
    """
    topology = policy.topology

    def share(text: str) -> list[str]:
        if config.colocated:
            topology.await_all()
        return topology.gather_all(text, str)

    source = PolicySource(policy)
    num_senders, own_run = num_places(topology), run_of(topology) if topology.holds_shard else None
    runs = range(topology.world_size // num_senders if config.colocated else 1)
    sync = WeightSync(
        source=source,
        ask=AskPushedServers(token, phases),
        part=PushPart(
            is_controller=topology.is_lead,
            sender=None if own_run is None or own_run not in runs else own_run * num_senders + source.sender,
            num_senders=len(runs) * num_senders,
        ),
        device=topology.device.torch_device,
        bucket_bytes=config.bucket_mb << 20,
        timeout_s=config.sync_timeout_s,
        share=share,
        host=host,
        is_shared=phases is not None,
    )
    tolerance = config.logprob_tolerance or CANARY_TOLERANCE[policy.dtype]
    return PolicyPush(policy, sync, pool, tolerance, shared)
