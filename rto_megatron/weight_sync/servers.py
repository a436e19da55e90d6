"""The controller's hand on the servers of a push: the same request to all of them, side by side, and who failed it."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from rto_megatron.errors import UserError
from rto_megatron.generation.vllm.client.liveness import failures_of
from rto_megatron.generation.vllm.client.server_client import Json, ServerClient

_ANSWER_MARGIN_S = 15  # a server reports a time-out of its own before the request that carries it is given up
_PING_TIMEOUT_S = 10


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
        return failures_of(dict.fromkeys(addresses, self._timeout_s), self._token, call)

    def beside(
        self,
        action: Callable[[], None],
        route: str,
        bodies: Mapping[str, Mapping[str, Json]],
        on_fault: Callable[[str], object],
    ) -> dict[str, UserError]:
        """Posts to every server and runs `action` while they answer, as both sides wait for each other.

        Args:
            bodies: address -> what is posted to it.
            on_fault: told of each failure at once, from another thread, so that nobody waits for that server.

        Returns:
            address -> error of the servers that failed; what `action` raises passes through after all have answered.
        """

        def post(client: ServerClient) -> None:
            try:
                client.request("POST", route, bodies[client.address])
            except UserError as error:
                on_fault(str(error))
                raise

        with ThreadPoolExecutor(1, thread_name_prefix="weight-sync") as thread:
            faults = thread.submit(self.on_each, tuple(bodies), post)
            action()  # an error leaves once the thread has ended, and with it all answers
        return faults.result()

    def sizes(self, addresses: Sequence[str]) -> tuple[dict[str, int], dict[str, UserError]]:
        """Workers of each server, and the servers that did not say."""
        found: dict[str, int] = {}

        def count(client: ServerClient) -> None:
            found[client.address] = client.num_workers()

        faults = self.on_each(addresses, count)
        return {address: found[address] for address in addresses if address in found}, faults

    def silent(self, addresses: Sequence[str]) -> dict[str, UserError]:
        """Those whose engine does not answer."""
        patience = min(_PING_TIMEOUT_S, self._timeout_s)
        return failures_of(dict.fromkeys(addresses, patience), self._token, ServerClient.is_paused)


def begin(client: ServerClient) -> None:
    """Pauses a server and opens a weight update, whatever an earlier trainer left behind.

    Raises:
        UserError: it did not.
    """
    client.request("POST", "/pause?mode=abort")
    client.request("POST", "/collective_rpc", {"method": "leave_weight_update"})
    client.request("POST", "/start_weight_update")


def require_version(client: ServerClient, version: int) -> None:
    """Raises UserError where a server holds another version."""
    held = client.weight_version()
    if held != str(version):
        raise UserError(f"inference server {client.address} holds weight version {held}, expected {version}")
