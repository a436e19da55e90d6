"""What a fake machine remembers of an operation is what torch makes of real tensors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import scaled_dot_product_attention

from rto_megatron.simulation.fake_machine import FakeMachine
from rto_megatron.simulation.ledger import Ledger
from rto_megatron.simulation.rank_tally import RankTally

POSITIONS = torch.tensor([2, 0, 0])
MASK = torch.tensor([True, False, True, True])


def _written(x: Tensor) -> Tensor:
    x.mul_(2)
    return x


def _turned(x: Tensor) -> Tensor:
    turned = x.clone()
    turned.t_()
    return turned


CALLS: dict[str, Callable[[Tensor], Tensor | tuple[Tensor, ...]]] = {
    "fresh": lambda x: x @ x.t(),
    "another dtype": lambda x: x.to(torch.bfloat16) + 1,
    "a view of a view": lambda x: x[1:, 2:].unsqueeze(1),
    "parts": lambda x: x.split(2, dim=1),
    "written to": _written,
    "turned in place": _turned,
    "chosen by places": lambda x: x[POSITIONS],
    "chosen by a mask": lambda x: x[MASK],
    "attention": lambda x: scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    "a factory": lambda x: torch.randn(3, 5, generator=torch.Generator()).to(x.dtype),
}


def _laid_out(made: Tensor | tuple[Tensor, ...], argument: Tensor) -> list[object]:
    tensors = [made] if isinstance(made, Tensor) else list(made)
    own = argument.untyped_storage()._cdata
    return [
        (tuple(t.shape), t.stride(), t.storage_offset(), t.dtype, t.untyped_storage()._cdata == own)
        for t in tensors
    ]


@pytest.mark.parametrize("name", CALLS)
def test_the_second_answer_is_what_torch_makes(name: str) -> None:
    call = CALLS[name]
    real = torch.zeros(4, 8)
    expected = _laid_out(call(real), real)
    machine = FakeMachine(Ledger(), RankTally({}))
    with machine:
        given = torch.empty(4, 8)
        first, second = call(given), call(given)
        assert _laid_out(first, given) == _laid_out(second, given) == expected
        tensors = [second] if isinstance(second, Tensor) else second
        assert all(isinstance(one, FakeTensor) and one.device == given.device for one in tensors)


def test_what_is_remembered_takes_memory_of_its_own() -> None:
    machine = FakeMachine(Ledger(), RankTally({}))
    with machine:
        given = torch.empty(4, 8)
        kept = [given + 1 for _ in range(3)]
        assert machine.ledger.live == 4 * 32 * 4 and len(kept) == 3
        del kept[1:]
        assert machine.ledger.live == 2 * 32 * 4
