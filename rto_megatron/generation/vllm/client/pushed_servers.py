"""vLLM's servers as a weight push asks them: the engine contract on the routes of its weight-transfer interface."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rto_megatron.errors import UserError
from rto_megatron.generation.contract import InferenceServer
from rto_megatron.generation.vllm.client.liveness import failures_of
from rto_megatron.generation.vllm.client.phases import PoolPhases
from rto_megatron.generation.vllm.client.server_client import Json, ServerClient


@dataclass(frozen=True)
class PushedServer:
    """One server during a push.

    Args:
        phases: of a pool on the trainer's GPUs; None: the pool has its own.

    Example:
        PushedServer(client).weight_version()
    """

    client: ServerClient
    phases: PoolPhases | None = None

    @property
    def address(self) -> str:
        """See `InferenceServer.address`."""
        return self.client.address

    def num_workers(self) -> int:
        """See `InferenceServer.num_workers`."""
        return self.client.num_workers()

    def is_paused(self) -> bool:
        """See `InferenceServer.is_paused`."""
        return self.client.is_paused()

    def pause(self) -> None:
        """See `InferenceServer.pause`."""
        self.client.request("POST", "/pause?mode=abort")

    def begin_push(self) -> None:
        """See `InferenceServer.begin_push`."""
        if self.phases is not None:
            self.phases.begin_push(self.client)
        self.pause()
        self.client.request("POST", "/collective_rpc", {"method": "leave_weight_update"})
        self.client.request("POST", "/start_weight_update")

    def join(self, rendezvous: str, first_rank: int, manifest: str) -> None:
        """See `InferenceServer.join`."""
        info: dict[str, Json] = {"rendezvous": rendezvous, "first_rank": first_rank, "manifest": manifest}
        self.client.request("POST", "/init_weight_transfer_engine", {"init_info": info})

    def receive(self, version: int) -> None:
        """See `InferenceServer.receive`."""
        self.client.request("POST", "/update_weights", {"update_info": {"version": version}})

    def commit(self, version: int) -> None:
        """See `InferenceServer.commit`."""
        self.client.request("POST", "/finish_weight_update", {"weight_version": str(version)})

    def weight_version(self) -> str:
        """See `InferenceServer.weight_version`."""
        return self.client.weight_version()

    def serve(self, version: int) -> None:
        """See `InferenceServer.serve`."""
        if self.phases is not None:
            self.phases.end_push(self.client, version)
        else:
            self.client.request("POST", "/resume")

    def prompt_logprobs(self, token_ids: list[int]) -> list[float]:
        """See `InferenceServer.prompt_logprobs`."""
        return self.client.prompt_logprobs(token_ids)


@dataclass(frozen=True)
class AskPushedServers:
    """See `AskServers`.

    Args:
        token: the pool's bearer token.
        phases: see `PushedServer`.

    Example:
        faults = AskPushedServers(token)(dict.fromkeys(addresses, 30.0), PushedServer.pause)
    """

    token: str
    phases: PoolPhases | None = None

    def __call__(
        self, timeouts: Mapping[str, float], question: Callable[[InferenceServer], object]
    ) -> dict[str, UserError]:
        """See `AskServers.__call__`."""
        return failures_of(timeouts, self.token, lambda client: question(PushedServer(client, self.phases)))
