"""The controller's hand on the servers of a push: the same request to all of them, side by side, and who failed it."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from rto_megatron.errors import PoolError, UserError
from rto_megatron.generation.contract import AskServers, InferenceServer

_ANSWER_MARGIN_S = 15  # a server reports a time-out of its own before the request that carries it is given up
_PING_TIMEOUT_S = 10


class Servers:
    """Requests to servers, of which each takes part or fails by itself.

    Args:
        ask: of the engine that the servers run.
        timeout_s: limit of each phase of a push.

    Example:
        sizes, faults = Servers(ask, timeout_s=30.0).sizes(addresses)
    """

    def __init__(self, ask: AskServers, timeout_s: float) -> None:
        self._ask = ask
        self._timeout_s = timeout_s + _ANSWER_MARGIN_S

    def on_each(
        self, addresses: Sequence[str], call: Callable[[InferenceServer], object]
    ) -> dict[str, UserError]:
        """Does `call` for every server at the same time; address -> error of those that failed."""
        return self._ask(dict.fromkeys(addresses, self._timeout_s), call)

    def beside(
        self,
        action: Callable[[], None],
        addresses: Sequence[str],
        call: Callable[[InferenceServer], None],
        on_fault: Callable[[str], object],
    ) -> dict[str, UserError]:
        """Does `call` for every server and runs `action` meanwhile, as both sides wait for each other.

        Args:
            on_fault: told of each failure at once, from another thread, so that nobody waits for that server.

        Returns:
            address -> error of the servers that failed; what `action` raises passes through after all have answered.
        """

        def told(server: InferenceServer) -> None:
            try:
                call(server)
            except UserError as error:
                on_fault(str(error))
                raise

        with ThreadPoolExecutor(1, thread_name_prefix="weight-sync") as thread:
            faults = thread.submit(self.on_each, tuple(addresses), told)
            action()  # an error leaves once the thread has ended, and with it all answers
        return faults.result()

    def sizes(self, addresses: Sequence[str]) -> tuple[dict[str, int], dict[str, UserError]]:
        """Workers of each server, and the servers that did not say."""
        found: dict[str, int] = {}

        def count(server: InferenceServer) -> None:
            found[server.address] = server.num_workers()

        faults = self.on_each(addresses, count)
        return {address: found[address] for address in addresses if address in found}, faults

    def silent(self, addresses: Sequence[str]) -> dict[str, UserError]:
        """Those whose engine does not answer."""
        patience = min(_PING_TIMEOUT_S, self._timeout_s)
        return self._ask(dict.fromkeys(addresses, patience), lambda server: server.is_paused())


def require_version(server: InferenceServer, version: int) -> None:
    """Raises PoolError where a server holds another version."""
    held = server.weight_version()
    if held != str(version):
        raise PoolError(f"inference server {server.address} holds weight version {held}, expected {version}")
