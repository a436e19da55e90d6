"""Pool and trainer: the gap of their log-probs, the alarm on it, and its correction, up to whole runs."""

import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS, topology
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor
from trainer.tiny_runs import ENGINE_VOCAB, HeldPush, configure, join

from rto_megatron.config.load import load_recipe
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.errors import RecipeError
from rto_megatron.generation.contract import Sampling
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.checked_scores import gap_alarm, pool_gap
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.online import train_online
from rto_megatron.types import Prompt, Rollout, ScoredRollouts

# Two rollout steps of one optimizer step each, whose length is that of the gradient.
SGD = {
    "batch__train": 8,
    "optimizer__kind": "sgd",
    "optimizer__lr": 0.1,
    "optimizer__max_grad_norm": None,
    "optimizer__schedule": "constant",
    "optimizer__warmup_fraction": 0.0,
    "run__steps": 2,
    "run__save_every": None,
    "sampling__min_response_tokens": 0,  # else the first tokens are not compared
}


def _gap(layout: str) -> dict[str, float]:
    place = topology(layout)
    zeros = torch.zeros(2, 3)
    scored = ScoredRollouts(
        rollouts=(Rollout("a", (5,), (7, 8, 2), (), "stop", 0), Rollout("b", (5,), (7, 2), (), "length", 0)),
        mask_BR=torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]),
        sampled_BR=torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
        logp_pool_BR=torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -9.0, 0.0]]),
        logp_old_BR=torch.tensor([[-1.5 - place.data_rank, -2.0, -2.75], [-1.0, -100.0, 0.0]]),
        logp_ref_BR=zeros,
        dpo_logratio_BR=zeros,
        values_BR=zeros,
        bootstrap_B=torch.zeros(2),
        score_B=torch.zeros(2),
    )
    return pool_gap(scored, place)


def test_the_gap_is_that_of_all_replicas_without_overwritten_tokens() -> None:
    (alone,) = run_ranks(1, _gap, "one")
    assert alone == {"pool/logprob_gap_mean": pytest.approx(0.75 / 4), "pool/logprob_gap_max": 0.5}
    for gap in run_ranks(2, _gap, "dp2"):
        assert gap == {
            "pool/logprob_gap_mean": pytest.approx((0.75 + 1.75) / 8),
            "pool/logprob_gap_max": 1.5,
        }


def test_the_alarm_is_one_line_on_the_lead(capsys: pytest.CaptureFixture[str]) -> None:
    gap = {"pool/logprob_gap_mean": 0.0712, "pool/logprob_gap_max": 3.25}
    assert gap_alarm(gap, None, 7, True) == {}
    assert gap_alarm(gap, 0.0712, 7, True) == {"pool/logprob_gap_alarm": 0.0}
    assert gap_alarm(gap, 0.05, 7, False) == {"pool/logprob_gap_alarm": 1.0}
    assert capsys.readouterr().out == ""
    assert gap_alarm(gap, 0.05, 7, True) == {"pool/logprob_gap_alarm": 1.0}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "warning: step 7: the log-probs of pool and trainer differ by 0.071 nats in the mean and 3.2 at most, "
        "above rollout.logprob_gap_alarm=0.05; compare precision.dtype with the pool's dtype"
    )


RECIPE = Path(__file__).parents[2] / "launchers" / "recipes" / "llama3_8b" / "rto.yaml"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("rollout.logprob_gap_alarm=0", "found 0; must be greater than 0"),
        ("rollout.logprob_gap_alarm=.nan", "found nan; must be greater than 0"),
        (
            "algorithm.pool_importance_cap=0.5",
            "found 0.5; a cap below 1 weighs every token on which pool and",
        ),
        ("algorithm.pool_importance_cap=.inf", "found inf; must be a finite number"),
    ],
)
def test_values_without_a_meaning_are_refused(override: str, part: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(RECIPE, [override])
    assert f"{override.partition('=')[0]}: {part}" in str(caught.value)


class _Shifted(ScriptedEngine):
    """Says that it sampled with log-probs `shift` nats above those it would say."""

    def __init__(self, shift: float) -> None:
        super().__init__(ENGINE_VOCAB)
        self._shift = shift

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        drawn = super().generate(prompts, sampling, version)
        return [
            replace(r, sampled_logprobs=tuple(x + self._shift for x in r.sampled_logprobs)) for r in drawn
        ]


def _train(config: ReinforcementStage, shift: float, printed: Path) -> None:
    place = join(config)
    engine = _Shifted(shift) if place.is_replica_lead else None
    own = printed.with_suffix(f".{torch.distributed.get_rank()}")
    with own.open("w") as out, redirect_stdout(out):
        train_online(config, place, ConnectedPool(engine, HeldPush(engine)))


def run(
    files: Path, run_dir: Path, shift: float = 0.0, layout: str = "one", stage: str = "ppo", **keys: object
) -> tuple[dict[str, Tensor], list[dict[str, float]], list[str]]:
    """What a run exports, its metrics, and the warnings that its ranks print."""
    config = configure(stage, files, run_dir, layout, **{**SGD, **keys})
    printed = run_dir.with_suffix(".out")
    num_ranks = LAYOUTS[layout][0]
    run_ranks(num_ranks, _train, config, shift, printed)
    lines = [
        line for rank in range(num_ranks) for line in printed.with_suffix(f".{rank}").read_text().splitlines()
    ]
    weights = {n: t for file in (run_dir / "hf").glob("*.safetensors") for n, t in load_file(file).items()}
    return weights, read_metrics(run_dir), [line for line in lines if line.startswith("warning: step")]


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of two models."""
    return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))


def test_an_alarm_rings_at_every_step_of_a_run_with_a_gap(files: Path, tmp_path: Path) -> None:
    _, entries, warnings = run(files, tmp_path / "loud", layout="dp2", rollout__logprob_gap_alarm=0.01)
    assert [line.split(":")[1] for line in warnings] == [" step 1", " step 2"]
    for entry, line in zip(entries, warnings, strict=True):
        assert entry["pool/logprob_gap_alarm"] == 1
        assert f"differ by {entry['pool/logprob_gap_mean']:.2g} nats" in line
        assert f"{entry['pool/logprob_gap_max']:.2g} at most" in line
    _, quiet, silence = run(files, tmp_path / "quiet", layout="dp2", rollout__logprob_gap_alarm=100.0)
    assert [entry["pool/logprob_gap_alarm"] for entry in quiet] == [0, 0] and silence == []
    _, off, silence = run(files, tmp_path / "off", layout="dp2", rollout__logprob_gap_alarm=None)
    assert not any("pool/logprob_gap_alarm" in entry for entry in off) and silence == []
    for entry, plain in zip(off, quiet, strict=True):
        assert entry["pool/logprob_gap_mean"] == plain["pool/logprob_gap_mean"] > 0.01


@pytest.mark.parametrize("stage", ["rto", "grpo"])
def test_a_cap_changes_what_a_run_learns_where_the_pool_is_off(
    stage: str, files: Path, tmp_path: Path
) -> None:
    keys = {"algorithm__samples_per_prompt": 2} if stage == "grpo" else {}
    off, plain, _ = run(files, tmp_path / "off", stage=stage, **keys)
    on, entries, _ = run(files, tmp_path / "on", stage=stage, algorithm__pool_importance_cap=1.1, **keys)
    start = load_file(files / "models/policy/model.safetensors")
    assert apart(on, off) > 0.01 * apart(off, start)
    for entry, without in zip(entries, plain, strict=True):
        assert 0 < entry["pool/importance_capped_fraction"] < 1
        assert 0 < entry["pool/importance_mean"] < 1.1
        assert not any(name.startswith("pool/importance") for name in without)


def test_a_cap_that_every_token_reaches_makes_the_step_that_much_longer(files: Path, tmp_path: Path) -> None:
    start = load_file(files / "models/policy/model.safetensors")
    keys = {"run__steps": 1, "shift": -50.0}
    off, _, _ = run(files, tmp_path / "off", **keys)
    on, (entry,), _ = run(files, tmp_path / "on", algorithm__pool_importance_cap=2.0, **keys)
    assert entry["pool/importance_mean"] == 2.0 and entry["pool/importance_capped_fraction"] == 1.0
    for name, tensor in on.items():
        expected = start[name] + 2 * (off[name] - start[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)
    assert apart(off, start) > 1e-4
