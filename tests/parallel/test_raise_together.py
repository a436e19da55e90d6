"""An error of one rank is every rank's: nobody waits for a rank that left."""

import pytest
from ranks import run_ranks

from rto_megatron.config.training import ParallelConfig
from rto_megatron.engine.integrity import SAVING_ERRORS, CheckpointError, DiskFull
from rto_megatron.errors import DataError, TokenizerError, UserError
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.device import prepare


class _OddError(CheckpointError):
    """A class that no list names."""


def _raised(errors: tuple[UserError | None, UserError | None], kinds: tuple[type[UserError], ...]) -> str:
    topology = Topology.init(prepare(), ParallelConfig(), seed=1)
    try:
        topology.raise_together(errors[topology.rank], *kinds)
    except UserError as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing"


@pytest.mark.parametrize(
    ("errors", "kinds", "expected"),
    [
        ((None, None), SAVING_ERRORS, "nothing"),
        ((None, DataError("")), (), "DataError: "),
        ((None, DiskFull("is full")), SAVING_ERRORS, "DiskFull: is full"),
        ((CheckpointError("is cut"), DiskFull("is full")), SAVING_ERRORS, "CheckpointError: is cut"),
        ((None, _OddError("is odd")), SAVING_ERRORS, "CheckpointError: is odd"),
        ((TokenizerError("is empty"), None), SAVING_ERRORS, "TokenizerError: is empty"),
        ((DiskFull("is full"), None), (), "UserError: is full"),
    ],
)
def test_every_rank_raises_the_error_of_the_lowest_rank_that_has_one(
    errors: tuple[UserError | None, UserError | None], kinds: tuple[type[UserError], ...], expected: str
) -> None:
    assert run_ranks(2, _raised, errors, kinds) == [expected] * 2
