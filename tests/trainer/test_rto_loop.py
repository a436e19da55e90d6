"""The whole loop: RTO without its DPO reward is PPO, bit for bit, and with it is not."""

from pathlib import Path

import pytest
from engine.layouts import LAYOUTS
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor
from trainer.tiny_runs import configure, train

from rto_megatron.reporting.metrics import read_metrics


def _exported(stage: str, files: Path, run_dir: Path, layout: str, **changes: object) -> dict[str, Tensor]:
    config = configure(stage, files, run_dir, layout, run__steps=2, run__save_every=None, **changes)
    assert run_ranks(LAYOUTS[layout][0], train, config) == [None] * LAYOUTS[layout][0]
    return {n: t for f in (run_dir / "hf").glob("*.safetensors") for n, t in load_file(f).items()}


@pytest.mark.parametrize("layout", [pytest.param("one", marks=pytest.mark.slow), "tp2"])
def test_rto_without_dpo_reward_is_ppo(layout: str, files: Path, tmp_path: Path) -> None:
    start = load_file(files / "models/policy/model.safetensors")
    ppo = _exported("ppo", files, tmp_path / "ppo", layout)
    off = _exported("rto", files, tmp_path / "off", layout, algorithm__beta_dpo=0.0)
    assert ppo.keys() == off.keys() == start.keys()
    assert [name for name in ppo if not ppo[name].equal(off[name])] == []
    assert [name for name in ppo if ppo[name].equal(start[name])] == []
    logs = [read_metrics(tmp_path / name) for name in ("ppo", "off")]
    for one, other in zip(*logs, strict=True):
        numbers = {name: value for name, value in one.items() if not name.startswith(("time", "memory"))}
        assert numbers.items() <= other.items()
    if layout == "one":
        rto = _exported("rto", files, tmp_path / "rto", layout)
        assert [name for name in ppo if ppo[name].equal(rto[name])] == []
