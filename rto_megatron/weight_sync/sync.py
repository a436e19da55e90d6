"""The weight push: pause the pool, move the policy's weights, prove them, commit, resume; then a canary.

Every rank of the trainer calls `WeightSync.push`. The controller drives the servers over HTTP, the senders
broadcast, the rest only learns how it ended. Whatever fails before the commit leaves the pool paused with
the weights it had.
"""

import math
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from rto_megatron.errors import UserError
from rto_megatron.rollout.client import Json, RefusedError, ServerClient
from rto_megatron.weight_sync.manifest import Manifest, WeightSource
from rto_megatron.weight_sync.sender import send
from rto_megatron.weight_sync.transport import LOOPBACK, Communicator, Rendezvous, listen

_ANSWER_MARGIN_S = 15  # a server reports a time-out of its own before the request that carries it is given up


@dataclass(frozen=True)
class SyncPlace:
    """What one trainer rank does in a push.

    Args:
        is_controller: drives the servers; exactly one rank, and it is sender 0.
        stage: pipeline stage whose tensors the rank gathers, which is its sender index; None outside
            data-parallel replica 0.
        sends: broadcasts the stage's tensors; its tensor-parallel rank 0 only.
    """

    is_controller: bool
    stage: int | None
    sends: bool


@dataclass(frozen=True)
class Synchronise:
    """Collectives over all trainer ranks, handed in so that this package needs no process group of theirs.

    Args:
        all_raise: raises on every rank if any rank passes an error text; None means fine.
        broadcast: returns the controller's text on every rank.
    """

    all_raise: Callable[[str | None], None]
    broadcast: Callable[[str], str]


@dataclass(frozen=True)
class PushTimes:
    """Seconds of a push as seen by one rank."""

    pause_s: float
    prepare_s: float
    commit_s: float
    num_bytes: int


class WeightSync:
    """The trainer's end of weight pushes to a pool.

    Args:
        source: the policy's weights.
        servers: addresses of the pool.
        token: the pool's bearer token.
        place: this rank's part.
        num_senders: pipeline stages.
        device: of the wire: a cuda device for NCCL, cpu for gloo. NCCL refuses two ranks on one GPU, so a
            pool that shares the trainer's GPU takes cpu.
        bucket_bytes: size of a broadcast; workers need it twice on `device`.
        timeout_s: limit of each phase, and of each broadcast.
        together: collectives over all trainer ranks.
        host: this machine's address as the servers reach it; loopback keeps all of it on this machine.
    """

    def __init__(
        self,
        source: WeightSource,
        servers: Sequence[str],
        token: str,
        place: SyncPlace,
        num_senders: int,
        device: torch.device,
        bucket_bytes: int,
        timeout_s: float,
        together: Synchronise,
        host: str = LOOPBACK,
    ) -> None:
        assert not place.is_controller or (place.stage == 0 and place.sends), "the controller is sender 0"
        assert not place.sends or place.stage is not None, "a sender has a stage"
        self._source = source
        self._place = place
        self._num_senders = num_senders
        self._device = device
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._together = together
        self._host = host
        self._communicator: Communicator | None = None
        addresses = servers if place.is_controller else ()
        self._clients = [ServerClient(address, token, timeout_s + _ANSWER_MARGIN_S) for address in addresses]
        self._threads = ThreadPoolExecutor(max(1, len(self._clients)), thread_name_prefix="weight-sync")

    def push(self, version: int) -> PushTimes:
        """Makes the pool hold the source's present weights as `version`. Called by all trainer ranks.

        Raises:
            UserError: (from `all_raise`) on every rank, with the phase and what differed. The pool is then
                paused and refuses to generate until a later push succeeds.
        """
        manifest = Manifest(version, self._bucket_bytes, self._source.specs())
        started = time.monotonic()
        succeeded = False
        try:
            self._phase(manifest, "pausing the pool", self._pause)
            self._open()
            paused = time.monotonic()
            self._phase(manifest, "sending", lambda: self._prepare(manifest))
            prepared = time.monotonic()
            self._phase(manifest, "loading", lambda: self._commit(version))
            self._phase(manifest, "resuming", lambda: self._post_all("/resume"))
            succeeded = True
        finally:
            if not succeeded:
                self._communicator = None
        committed = time.monotonic()
        num_bytes = sum(spec.num_bytes for spec in manifest.specs)
        return PushTimes(paused - started, prepared - paused, committed - prepared, num_bytes)

    def canary(
        self,
        version: int,
        token_ids: Sequence[int],
        expected_logprobs: Sequence[float] | None,
        tolerance: float,
    ) -> None:
        """Proves that every server computes what the trainer computes. Called by all trainer ranks.

        Args:
            version: the version just pushed.
            token_ids: a fixed sequence.
            expected_logprobs: the trainer's log-probs of token_ids[1:] in nats; used on the controller only.
            tolerance: largest difference in nats.

        Raises:
            UserError: (from `all_raise`) with the numbers; the pool is paused.
        """

        def check() -> None:
            if not self._place.is_controller:
                return
            assert expected_logprobs is not None and len(expected_logprobs) == len(token_ids) - 1
            try:
                self._on_all(
                    lambda client: _check_canary(client, version, token_ids, expected_logprobs, tolerance)
                )
            except UserError:
                self._post_all("/pause?mode=abort")
                raise

        self._all_or_none(f"canary of weight version {version} failed, the pool is paused: ", check)

    def close(self) -> None:
        """Leaves the communicator and closes the connections."""
        self._communicator = None
        for client in self._clients:
            client.close()
        self._threads.shutdown(wait=False)

    def _phase(self, manifest: Manifest, doing: str, action: Callable[[], None]) -> None:
        failed = f"push of weight version {manifest.version} failed while {doing}"
        self._all_or_none(f"{failed}; the pool is paused until a push succeeds: ", action)

    def _all_or_none(self, prefix: str, action: Callable[[], None]) -> None:
        fault = None
        try:
            action()
        except (ValueError, RuntimeError, OSError) as error:
            fault = f"{prefix}{error}"
        self._together.all_raise(fault)

    def _pause(self) -> None:
        def pause(client: ServerClient) -> None:
            client.request("POST", "/pause?mode=abort")
            try:
                client.request("POST", "/start_weight_update")
            except RefusedError:
                # A trainer that died between start and commit left its session open; an abort, which always answers
                # with an error, closes it.
                _abort_session(client)
                client.request("POST", "/start_weight_update")

        self._on_all(pause)

    def _open(self) -> None:
        """Opens a communicator for the first push and after a failed one: all ranks have one or none has."""
        needs_one = self._place.sends and self._communicator is None
        listener = None
        meeting_text = ""
        sizes: list[int] = []
        fault = None
        if self._place.is_controller and needs_one:
            try:
                sizes = [client.num_workers() for client in self._clients]
                listener = listen(self._host)
            except (UserError, OSError) as error:
                fault = f"cannot open the weight transfer: {error}"
        self._together.all_raise(fault)
        if listener is not None:
            meeting_text = Rendezvous(
                host=self._host,
                port=listener.getsockname()[1],
                world_size=self._num_senders + sum(sizes),
                name=secrets.token_hex(8),
                timeout_s=self._timeout_s,
                device_type=self._device.type,
            ).to_json()
        meeting_text = self._together.broadcast(meeting_text)
        self._all_or_none(
            "cannot open the weight transfer, the pool is paused: ",
            lambda: self._join(meeting_text, sizes, listener),
        )

    def _join(self, meeting_text: str, sizes: Sequence[int], listener: socket.socket | None) -> None:
        if not self._place.sends or self._communicator is not None:
            return
        assert self._place.stage is not None
        first_ranks = [self._num_senders + sum(sizes[:index]) for index in range(len(sizes))]
        bodies: list[dict[str, Json]] = [
            {"init_info": {"rendezvous": meeting_text, "first_rank": rank}} for rank in first_ranks
        ]
        # Concurrently: each worker waits inside for all others, and so does this rank.
        answers = [
            self._threads.submit(client.request, "POST", "/init_weight_transfer_engine", body)
            for client, body in zip(self._clients, bodies, strict=True)
        ]
        meeting = Rendezvous.from_json(meeting_text)
        _with_answers(
            lambda: self._set_communicator(
                Communicator(meeting, self._place.stage or 0, self._device, listener)
            ),
            answers,
        )

    def _set_communicator(self, communicator: Communicator) -> None:
        self._communicator = communicator

    def _prepare(self, manifest: Manifest) -> None:
        body: dict[str, Json] = {"update_info": {"manifest": manifest.to_json()}}
        answers = [
            self._threads.submit(client.request, "POST", "/update_weights", body) for client in self._clients
        ]
        _with_answers(lambda: self._gather_and_send(manifest), answers)

    def _gather_and_send(self, manifest: Manifest) -> None:
        if self._place.stage is None:
            return
        tensors = self._source.tensors(self._place.stage)
        try:
            if self._place.sends:
                assert self._communicator is not None
                send(manifest, tensors, self._communicator)
        finally:
            # The stage's tensor-parallel ranks gather in step: one that stopped early would hang the others.
            for _ in tensors:
                pass

    def _commit(self, version: int) -> None:
        self._on_all(
            lambda client: client.request("POST", "/finish_weight_update", {"weight_version": str(version)})
        )

        def check(client: ServerClient) -> None:
            held = client.weight_version()
            if held != str(version):
                raise UserError(
                    f"inference server {client.address} reports version {held} after loading {version}"
                )

        self._on_all(check)

    def _post_all(self, route: str) -> None:
        self._on_all(lambda client: client.request("POST", route))

    def _on_all(self, call: Callable[[ServerClient], object]) -> None:
        _with_answers(lambda: None, [self._threads.submit(call, client) for client in self._clients])


def canary_token_ids(vocab_size: int, length: int = 48) -> tuple[int, ...]:
    """A fixed sequence that visits scattered rows of the embedding."""
    return tuple((7 * position * position + 13 * position + 5) % vocab_size for position in range(length))


def _with_answers(
    action: Callable[[], None], answers: Sequence[Future[object]] | Sequence[Future[dict[str, Json]]]
) -> None:
    """Runs `action` while servers answer; raises one error with everything that went wrong on either side."""
    faults = []
    try:
        action()
    except (ValueError, RuntimeError, OSError) as error:
        faults.append(str(error))
    for answer in answers:
        try:
            answer.result()
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("; ".join(faults))


def _abort_session(client: ServerClient) -> None:
    try:
        client.request("POST", "/update_weights", {"update_info": {"abort": True}})
    except RefusedError:
        return


def _check_canary(
    client: ServerClient, version: int, token_ids: Sequence[int], expected: Sequence[float], tolerance: float
) -> None:
    held = client.weight_version()
    if held != str(version):
        raise UserError(f"inference server {client.address} holds weight version {held}, expected {version}")
    got = client.prompt_logprobs(list(token_ids))
    differences = [abs(ours - theirs) for ours, theirs in zip(expected, got, strict=True)]
    # Written so that a NaN fails.
    if not all(difference <= tolerance for difference in differences):
        worst = max(
            range(len(differences)),
            key=lambda at: math.inf if math.isnan(differences[at]) else differences[at],
        )
        mean = sum(differences) / len(differences)
        raise UserError(
            f"inference server {client.address} computes other log-probs than the trainer: mean difference {mean:.4f}, "
            f"largest {differences[worst]:.4f} nats (trainer {expected[worst]:.4f}, server {got[worst]:.4f}) at canary "
            f"token {worst + 1}, tolerance {tolerance} (rollout.logprob_tolerance)"
        )
