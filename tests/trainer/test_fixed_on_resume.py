"""Every key of a method, of sampling and of the age of rollouts is fixed on a resume; how it is computed is not."""

from pathlib import Path

import pytest
from trainer.tiny_runs import configure

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.config.rollouts import SamplingConfig
from rto_megatron.errors import UserError
from rto_megatron.trainer.resume import fixed_keys, require_same

# Another value of each key than its default in any method.
OTHER: dict[str, object] = {
    "algorithm.clip_eps": 0.15,
    "algorithm.clip_eps_high": 0.35,
    "algorithm.dual_clip": 2.5,
    "algorithm.beta_kl": 0.033,
    "algorithm.samples_per_prompt": 32,
    "algorithm.loss_weights": None,  # differs by method, see `_other`
    "algorithm.entropy_coef": 0.011,
    "algorithm.score_clip": 7.0,
    "algorithm.score_limit": 70.0,
    "algorithm.epochs": 2,
    "algorithm.truncated": "mask",
    "algorithm.truncated_penalty": 0.3,
    "algorithm.ptx_coef": 0.07,
    "algorithm.ema_beta": 0.99,
    "algorithm.pool_importance_cap": 3.0,
    "algorithm.pool_importance_mode": "sequence_mask",
    "algorithm.kl_target": 5.0,
    "algorithm.kl_horizon": 77,
    "algorithm.gamma": 0.9,
    "algorithm.lam": 0.8,
    "algorithm.value_clip": 0.3,
    "algorithm.critic_warmup_steps": 1,
    "algorithm.beta_dpo": 0.02,
    "algorithm.dpo_clip": 0.01,
    "algorithm.delimiters": ["red"],
    "algorithm.max_sampling_rounds": 3,
    "sampling.max_response_tokens": 9,
    "sampling.min_response_tokens": 2,
    "sampling.temperature": 0.7,
    "sampling.top_p": 0.9,
    "sampling.top_k": 5,
    "sampling.stop": ["red"],
    "rollout.ahead": 1,
    "rollout.old_logprobs": "pool",
    "batch.rollout": 4,
    "batch.train": 2,
    "optimizer.lr": 2e-3,
    "run.seed": 7,
    "precision.dtype": "bf16",
}
# What such a change needs beside it.
WITH: dict[str, dict[str, object]] = {
    "rollout.ahead": {"algorithm.pool_importance_cap": 2.0},
    "algorithm.pool_importance_mode": {"algorithm.pool_importance_cap": 2.0},
    "algorithm.kl_horizon": {"algorithm.kl_target": 6.0},
    "algorithm.dpo_clip": {"algorithm.beta_dpo": 0.04},
}
REFUSED_BY_SCHEMA = {("rloo", "algorithm.epochs")}  # one pass alone
ONLINE = {name: method for name, method in ALGORITHMS.items() if isinstance(method, OnlineMethod)}


def _keys(stage: str) -> list[str]:
    own = [f"algorithm.{name}" for name in ONLINE[stage].config.model_fields]
    sampling = [f"sampling.{name}" for name in SamplingConfig.model_fields]
    others = [key for key in OTHER if not key.startswith(("algorithm.", "sampling."))]
    return [key for key in (*own, *sampling, *others) if (stage, key) not in REFUSED_BY_SCHEMA]


def _other(stage: str, key: str) -> object:
    if key == "algorithm.loss_weights":
        default = ONLINE[stage].config.model_fields["loss_weights"].default
        return "token_mean" if default != "token_mean" else "constant"
    return OTHER[key]


@pytest.mark.parametrize("stage", ONLINE)
def test_a_changed_key_is_refused_by_name(stage: str, tmp_path: Path) -> None:
    def fixed(changes: dict[str, object]) -> dict[str, object]:
        keys = {key.replace(".", "__", 1): value for key, value in changes.items()}
        return fixed_keys(configure(stage, tmp_path, tmp_path / "run", **keys))

    for key in _keys(stage):
        saved = fixed(WITH.get(key, {}))
        require_same(saved, fixed(WITH.get(key, {})), tmp_path)
        with pytest.raises(UserError) as caught:
            require_same(saved, fixed({**WITH.get(key, {}), key: _other(stage, key)}), tmp_path)
        lines = [line for line in str(caught.value).splitlines() if " in the checkpoint, " in line]
        # A weight of the DPO reward brings its model.
        (line,) = [line for line in lines if not line.startswith("  models.dpo: ")]
        assert line.startswith(f"  {key}: ")


def test_every_key_of_every_method_is_tried() -> None:
    assert {key for stage in ONLINE for key in _keys(stage)} == OTHER.keys()


def test_how_it_is_computed_may_change(tmp_path: Path) -> None:
    saved = fixed_keys(configure("grpo", tmp_path, tmp_path / "run"))
    free = {
        "batch__micro": 1,
        "batch__packed": False,
        "run__keep_rollouts": 3,
        "run__steps": 9,
        "rollout__retries": 9,
        "evaluate__num_samples": 1,
        "parallel": {"tensor": 2},
    }
    require_same(saved, fixed_keys(configure("grpo", tmp_path, tmp_path / "elsewhere", **free)), tmp_path)


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"optimizer": {"lr": 1e-3, "schedule": "constant"}}, "optimizer.min_lr_fraction", 0.0),
        ({"critic_optimizer": {"lr": 1e-3, "kind": "sgd"}}, "critic_optimizer.betas", [0.9, 0.99]),
        ({"algorithm": {"beta_dpo": 0}}, "algorithm.dpo_clip", 0.01),
        ({"algorithm": {"truncated": "mask"}}, "algorithm.truncated_penalty", 2.0),
    ],
)
def test_a_run_that_set_a_key_without_effect_goes_on_without_it(
    changes: dict[str, dict[str, object]], key: str, value: object, tmp_path: Path
) -> None:
    config = configure("rto", tmp_path, tmp_path / "run", **changes)
    require_same({**fixed_keys(config), key: value}, fixed_keys(config), tmp_path)
    usual = fixed_keys(configure("rto", tmp_path, tmp_path / "run"))
    with pytest.raises(UserError, match=key):
        require_same({**usual, key: value}, usual, tmp_path)


@pytest.mark.parametrize(
    ("stage", "key", "change"),
    [
        ("sft", "data.loss_on", {"data__loss_on": "all"}),
        ("sft", "data.empty_thoughts", {"data__empty_thoughts": "skip"}),
        ("rto", "rollout.old_logprobs", {"rollout__old_logprobs": "pool"}),
        ("rto", "rewards", {"rewards": [{"kind": "model"}]}),
    ],
)
def test_a_key_that_older_checkpoints_lack_counts_as_what_all_runs_did(
    stage: str, key: str, change: dict[str, object], tmp_path: Path
) -> None:
    usual = fixed_keys(configure(stage, tmp_path, tmp_path / "run"))
    older = {name: value for name, value in usual.items() if name != key}
    require_same(older, usual, tmp_path)
    with pytest.raises(UserError, match=rf"  {key}: "):
        require_same(older, fixed_keys(configure(stage, tmp_path, tmp_path / "run", **change)), tmp_path)
