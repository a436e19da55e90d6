"""Trainer ranks as threads of the test process: each has its own end of a weight push."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from pool_server import PoolServer
from torch import Tensor
from transformers import PreTrainedModel

from rto_megatron.errors import UserError
from rto_megatron.weight_sync.manifest import TensorSpec
from rto_megatron.weight_sync.sync import Synchronise, SyncPlace, WeightSync


class ModelSource:
    """A Hugging Face model cut into stages as pipeline parallelism would."""

    def __init__(self, model: PreTrainedModel, num_stages: int = 1) -> None:
        self.model = model
        self._num_stages = num_stages

    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name, str(value.dtype).removeprefix("torch."), tuple(value.shape), self._stage(name))
            for name, value in self.model.named_parameters()
        )

    def tensors(self, sender: int) -> Iterator[tuple[str, Tensor]]:
        return iter(
            [(name, value) for name, value in self.model.named_parameters() if self._stage(name) == sender]
        )

    def _stage(self, name: str) -> int:
        return 0 if "embed_tokens" in name or "layers.0." in name else self._num_stages - 1


class Meeting:
    """The collectives of `num_ranks` threads."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks, timeout=60)
        self._errors: list[str | None] = [None] * num_ranks
        self._text = ""

    def of_rank(self, rank: int) -> Synchronise:
        return Synchronise(
            lambda error: self._all_raise(rank, error), lambda text: self._broadcast(rank, text)
        )

    def _all_raise(self, rank: int, error: str | None) -> None:
        self._errors[rank] = error
        self._barrier.wait()
        errors = [one for one in self._errors if one is not None]
        self._barrier.wait()
        if errors:
            raise UserError(errors[0])

    def _broadcast(self, rank: int, text: str) -> str:
        if rank == 0:
            self._text = text
        self._barrier.wait()
        heard = self._text
        self._barrier.wait()
        return heard


class TrainerRanks:
    """`WeightSync` on every rank; rank r < num_senders sends stage r, further ranks only take part."""

    def __init__(
        self, server: PoolServer, sources: list[ModelSource], num_bystanders: int = 0, timeout_s: float = 20
    ) -> None:
        num_senders = len(sources)
        num_ranks = num_senders + num_bystanders
        meeting = Meeting(num_ranks)
        self._syncs = [
            WeightSync(
                source=sources[min(rank, num_senders - 1)],
                servers=[server.address],
                token=server.token,
                place=SyncPlace(
                    is_controller=rank == 0,
                    stage=rank if rank < num_senders else None,
                    sends=rank < num_senders,
                ),
                num_senders=num_senders,
                device=torch.device("cpu"),
                bucket_bytes=64 << 10,
                timeout_s=timeout_s,
                together=meeting.of_rank(rank),
            )
            for rank in range(num_ranks)
        ]

    def push(self, version: int) -> None:
        self._on_all(lambda sync: sync.push(version))

    def canary(
        self, version: int, token_ids: tuple[int, ...], expected: list[float], tolerance: float
    ) -> None:
        self._on_all(lambda sync: sync.canary(version, token_ids, expected, tolerance))

    def close(self) -> None:
        for sync in self._syncs:
            sync.close()

    def _on_all(self, call: Callable[[WeightSync], object]) -> None:
        """Every rank must end alike: all return or all raise the same words."""
        with ThreadPoolExecutor(len(self._syncs)) as threads:
            ends = [threads.submit(call, sync) for sync in self._syncs]
        words = {str(end.exception()) for end in ends}
        assert len(words) == 1, words
        ends[0].result()
