"""How many servers a pool has, how large they are, and which GPUs they see."""

from pathlib import Path

import pytest

from rto_megatron.config.load import load_recipe
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.errors import MachineError, RecipeError, UserError
from rto_megatron.launching.launched_pool import PoolChoice, _sizes, plan_pool
from rto_megatron.planning.placement import place, tensor_sizes

RECIPES = Path(__file__).parents[2] / "launchers" / "recipes"


@pytest.mark.parametrize(
    ("gpus", "pool_gpus", "servers", "tensor", "expected"),
    [
        (8, None, None, "1", [1, 1, 1, 1]),
        (8, 2, None, "1", [1, 1]),
        (8, None, None, "2", [2, 2]),
        (8, None, None, "1,2", [1, 2]),
        (8, None, 3, "2", [2, 2, 2]),
        (8, 6, None, "2", [2, 2, 2]),
        (2, None, None, "1", [1]),
        (0, None, None, "1", [1]),
        (0, None, 2, "1", [1, 1]),
        (0, None, None, "1,2", [1, 2]),
    ],
)
def test_servers_fill_what_the_pool_gets(
    gpus: int, pool_gpus: int | None, servers: int | None, tensor: str, expected: list[int]
) -> None:
    assert _sizes(gpus, PoolChoice(pool_gpus, servers, tensor)) == expected


@pytest.mark.parametrize(
    ("gpus", "pool_gpus", "servers", "tensor", "kind", "words"),
    [
        (1, None, None, "1", MachineError, "this machine has 1 GPUs, and the pool's servers would take 1"),
        (4, None, 2, "2", MachineError, "this machine has 4 GPUs, and the pool's servers would take 4"),
        (8, 3, None, "2,2", RecipeError, "need 4 GPUs, and the pool has 3"),
        (8, None, 3, "1,2", RecipeError, "3 servers have 2 tensor-parallel sizes, 1,2; name one each"),
        (8, None, None, "two", RecipeError, "expected numbers from 1 on"),
        (0, None, None, "0", RecipeError, "expected numbers from 1 on"),
    ],
)
def test_what_does_not_fit_is_refused(
    gpus: int, pool_gpus: int | None, servers: int | None, tensor: str, kind: type[UserError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        _sizes(gpus, PoolChoice(pool_gpus, servers, tensor))


@pytest.mark.parametrize(
    ("gpus", "ranks", "pool_gpus", "words"),
    [
        (8, 6, None, "8 GPUs, of which the pool's servers take 4, and 6 ranks need one each"),
        (4, None, None, "4 GPUs, of which the pool's servers take 2, and 4 ranks need one each"),  # tensor=4
        (8, None, 5, "8 GPUs, of which the pool's servers take 5, and 4 ranks need one each"),
    ],
)
def test_no_rank_gets_the_gpu_of_a_server(
    gpus: int, ranks: int | None, pool_gpus: int | None, words: str
) -> None:
    config = load_recipe(RECIPES / "llama3_8b" / "rto.yaml", [])
    assert isinstance(config, ReinforcementStage)
    with pytest.raises(MachineError, match=words):
        plan_pool(config, gpus, ranks, PoolChoice(pool_gpus, None, "1"))
    assert plan_pool(config, 8, ranks, PoolChoice(2, None, "1")) == ([1, 1], range(6, 8))
    assert plan_pool(config, 0, ranks, PoolChoice(None, None, "1")) == ([1], range(0))  # cores are shared


def test_one_server_of_two_gpus_needs_both() -> None:
    with pytest.raises(RecipeError, match="need 2 GPUs, and the pool has 1"):
        tensor_sizes("2", 1, 1)


def test_servers_see_consecutive_gpus_of_those_that_this_process_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert place([1, 2], range(5, 8)) == ["5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9,8,7,6")
    assert place([2, 1], range(1, 4)) == ["8,7", "6"]
    assert place([1, 2], range(0)) == [None, None]
