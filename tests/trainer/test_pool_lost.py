"""A run that loses its last server ends with one reason, saved, and goes on later as if nothing had happened."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from engine.layouts import LAYOUTS
from ranks import free_port, run_ranks
from trainer.test_resume import assert_equal_runs, read_checkpoint
from trainer.tiny_runs import ENGINE_VOCAB, HeldPush, configure, join

from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.errors import MachineError, PoolError, UserError
from rto_megatron.generation.contract import NoServersLeft, Sampling
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.online import train_online
from rto_megatron.types import Prompt, Rollout

REASON = "no inference server is left to sample from: http://a ended"


class MortalEngine(ScriptedEngine):
    """Its last server dies while version `dies_at` samples."""

    def __init__(self, dies_at: int | None) -> None:
        super().__init__(ENGINE_VOCAB)
        self._dies_at = dies_at

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """Draws as ScriptedEngine does until then."""
        if version == self._dies_at:
            raise NoServersLeft(REASON)
        return super().generate(prompts, sampling, version)


class MortalPush(HeldPush):
    """No server comes through the push of version `lost_at`."""

    def __init__(self, engine: ScriptedEngine | None, lost_at: int | None) -> None:
        super().__init__(engine)
        self._lost_at = lost_at

    def __call__(self, version: int) -> dict[str, float]:
        if version == self._lost_at:
            raise NoServersLeft(REASON)
        return super().__call__(version)


def train(
    config: ReinforcementStage, dies_at: int | None = None, lost_at: int | None = None, mortal_rank: int = 0
) -> tuple[str, str] | None:
    """Runs as one rank; kind and text of the error for the user that ended it."""
    place = join(config)
    engine = MortalEngine(dies_at if place.rank == mortal_rank else None) if place.is_replica_lead else None
    try:
        train_online(config, place, ConnectedPool(engine, MortalPush(engine, lost_at)))
    except UserError as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize(
    ("layout", "faults"),
    [
        pytest.param("one", {"lost_at": 3}, marks=pytest.mark.slow),
        pytest.param("dp2", {"dies_at": 3, "mortal_rank": 1}, marks=pytest.mark.slow),
        ("pp2", {"dies_at": 2}),
    ],
)
def test_the_last_finished_step_is_saved_and_the_run_goes_on_bit_for_bit(
    layout: str, faults: dict[str, int], files: Path, tmp_path: Path
) -> None:
    num_ranks = LAYOUTS[layout][0]
    whole, lost = (configure("rto", files, tmp_path / name, layout) for name in ("whole", "lost"))
    assert run_ranks(num_ranks, train, whole) == [None] * num_ranks
    step = max(faults.get("dies_at", 0), faults.get("lost_at", 0))
    for kind, message in run_ranks(num_ranks, train, lost, **faults):
        assert kind == "NoServersLeft"
        assert message == (
            f"{REASON}\nstep {step} is saved in {tmp_path / 'lost'}; start the pool again, and then the run as before: "
            "it goes on from there"
        )
    assert read_checkpoint(tmp_path / "lost", step).state["step"] == step
    assert run_ranks(num_ranks, train, lost) == [None] * num_ranks
    assert_equal_runs(tmp_path / "whole", tmp_path / "lost")


def test_a_pool_that_never_served_leaves_no_checkpoint(files: Path, tmp_path: Path) -> None:
    config = configure("rto", files, tmp_path / "run")
    (ended,) = run_ranks(1, train, config, lost_at=0)
    assert ended == (
        "NoServersLeft",
        f"{REASON}\nno step was finished yet; start the pool again, and then the run as before: it goes on from there",
    )
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("server", "kind", "words"),
    [
        ("http://127.0.0.1:{port}", PoolError, "none of rollout.servers answers, and nothing was done yet"),
        ("http://localhost:{port}", PoolError, "inference server http://127.0.0.1:"),
        (
            "http://no-such-machine.invalid:8000",
            MachineError,
            "this machine finds no way to no-such-machine.invalid",
        ),
    ],
)
def test_an_address_where_nobody_is_ends_the_run_at_once(
    server: str, kind: type[UserError], words: str, files: Path, tmp_path: Path
) -> None:
    """It ends as a mistake of the recipe does, for which `rto launch` starts no second attempt."""
    (tmp_path / "token").write_text("t" * 64)
    (tmp_path / "token").chmod(0o600)
    config = configure(
        "rto", files, tmp_path / "run", rollout__servers=(server.format(port=free_port()),),
        rollout__token_file=tmp_path / "token",
    )  # fmt: skip

    def ended() -> tuple[str, str]:
        assert isinstance(config, ReinforcementStage)
        place = join(config)
        with pytest.raises(kind) as refused:
            train_online(config, place)
        return refused.value.reason, str(refused.value)

    for reason, message in run_ranks(1, ended):
        assert reason == "CONFIG"
        assert words in message
