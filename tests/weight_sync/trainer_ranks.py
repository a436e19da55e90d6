"""Trainer ranks as threads of the test process: each has its own end of a weight push."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from pool_server import VOCAB_SIZE, PoolServer
from torch import Tensor
from transformers import PreTrainedModel

from rto_megatron.generation.vllm.client.pushed_servers import AskPushedServers
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.weight_sync.canary import Canary, canary_token_ids
from rto_megatron.weight_sync.manifest import PieceSpec
from rto_megatron.weight_sync.push import PushPart, PushReport, WeightSync
from rto_megatron.weight_sync.shared import OpenEnd, open_communicator

TOLERANCE = 1e-4  # nats, fp32


class ModelSource:
    """A Hugging Face model cut into stages as pipeline parallelism would."""

    def __init__(self, model: PreTrainedModel, num_stages: int = 1) -> None:
        self.model = model
        self._num_stages = num_stages

    def specs(self) -> tuple[PieceSpec, ...]:
        return tuple(
            whole_piece(name, value, self._stage(name)) for name, value in self.model.named_parameters()
        )

    def pieces(self, sender: int) -> Iterator[tuple[str, Tensor]]:
        return iter(
            [(name, value) for name, value in self.model.named_parameters() if self._stage(name) == sender]
        )

    def _stage(self, name: str) -> int:
        return 0 if "embed_tokens" in name or "layers.0." in name else self._num_stages - 1


def whole_piece(name: str, value: Tensor, sender: int = 0) -> PieceSpec:
    """The spec of a tensor that one sender holds."""
    dtype = str(value.dtype).removeprefix("torch.")
    return PieceSpec(name, dtype, tuple(value.shape), sender, 0, 0, value.shape[0])


def canary_of(model: PreTrainedModel) -> Canary:
    """What Hugging Face's model computes on the canary's sequence, in fp32."""
    token_ids = canary_token_ids(VOCAB_SIZE)
    with torch.no_grad():
        logp = model(torch.tensor([token_ids])).logits[0, :-1].float().log_softmax(-1)
    expected = logp.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
    return Canary(token_ids, expected.tolist(), TOLERANCE)


def served_distance(server: PoolServer, model: PreTrainedModel) -> float:
    """Mean absolute difference, in nats, between a serving server and Hugging Face's model on the canary's sequence."""
    canary = canary_of(model)
    with ServerClient(server.address, server.token, 60) as client:
        got = client.prompt_logprobs(list(canary.token_ids))
    return (torch.tensor(canary.expected_logprobs) - torch.tensor(got)).abs().mean().item()


class Meeting:
    """The collective of `num_ranks` threads."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks, timeout=120)
        self._texts = [""] * num_ranks

    def of_rank(self, rank: int) -> Callable[[str], list[str]]:
        def share(text: str) -> list[str]:
            self._texts[rank] = text
            self._barrier.wait()
            texts = list(self._texts)
            self._barrier.wait()
            return texts

        return share


class TrainerRanks:
    """`WeightSync` on every rank; rank r < num_senders sends stage r, further ranks only take part."""

    def __init__(
        self,
        servers: PoolServer | Sequence[PoolServer],
        sources: list[ModelSource],
        num_bystanders: int = 0,
        timeout_s: float = 20,
        open_end: OpenEnd = open_communicator,
    ) -> None:
        pool = [servers] if isinstance(servers, PoolServer) else list(servers)
        self.addresses = tuple(server.address for server in pool)
        self._sources = sources
        num_senders = len(sources)
        num_ranks = num_senders + num_bystanders
        meeting = Meeting(num_ranks)
        self.syncs = [
            WeightSync(
                source=sources[min(rank, num_senders - 1)],
                ask=AskPushedServers(pool[0].token),
                part=PushPart(
                    is_controller=rank == 0,
                    sender=rank if rank < num_senders else None,
                    num_senders=num_senders,
                ),
                device=torch.device("cpu"),
                bucket_bytes=64 << 10,
                timeout_s=timeout_s,
                share=meeting.of_rank(rank),
                open_end=open_end,
            )
            for rank in range(num_ranks)
        ]

    def push(self, version: int, canary: Canary | None = None) -> PushReport:
        """Every rank must end alike: all return or all raise the same words."""
        expected = canary or canary_of(self._sources[0].model)
        with ThreadPoolExecutor(len(self.syncs)) as threads:
            ends = [
                threads.submit(sync.push, version, self.addresses if rank == 0 else (), expected)
                for rank, sync in enumerate(self.syncs)
            ]
        words = {str(end.exception()) for end in ends}
        assert len(words) == 1, words
        reports = [end.result() for end in ends]
        assert len({(report.serving, str(report.lost)) for report in reports}) == 1
        return reports[0]

    def close(self) -> None:
        for sync in self.syncs:
            sync.close()
