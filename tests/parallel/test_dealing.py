"""What is shared out over the replicas of a role comes back to whom it belongs, however uneven the shares are."""

import pytest
import torch
from ranks import run_ranks

from rto_megatron.config.training import ParallelConfig, RoleGridConfig
from rto_megatron.parallel.dealing import of_all_replicas, shared_out
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.device import prepare

# Of the two replicas of the policy, the texts that each holds; the role has four replicas.
HELD = {
    "even": [["a", "bcd"], ["ef", "g"]],
    "uneven": [["abcde", "b", "cc"], ["d", "ef"]],
    "fewer than replicas": [["ab"], ["c"]],
    "one holds none": [["ab", "c"], []],
    "none": [[], []],
}


def _read(text: str) -> list[float]:
    """A row as wide as the text."""
    return [float(ord(letter)) for letter in text]


def _grid(texts: list[str]) -> torch.Tensor:
    width = max(map(len, texts))
    return torch.tensor([[*_read(text), *([0.0] * (width - len(text)))] for text in texts])


def _dealt(role: RoleGridConfig) -> dict[str, tuple[list[str], list[list[float]], list[float]]]:
    policy = Topology.init(prepare(), ParallelConfig(tensor=2, roles={"reward": role}), seed=1)
    found = {}
    for name, held in HELD.items():
        share = shared_out(held[policy.data_rank], list[str], policy.of("reward"))
        if share.items:
            rows, lengths = (
                share.back(_grid(share.items)),
                share.back(torch.tensor([len(t) for t in share.items])),
            )
            found[name] = share.items, rows.tolist(), lengths.tolist()
        else:
            found[name] = [], [], []
    return found


@pytest.mark.parametrize(
    "role", [RoleGridConfig(), RoleGridConfig(pipeline=2), RoleGridConfig(tensor=4), RoleGridConfig(tensor=2)]
)
def test_rows_come_back_to_the_replica_that_holds_their_item(role: RoleGridConfig) -> None:
    answers = run_ranks(4, _dealt, role)
    for rank, of_rank in enumerate(answers):
        for name, held in HELD.items():
            own = held[rank // 2]
            _, rows, lengths = of_rank[name]
            assert [row[: len(text)] for row, text in zip(rows, own, strict=True)] == [_read(t) for t in own]
            assert all(not any(row[len(text) :]) for row, text in zip(rows, own, strict=True))
            assert lengths == [len(text) for text in own]
    if (
        role == RoleGridConfig()
    ):  # every text was read once, and nobody had nothing to read where another had two
        read = [of_rank["uneven"][0] for of_rank in answers]
        assert sorted(text for part in read for text in part) == ["abcde", "b", "cc", "d", "ef"]
        assert {len(part) for part in read} == {1, 2}


def _everywhere() -> list[list[float]]:
    policy = Topology.init(prepare(), ParallelConfig(), seed=1)
    own = torch.full((2, 1 + policy.data_rank), float(policy.data_rank + 1))
    rows: list[list[float]] = of_all_replicas(own, policy).tolist()
    return rows


def test_rows_of_all_replicas_are_padded_to_the_widest() -> None:
    want = [[1.0, 0.0], [1.0, 0.0], [2.0, 2.0], [2.0, 2.0]]
    assert run_ranks(2, _everywhere) == [want, want]
