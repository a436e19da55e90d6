"""Values of every kind that ranks exchange come back with the type and the numbers that they had."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from ranks import run_ranks

from rto_megatron.parallel.collectives import broadcast, gather

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Part:
    """Stands for what ranks tell each other: dataclasses of tuples and mappings."""

    ids: tuple[int, ...]
    sums: dict[str, tuple[float, float]]
    note: str | None = None


def of_two_ranks[T](tell: Callable[[dist.ProcessGroup, int], T]) -> list[T]:
    def rank() -> T:
        dist.init_process_group("gloo")
        group = dist.group.WORLD
        assert group is not None
        return tell(group, dist.get_rank())

    return run_ranks(2, rank)


def test_a_dataclass_comes_back_as_itself_on_every_rank() -> None:
    parts = [Part((), {}), Part((1, 2), {"loss": (0.1, 3.0)}, "é")]
    assert of_two_ranks(lambda group, rank: gather(parts[rank], Part, group, CPU)) == [parts, parts]


def test_numbers_that_are_not_finite_come_back() -> None:
    sent = [[math.nan, math.inf], [-math.inf, 0.1]]
    for heard in of_two_ranks(lambda group, rank: gather(sent[rank], list[float], group, CPU)):
        assert str(heard) == str(sent)


@pytest.mark.parametrize("source", [0, 1])
def test_a_broadcast_gives_the_value_of_its_source(source: int) -> None:
    parts = [Part((rank,), {}) for rank in range(2)]
    heard = of_two_ranks(lambda group, rank: broadcast(parts[rank], Part, source, group, CPU))
    assert heard == [parts[source]] * 2


def test_a_value_of_another_type_is_refused() -> None:
    def tell(group: dist.ProcessGroup, rank: int) -> bool:
        with pytest.raises(ValidationError):
            gather(["text"], list[int], group, CPU)  # type: ignore[list-item]
        return True

    assert of_two_ranks(tell) == [True, True]
