"""Keeps which servers of a pool serve, and why the others do not."""

from collections.abc import Callable, Collection, Mapping, Sequence

from rto_megatron.errors import PoolError, RecipeError, UserError
from rto_megatron.generation.contract import NoServersLeft, StaleWeights

Announce = Callable[[str], None]


def silent(line: str) -> None:
    """Announces nothing."""


class Members:
    """The configured servers; each serves until it is taken out, and again after a push that it took part in.

    Args:
        servers: addresses such as http://127.0.0.1:8000.
        announce: receives one line for every server that goes or comes back.

    Raises:
        UserError: no server given.

    Example:
        Members(["http://127.0.0.1:8000"]).serving
    """

    def __init__(self, servers: Sequence[str], announce: Announce = silent) -> None:
        if not servers:
            raise RecipeError("rollout.servers is empty; start a pool (rto pool) and name its addresses")
        self.configured = tuple(servers)
        self._announce = announce
        self._out: dict[str, UserError] = {}

    @property
    def serving(self) -> tuple[str, ...]:
        """Those that may be asked for rollouts."""
        return tuple(address for address in self.configured if address not in self._out)

    @property
    def out(self) -> Mapping[str, str]:
        """Address -> last reason of those that may not."""
        return {address: str(failure) for address, failure in self._out.items()}

    def take_out(self, address: str, failure: UserError) -> None:
        """Ends the service of a server; of one that is out already it renews the reason."""
        is_news = address not in self._out
        self._out[address] = failure
        if is_news:
            self._announce(
                f"warning: {_named(address, failure)}; it is out until it takes part in a weight push"
            )

    def settle(self, serving: Collection[str], lost: Mapping[str, str]) -> None:
        """Takes the outcome of a push: these servers serve and no others.

        Args:
            lost: address -> reason of those that the push began with and dropped.
        """
        for address in self.configured:
            if address not in serving:
                known = self._out.get(address, PoolError("it took no part in the last weight push"))
                self.take_out(address, PoolError(lost[address]) if address in lost else known)
            elif self._out.pop(address, None) is not None:
                self._announce(f"inference server {address} serves again: it holds the pushed weights")

    def none_left(self) -> UserError:
        """The error to raise when `serving` is empty: StaleWeights where all are up and hold other weights."""
        reasons = "; ".join(_named(address, failure) for address, failure in self._out.items())
        are_stale = all(isinstance(failure, StaleWeights) for failure in self._out.values())
        kind = StaleWeights if are_stale else NoServersLeft
        return kind(f"no inference server is left to sample from: {reasons}")


def _named(address: str, failure: UserError) -> str:
    text = str(failure)
    return text if address in text else f"inference server {address}: {text}"
