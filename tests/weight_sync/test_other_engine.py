"""A push needs nothing of an engine but its contract: an engine of Hugging Face models, in this process, passes."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pool_server import tiny_llama
from trainer_ranks import Meeting, ModelSource, canary_of
from transformers import LlamaForCausalLM

from rto_megatron.errors import UserError
from rto_megatron.generation.contract import InferenceServer, NoServersLeft
from rto_megatron.generation.vllm.worker.receiver import Receiver, Staged
from rto_megatron.generation.vllm.worker.regions import whole
from rto_megatron.weight_sync.manifest import Manifest
from rto_megatron.weight_sync.push import PushPart, PushReport, WeightSync
from rto_megatron.weight_sync.sender import agree_on_manifest
from rto_megatron.weight_sync.transport import Communicator, Rendezvous

CPU = torch.device("cpu")


class HfServer:
    """Serves a Hugging Face model with one worker, the thread that asks; a spoilt one computes with other weights."""

    def __init__(self, address: str, is_spoilt: bool = False) -> None:
        self.address = address
        self.model: LlamaForCausalLM = tiny_llama(99)
        self.is_serving = False
        self._is_spoilt = is_spoilt
        self._version = "default"
        self._communicator: Communicator | None = None
        self._manifest = Manifest(0, ())
        self._staged: Staged | None = None

    def num_workers(self) -> int:
        return 1

    def is_paused(self) -> bool:
        return not self.is_serving

    def pause(self) -> None:
        self.is_serving = False

    def begin_push(self) -> None:
        self.pause()
        self._staged = None

    def join(self, rendezvous: str, first_rank: int, manifest: str) -> None:
        self._manifest = Manifest.from_json(manifest)
        self._communicator = Communicator(Rendezvous.from_json(rendezvous), first_rank, CPU)
        self._communicator.join()

    def receive(self, version: int) -> None:
        assert self._communicator is not None
        needs = {name: (whole(spec.shape),) for name, spec in self._manifest.tensors().items()}
        agree_on_manifest(self._manifest, version, self._communicator, None)
        self._staged = Receiver(self._manifest, needs, self._communicator).receive(version)

    def commit(self, version: int) -> None:
        assert self._communicator is not None and self._staged is not None
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in self._staged.tensors(self._manifest.tensors()):
                parameters[name].copy_(2 * value if self._is_spoilt and "lm_head" in name else value)
        self._communicator.agree(None, self._staged.token)
        self._version = str(version)

    def weight_version(self) -> str:
        return self._version

    def serve(self, version: int) -> None:
        assert self._version == str(version)
        self.is_serving = True

    @torch.no_grad()
    def prompt_logprobs(self, token_ids: list[int]) -> list[float]:
        tokens = torch.tensor([token_ids])
        logp = self.model(tokens).logits[0, :-1].log_softmax(-1)
        return logp.gather(1, tokens[0, 1:, None])[:, 0].tolist()


class AskHfServers:
    """Asks them side by side, as `AskServers` says."""

    def __init__(self, servers: list[HfServer]) -> None:
        self._servers = {server.address: server for server in servers}

    def __call__(
        self, timeouts: Mapping[str, float], question: Callable[[InferenceServer], object]
    ) -> dict[str, UserError]:
        def fault_of(address: str) -> UserError | None:
            try:
                question(self._servers[address])
            except UserError as error:
                return error
            return None

        with ThreadPoolExecutor(max(1, len(timeouts))) as threads:
            faults = zip(timeouts, threads.map(fault_of, timeouts), strict=True)
            return {address: fault for address, fault in faults if fault is not None}


def _push(servers: list[HfServer], trained: LlamaForCausalLM, versions: range) -> list[PushReport]:
    """From two senders, each a stage of the model."""
    source, meeting, ask = ModelSource(trained, num_stages=2), Meeting(2), AskHfServers(servers)
    syncs = [
        WeightSync(source, ask, PushPart(rank == 0, rank, 2), CPU, 64 << 10, 20, meeting.of_rank(rank))
        for rank in range(2)
    ]
    reports = []
    addresses = tuple(server.address for server in servers)
    for version in versions:
        with ThreadPoolExecutor(2) as threads:
            ends = [
                threads.submit(sync.push, version, addresses if rank == 0 else (), canary_of(trained))
                for rank, sync in enumerate(syncs)
            ]
        reports.append(ends[0].result())
    for sync in syncs:
        sync.close()
    return reports


def test_every_server_holds_the_trained_weights_and_serves() -> None:
    servers = [HfServer("hf://one"), HfServer("hf://two")]
    trained = tiny_llama(3)
    for report in _push(servers, trained, range(1, 3)):
        assert report.serving == ("hf://one", "hf://two") and report.lost == {}
    for server in servers:
        assert server.is_serving and server.weight_version() == "2"
        for name, value in trained.named_parameters():
            assert torch.equal(dict(server.model.named_parameters())[name], value)


def test_a_server_that_computes_something_else_is_left_out_and_paused() -> None:
    well, spoilt = HfServer("hf://well"), HfServer("hf://spoilt", is_spoilt=True)
    (report,) = _push([well, spoilt], tiny_llama(3), range(1, 2))
    assert report.serving == ("hf://well",)
    assert "computes other log-probs than the trainer" in report.lost["hf://spoilt"]
    assert well.is_serving and spoilt.is_paused()
    with pytest.raises(NoServersLeft, match="no inference server is left"):
        _push([spoilt], tiny_llama(3), range(2, 3))
