"""The weight push: pause the pool, move the policy's weights, prove them, commit, prove again, resume.

Every rank of the trainer calls `WeightSync.push`. The controller drives the servers over HTTP, the senders
broadcast, the rest only learns how it ended. A server that fails is dropped, paused, and the push goes on with the
others. Whatever fails before the commit leaves a server with the weights it had.
"""

import gc
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from rto_megatron.errors import PoolError, UserError
from rto_megatron.generation.contract import AskServers, InferenceServer, NoServersLeft, Unreachable
from rto_megatron.weight_sync.canary import Canary, check_canary
from rto_megatron.weight_sync.control_channel import TransportError
from rto_megatron.weight_sync.manifest import Manifest, PieceSource
from rto_megatron.weight_sync.sender import Sender
from rto_megatron.weight_sync.servers import Servers, require_version
from rto_megatron.weight_sync.shared import OpenEnd, open_communicator
from rto_megatron.weight_sync.transport import (
    LOOPBACK,
    Communicator,
    DisagreementError,
    Rendezvous,
    listen,
)

# every trainer rank's text, by rank, on every rank; all ranks must call it
Share = Callable[[str], list[str]]


@dataclass(frozen=True)
class PushPart:
    """What one trainer rank does in a push.

    Args:
        is_controller: drives the servers; exactly one rank, trainer rank 0, and it is sender 0.
        sender: the rank's index among the senders; None where it sends nothing.
        num_senders: of all trainer ranks.

    Example:
        PushPart(is_controller=True, sender=0, num_senders=4)
    """

    is_controller: bool
    sender: int | None
    num_senders: int


@dataclass(frozen=True)
class PushTimes:
    """Seconds of a push as seen by one rank, failed attempts included, and what was moved.

    Example:
        PushTimes(pause_s=0.01, prepare_s=0.9, commit_s=1.2, canary_s=0.2, num_bytes=800_000_000)
    """

    pause_s: float
    prepare_s: float
    commit_s: float
    canary_s: float
    num_bytes: int


@dataclass(frozen=True)
class PushReport:
    """How a push ended; equal on all ranks but for the times.

    Args:
        serving: addresses that hold the version, proved.
        lost: address -> reason of those that were dropped.

    Example:
        PushReport(("http://10.0.0.2:8000",), {}, PushTimes(0.01, 0.9, 1.2, 0.2, 800_000_000))
    """

    serving: tuple[str, ...]
    lost: Mapping[str, str]
    times: PushTimes


class WeightSync:
    """The trainer's end of weight pushes to a pool.

    Args:
        source: the policy's weights.
        ask: asks the servers of the engine that the pool runs.
        part: what this rank does.
        device: of the wire: a cuda device for NCCL, cpu for gloo. NCCL refuses two ranks on one GPU.
        bucket_bytes: size of a broadcast; both ends need it twice on `device`.
        timeout_s: limit of each phase, and of each broadcast.
        share: collective over all trainer ranks.
        host: this machine's address as the servers reach it; loopback keeps all of it on this machine.
        is_shared: the pool is on the trainer's GPUs; buckets then travel through shared memory, and every trainer
            rank is a sender.
        open_end: makes a sender's end of the wire.

    Example:
        times = sync.push(version=3, servers=servers, canary=canary)
    """

    def __init__(
        self,
        source: PieceSource,
        ask: AskServers,
        part: PushPart,
        device: torch.device,
        bucket_bytes: int,
        timeout_s: float,
        share: Share,
        host: str = LOOPBACK,
        is_shared: bool = False,
        open_end: OpenEnd = open_communicator,
    ) -> None:
        assert not part.is_controller or part.sender == 0, "the controller is sender 0"
        self._source = source
        self._manifest = Manifest(bucket_bytes, source.specs())
        self._part = part
        self._device = device
        self._timeout_s = timeout_s
        self._share = share
        self._host = host
        self._is_shared = is_shared
        self._open_end = open_end
        self._servers = Servers(ask, timeout_s)
        self._communicator: Communicator | None = None
        self._sender: Sender | None = None
        self._members: dict[str, int] = {}  # on the controller: address -> workers, in rank order
        self._lost: dict[str, str] = {}
        self._seconds: dict[str, float] = {}

    def push(
        self,
        version: int,
        servers: Sequence[str],
        canary: Canary,
        before_serving: Callable[[], None] | None = None,
    ) -> PushReport:
        """Makes servers hold the source's present weights as `version`. Called by all trainer ranks.

        Args:
            servers: addresses; used on the controller.
            canary: what every server must compute afterwards; used on the controller.
            before_serving: called when all weights are loaded, before a server gets its cache; meets all ranks.

        Raises:
            NoServersLeft: on every rank; no server came through. All are paused and refuse to generate.
            PoolError: on every rank; the trainer's own side is at fault.
        """
        remaining = tuple(json.loads(self._share(json.dumps(list(servers)))[0]))
        self._lost, self._seconds = {}, {}
        num_fruitless = 0
        while True:
            known = len(self._lost)
            is_done = self._attempt(version, remaining, canary, before_serving)
            remaining = tuple(address for address in remaining if address not in self._lost)
            if not remaining:
                reasons = "; ".join(self._lost.values())
                raise NoServersLeft(
                    f"push of weight version {version} failed, no inference server is left, all stay paused: {reasons}"
                )
            if is_done:
                break
            num_fruitless += len(self._lost) == known
            if num_fruitless > 1:
                raise PoolError(
                    f"push of weight version {version} failed twice with no server at fault; the pool is paused"
                )
        pause_s, prepare_s, commit_s, canary_s = (
            self._seconds.get(phase, 0.0) for phase in ("pausing", "sending", "loading", "proving")
        )
        times = PushTimes(pause_s, prepare_s, commit_s, canary_s, self._manifest.num_bytes)
        return PushReport(remaining, dict(self._lost), times)

    def close(self) -> None:
        """Leaves the communicator."""
        self._leave()

    def _attempt(
        self,
        version: int,
        servers: tuple[str, ...],
        canary: Canary,
        before_serving: Callable[[], None] | None,
    ) -> bool:
        """One try at a push to all servers that are left; False where it must be tried again without some."""
        with self._timed("pausing"):
            self._phase(version, "pausing the pool", lambda: self._pause(servers))
            left = tuple(address for address in servers if address not in self._lost)
            if not left or not self._open(version, left):
                return False
        with self._timed("sending"):
            if not self._phase(version, "sending", lambda: self._send(version)):
                return False
        with self._timed("loading"):
            if not self._phase(version, "loading", lambda: self._commit(version)):
                return False
        if before_serving is not None:
            before_serving()
        with self._timed("proving"):
            self._phase(version, "proving", lambda: self._prove(version, left, canary))
        return True

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - started

    def _phase(self, version: int, doing: str, action: Callable[[], dict[str, UserError]]) -> bool:
        """Runs `action` on every rank; True on all where it succeeded everywhere. Notes the servers that are lost.

        Args:
            action: returns the servers that failed, which only the controller can see.
        """
        faults: dict[str, UserError] = {}
        kind: Literal["fine", "own", "shared"] = "fine"
        text = ""
        blamed: tuple[int, ...] = ()
        try:
            faults = action()
        except DisagreementError as error:
            is_own = any(rank < self._part.num_senders for rank in error.ranks)
            kind, text, blamed = "own" if is_own else "shared", str(error), error.ranks
        except TransportError as error:
            kind, text = "shared", str(error)
        except (ValueError, RuntimeError, OSError) as error:
            kind, text = "own", str(error)
        lost: dict[str, str] = {}
        if self._part.is_controller and kind == "shared":
            lost = self._guilty(text, blamed)
        elif self._part.is_controller:
            lost = {address: str(fault) for address, fault in faults.items()}
        lost = {address: f"{reason} (while {doing})" for address, reason in lost.items()}
        said = [json.loads(one) for one in self._share(json.dumps([kind, text, bool(faults), lost]))]
        self._lost |= said[0][3]
        has_failed = any(one[0] != "fine" or one[2] for one in said)
        if has_failed:
            self._leave()
            gc.collect()  # an error and the frames of its traceback keep each other, and the communicator
        own = [one[1] for one in said if one[0] == "own"]
        if own:
            raise PoolError(
                f"push of weight version {version} failed while {doing}; the pool is paused until a push succeeds: "
                f"{own[0]}"
            )
        return not has_failed

    def _guilty(self, text: str, ranks: Sequence[int]) -> dict[str, str]:
        """The servers to drop after an error that all ranks report, each with its reason.

        Args:
            ranks: of the workers that differ; none where the communicator was lost.
        """
        if ranks:
            owners = [address for address, size in self._members.items() for _ in range(size)]
            guilty = {owners[rank - self._part.num_senders] for rank in ranks}
            return {address: f"inference server {address}: {text}" for address in guilty}
        # Who lost the communicator does not answer any more.
        return {address: str(fault) for address, fault in self._servers.silent(tuple(self._members)).items()}

    def _pause(self, servers: Sequence[str]) -> dict[str, UserError]:
        if not self._part.is_controller:
            return {}

        return self._servers.on_each(servers, lambda server: server.begin_push())

    def _open(self, version: int, servers: tuple[str, ...]) -> bool:
        """Opens a communicator with these servers unless there is one: all ranks have one or none has."""
        listener = None
        meeting = ""
        faults: dict[str, UserError] = {}
        if self._part.is_controller and (self._communicator is None or tuple(self._members) != servers):
            self._members, faults = self._servers.sizes(servers)
            if not faults:
                listener = listen(self._host)
                meeting = Rendezvous(
                    host=self._host,
                    port=listener.getsockname()[1],
                    num_senders=self._part.num_senders,
                    world_size=self._part.num_senders + sum(self._members.values()),
                    name=secrets.token_hex(8),
                    timeout_s=self._timeout_s,
                    device_type=self._device.type,
                    wire="shared" if self._is_shared else "network",
                ).to_json()
        if not self._phase(version, "counting workers", lambda: faults):
            return False
        meeting = self._share(meeting)[0]
        if not meeting:
            return True
        self._leave()

        def join() -> dict[str, UserError]:
            if self._part.sender is None:
                return {}
            communicator = self._open_end(
                Rendezvous.from_json(meeting), self._part.sender, self._device, listener
            )

            def joined() -> None:
                communicator.join()
                self._communicator, self._sender = communicator, Sender(self._manifest, communicator)

            return self._beside(joined, self._joins(meeting), communicator)

        return self._phase(version, "opening the weight transfer", join)

    def _joins(self, meeting: str) -> Callable[[InferenceServer], None]:
        first_ranks, rank = {}, self._part.num_senders
        for address, size in self._members.items():
            first_ranks[address] = rank
            rank += size
        manifest = self._manifest.to_json()
        return lambda server: server.join(meeting, first_ranks[server.address], manifest)

    def _send(self, version: int) -> dict[str, UserError]:
        sender, own = self._sender, self._part.sender
        if sender is None or own is None:
            return {}
        has_pieces = any(spec.sender == own for spec in self._manifest.specs)
        pieces = self._source.pieces(own) if has_pieces else iter(())
        return self._beside(lambda: sender.send(version, pieces), lambda server: server.receive(version))

    def _commit(self, version: int) -> dict[str, UserError]:
        sender = self._sender
        if sender is None:
            return {}
        faults = self._beside(sender.confirm, lambda server: server.commit(version))
        if not self._part.is_controller or faults:
            return faults
        return self._servers.on_each(tuple(self._members), lambda server: require_version(server, version))

    def _beside(
        self,
        action: Callable[[], None],
        call: Callable[[InferenceServer], None],
        communicator: Communicator | None = None,
    ) -> dict[str, UserError]:
        communicator = communicator or self._communicator
        assert communicator is not None
        if not self._part.is_controller:
            _or_abort(action, communicator)
            return {}
        shared: TransportError | DisagreementError | None = None

        def act() -> None:
            nonlocal shared
            try:
                _or_abort(action, communicator)
            except (TransportError, DisagreementError) as error:
                shared = error.with_traceback(None)  # a traceback would keep the communicator alive

        faults = self._servers.beside(act, tuple(self._members), call, communicator.abort)
        if shared is None:
            return faults
        # The servers that are up only report the loss of the others.
        gone: dict[str, UserError] = {
            a: fault for a, fault in faults.items() if isinstance(fault, Unreachable)
        }
        if isinstance(shared, DisagreementError) or not gone:
            raise shared
        return gone

    def _prove(self, version: int, servers: Sequence[str], canary: Canary) -> dict[str, UserError]:
        if not self._part.is_controller:
            return {}

        def prove(server: InferenceServer) -> None:
            server.serve(version)
            try:
                check_canary(server, canary)
            except UserError:
                server.pause()
                raise

        return self._servers.on_each(servers, prove)

    def _leave(self) -> None:
        # The group goes with the last reference.
        self._communicator, self._sender = None, None


def _or_abort(action: Callable[[], None], communicator: Communicator) -> None:
    """Runs `action`; where it fails on this rank alone, no other rank waits for this one."""
    try:
        action()
    except (TransportError, DisagreementError):
        raise
    except (ValueError, RuntimeError, OSError) as error:
        communicator.give_up(f"a trainer rank failed: {error}")
        raise
