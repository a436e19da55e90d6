"""The table of metrics is what the stages write: no name is missing, and none is listed that nothing writes."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from models.test_mixtral import write_mixtral
from ranks import run_ranks
from trainer.tiny_runs import WORDS, configure, train, write_rows

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.algorithms.reinforcement import GroupConfig
from rto_megatron.config.schema import Stage
from rto_megatron.data.tokenizer import tokenizer_fingerprint
from rto_megatron.data.true_reward import TrueReward
from rto_megatron.reporting.metric_names import POOL, THEMES, listed_name, metrics_of
from rto_megatron.reporting.metrics import read_metrics

ROOT = Path(__file__).parent.parent.parent
EVERY_OPTION = {"entropy_coef": 0.01, "dual_clip": 3.0, "beta_dpo": 0.05, "max_sampling_rounds": 2}
OWN_KEYS = {"semi_rto": {"algorithm__delimiters": ("red", "sun")}}
REWARD = TrueReward(
    # The token that begins every prompt stands for the one class there is.
    class_of_token={1: 0},
    entries={(0, 5, 6): 1.0},
    token_cost=0.1,
    eos_id=2,
    source_mean=0.0,
    source_sd=1.0,
    scale=1.0,
    seed=0,
    tokenizer_fingerprint="",
)


def _plain(stage: str, files: Path, run_dir: Path, layout: str = "one", **changes: object) -> Stage:
    few = {"run__steps": 2, "run__save_every": None, "run__peak_tflops": 0.1, **OWN_KEYS.get(stage, {})}
    return configure(stage, files, run_dir, layout, **few, **changes)


def _everything(stage: str, files: Path, root: Path) -> Stage:
    """Every option that adds a metric, without experts and a real pool."""
    run_dir = root / stage
    if not isinstance(ALGORITHMS[stage], OnlineMethod):
        name = "sft.jsonl" if stage == "sft" else "pairs.jsonl"
        return _plain(stage, files, run_dir, data__eval=str(files / name))
    texts = {
        "data__eval": str(files / "prompts.jsonl"),
        "evaluate__pass_score": 0.0,
        "data__pretrain": str(root / "texts.jsonl"),
        "data__true_reward": root / "true_reward.json",
    }
    rewards = [{"kind": "model"}, {"kind": "overlong", "buffer_tokens": 4}]
    config, options = ALGORITHMS[stage].config, {"pool_importance_cap": 2.0, **EVERY_OPTION}
    known = {f"algorithm__{key}": value for key, value in options.items() if key in config.model_fields}
    if issubclass(config, GroupConfig):
        known |= {"algorithm__samples_per_prompt": 2, "batch__rollout": 4}
    return _plain(stage, files, run_dir, rewards=rewards, **known, **texts)


def _names(run_dir: Path) -> set[str]:
    entries = read_metrics(run_dir)
    assert len(entries) == 2
    return {listed_name(name) for entry in entries for name in entry} - {"step", "time"}


@pytest.fixture(scope="module")
def written(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], set[str]]:
    """The names that a stage writes with every option of `_everything`."""
    root = tmp_path_factory.mktemp("runs")
    write_rows(root / "texts.jsonl", [{"text": " ".join(WORDS)}] * 4)
    fingerprint = tokenizer_fingerprint(files / "models/policy")
    replace(REWARD, tokenizer_fingerprint=fingerprint).save(root / "true_reward.json")

    @cache
    def names(stage: str) -> set[str]:
        assert run_ranks(1, train, _everything(stage, files, root)) == [None]
        return _names(root / stage)

    return names


@pytest.mark.parametrize("stage", ALGORITHMS)
def test_a_stage_writes_what_is_listed_for_it(stage: str, written: Callable[[str], set[str]]) -> None:
    names, listed = written(stage), metrics_of(stage)
    assert names - listed.keys() == set()
    always = {name for name, metric in listed.items() if not metric.needs}
    assert always - names == set()


def test_every_listed_metric_is_written_by_a_stage(
    written: Callable[[str], set[str]], files: Path, tmp_path: Path
) -> None:
    models = {}
    for role, is_scalar in (("policy", False), ("critic", True)):
        models[f"models__{role}"] = tmp_path / role
        write_mixtral(tmp_path / role, is_scalar)
        shutil.copytree(files / "tokenizer", tmp_path / role, dirs_exist_ok=True)
    keys = {"models__policy": models["models__policy"], "models__moe_aux_loss_coef": 0.01}
    experts = _plain("ppo", files, tmp_path / "experts", **keys, models__critic=models["models__critic"])
    reward = _plain("reward_model", files, tmp_path / "reward", **keys)
    # Two ranks with a loss each have a slower one.
    batch = {"train": 4, "rollout": 8, "tokens": 60}
    two = _plain("rto", files, tmp_path / "two", "dp2", offload=("reference",), batch=batch)
    assert run_ranks(2, train, two) == [None] * 2
    for config in (experts, reward):
        assert run_ranks(1, train, config) == [None]
    names = set().union(
        *map(written, ALGORITHMS), *(_names(tmp_path / n) for n in ("experts", "reward", "two"))
    )
    listed = {metric.name: metric for theme in THEMES for metric in theme.metrics}
    # What a real pool adds is looked for where there is one: tests/trainer/test_with_pool.py.
    pool = {name for name, metric in listed.items() if metric.needs == POOL}
    assert set(listed) - names == pool


def test_no_name_is_listed_twice() -> None:
    names = [metric.name for theme in THEMES for metric in theme.metrics]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_the_page_is_what_the_tool_prints() -> None:
    tool = [sys.executable, str(ROOT / "tools/list_metrics.py")]
    printed = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    assert printed == (ROOT / "docs/metrics.md").read_text()
