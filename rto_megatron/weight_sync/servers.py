"""The controller's hand on the servers of a push: the same request to all of them, side by side, and who failed it."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from rto_megatron.errors import UserError
from rto_megatron.rollout.client import Json, RefusedError, ServerClient

_ANSWER_MARGIN_S = 15  # a server reports a time-out of its own before the request that carries it is given up
_PING_TIMEOUT_S = 10

Answers = dict[str, Future[object]]


class Servers:
    """Requests to servers, of which each takes part or fails by itself.

    Args:
        token: the pool's bearer token.
        timeout_s: limit of each phase of a push.
    """

    def __init__(self, token: str, timeout_s: float) -> None:
        self._token = token
        self._timeout_s = timeout_s + _ANSWER_MARGIN_S

    def on_each(
        self, addresses: Sequence[str], call: Callable[[ServerClient], object]
    ) -> dict[str, UserError]:
        """Does `call` for every server at the same time; address -> error of those that failed."""
        with ThreadPoolExecutor(max(1, len(addresses)), thread_name_prefix="weight-sync") as threads:
            return faults_of({a: threads.submit(self._one, a, call) for a in addresses})

    def beside(
        self,
        action: Callable[[], None],
        bodies: Mapping[str, tuple[str, dict[str, Json]]],
        on_fault: Callable[[str], None],
    ) -> dict[str, UserError]:
        """Posts to every server and runs `action` while they answer, as both sides wait for each other.

        Args:
            bodies: address -> (route, body).
            on_fault: told of each failure at once, from another thread, so that nobody waits for that server.

        Returns:
            address -> error of the servers that failed; what `action` raises passes through after all have answered.
        """
        with ThreadPoolExecutor(max(1, len(bodies)), thread_name_prefix="weight-sync") as threads:
            answers: Answers = {
                address: threads.submit(self._one, address, _post(*body)) for address, body in bodies.items()
            }
            for answer in answers.values():
                answer.add_done_callback(lambda done: _tell(done, on_fault))
            try:
                action()
            finally:
                wait(answers.values())
            return faults_of(answers)

    def sizes(self, addresses: Sequence[str]) -> tuple[dict[str, int], dict[str, UserError]]:
        """Workers of each server, and the servers that did not say."""
        found: dict[str, int] = {}
        faults = self.on_each(
            addresses, lambda client: found.__setitem__(client.address, client.num_workers())
        )
        return {address: found[address] for address in addresses if address in found}, faults

    def silent(self, addresses: Sequence[str]) -> dict[str, UserError]:
        """Those whose engine does not answer."""
        patience = min(_PING_TIMEOUT_S, self._timeout_s)
        return self.on_each(addresses, lambda client: client.request("GET", "/is_paused", timeout_s=patience))

    def _one(self, address: str, call: Callable[[ServerClient], object]) -> object:
        with ServerClient(address, self._token, self._timeout_s) as client:
            return call(client)


def begin(client: ServerClient) -> None:
    """Pauses a server and opens a weight update, whatever an earlier trainer left behind.

    Raises:
        UserError: it did not.
    """
    client.request("POST", "/pause?mode=abort")
    try:
        client.request("POST", "/start_weight_update")
    except RefusedError:
        # A trainer that died between start and commit left its session open; an abort, which always answers
        # with an error, closes it.
        _abort_session(client)
        client.request("POST", "/start_weight_update")


def require_version(client: ServerClient, version: int) -> None:
    """Raises UserError where a server holds another version."""
    held = client.weight_version()
    if held != str(version):
        raise UserError(f"inference server {client.address} holds weight version {held}, expected {version}")


def faults_of(answers: Answers) -> dict[str, UserError]:
    """Address -> error; waits for all."""
    faults = {}
    for address, answer in answers.items():
        error = answer.exception()
        if isinstance(error, UserError):
            faults[address] = error
        elif error is not None:
            raise error
    return faults


def _post(route: str, body: dict[str, Json]) -> Callable[[ServerClient], object]:
    return lambda client: client.request("POST", route, body)


def _tell(done: Future[object], on_fault: Callable[[str], None]) -> None:
    error = done.exception()
    if error is not None:
        on_fault(str(error))


def _abort_session(client: ServerClient) -> None:
    try:
        client.request("POST", "/update_weights", {"update_info": {"abort": True}})
    except RefusedError:
        return
