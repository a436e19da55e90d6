"""Rewards from recipes: what a run pays, logs, keeps on a resume and refuses."""

import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from trainer.tiny_runs import configure, join, train

from rto_megatron.config.load import dump, load_recipe
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.engine.export import export_hf
from rto_megatron.errors import UserError
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.reporting.rollout_files import read_rollouts
from rto_megatron.reporting.run_page import view_of
from rto_megatron.trainer.online import build_roles
from rto_megatron.trainer.resume import fixed_keys, require_same
from rto_megatron.trainer.setup import prepare_stage

FUNCTIONS = Path(__file__).parents[1] / "rewards/functions.py"
NO_MODEL = {"models__reward": None, "models__critic": None}
ONE_STEP = {"run__steps": 1, "run__save_every": None}


def function(name: str, **keys: object) -> dict[str, object]:
    return {"kind": "function", "name": name, "function": f"{FUNCTIONS}:{name}", **keys}


def recipe(folder: Path, config: object) -> ReinforcementStage:
    """The configuration as a user's recipe gives it."""
    assert isinstance(config, ReinforcementStage)
    path = folder / "recipe.yaml"
    path.write_text(dump(config))
    loaded = load_recipe(path)
    assert isinstance(loaded, ReinforcementStage)
    return loaded


def test_rto_runs_on_functions_alone_and_its_critic_starts_from_the_policy(
    files: Path, tmp_path: Path
) -> None:
    rewards = [
        function("length", weight=0.5),
        function("seen", overlong_buffer_tokens=8),
        function("first_token", pays="tokens", weight=2.0),
        {"kind": "overlong", "buffer_tokens": 8, "weight": 3.0},
    ]
    keys = {**NO_MODEL, "run__steps": 2, "rewards": rewards}
    config = recipe(tmp_path, configure("rto", files, tmp_path / "run", "tp2", **keys))
    assert run_ranks(2, train, config) == [None] * 2
    for entry in read_metrics(tmp_path / "run"):
        length = entry["rollout/response_tokens"]
        assert entry["reward/length/mean"] == pytest.approx(length)
        assert entry["reward/length/paid"] == pytest.approx(0.5 * length)
        assert entry["reward/seen/mean"] == 1.0
        assert entry["reward/seen/paid"] == pytest.approx(1 - length / 8)
        assert entry["reward/first_token/paid"] == pytest.approx(2.0)
        # A buffer as long as the limit: - |y| / 8.
        assert entry["reward/overlong/mean"] == pytest.approx(-length / 8)
        assert entry["objective/scores"] == pytest.approx(0.5 * length + 1 - 4 * length / 8)
        assert entry["value/mean"] != 0
    for row in read_rollouts(tmp_path / "run").to_pylist():
        length = row["num_tokens"]
        assert (row["source/length"], row["paid/length"]) == pytest.approx((length, 0.5 * length))
        assert row["source/overlong"] == pytest.approx(-length / 8)
        assert row["score"] == pytest.approx(0.5 * length + 1 - 4 * length / 8)
        assert row["token/reward_source"] == [2.0] + [0.0] * (length - 1)
    shown = view_of(tmp_path / "run", (), ())
    assert "reward_source" in shown.quantities and {"source/seen", "paid/first_token"} <= set(shown.columns)
    checkpoint = tmp_path / "run/checkpoints/step_000002"
    assert (checkpoint / "critic").is_dir()

    changed = {**keys, "run__steps": 3}
    other = [{**rewards[0], "weight": 0.6}, *rewards[1:3]]
    (error, _) = run_ranks(
        2,
        train,
        recipe(tmp_path, configure("rto", files, tmp_path / "run", "tp2", **{**changed, "rewards": other})),
    )
    assert "rewards.length.weight: 0.5 in the checkpoint, 0.6 in the configuration" in error
    assert "rewards: ['length', 'seen', 'first_token', 'overlong'] in the checkpoint" in error
    # Another place and patience are no other reward, other code is.
    shutil.copy(FUNCTIONS, tmp_path / "functions.py")
    moved = [
        {
            **one,
            **(
                {"function": f"{tmp_path}/functions.py:{one['name']}", "timeout_s": 50}
                if "function" in one
                else {}
            ),
        }
        for one in rewards
    ]
    again = configure("rto", files, tmp_path / "run", "tp2", **{**changed, "rewards": moved})
    assert run_ranks(2, train, recipe(tmp_path, again)) == [None] * 2
    (tmp_path / "functions.py").write_text(FUNCTIONS.read_text() + "\n# another digest\n")
    (error, _) = run_ranks(
        2,
        train,
        recipe(tmp_path, again.model_copy(update={"run": again.run.model_copy(update={"steps": 4})})),
    )
    assert "rewards.length.sha256: " in error


def test_what_decides_the_numbers_of_a_source_is_fixed_on_a_resume(files: Path, tmp_path: Path) -> None:
    def keys(*rewards: dict[str, object]) -> dict[str, object]:
        return fixed_keys(configure("grpo", files, tmp_path, rewards=rewards))

    base = [
        {"kind": "model"},
        {"kind": "service", "url": "http://a/", "name": "far"},
        {"kind": "math_verify"},
        {"kind": "reasoning_gym"},
        {"kind": "overlong", "buffer_tokens": 2},
        function("length", sha256="a" * 64),
    ]
    saved = keys(*base)
    changes = [
        (0, {"clip": 1.0}), (0, {"normalize": "group"}), (0, {"weight": 2.0}), (0, {"overlong_buffer_tokens": 2}),
        (1, {"pays": "tokens"}), (1, {"protocol": "vllm"}), (2, {"answer": "gold"}), (3, {"answer_tag": "answer"}),
        (4, {"buffer_tokens": 3}), (5, {"sha256": "b" * 64}), (5, {"function": f"{FUNCTIONS}:column"}),
        (5, {"pays": "spans"}),
    ]  # fmt: skip
    for place, change in changes:
        with pytest.raises(UserError, match=f"rewards.*{next(iter(change))}"):
            require_same(saved, keys(*base[:place], {**base[place], **change}, *base[place + 1 :]), tmp_path)
    with pytest.raises(UserError, match="rewards: "):
        require_same(saved, keys(*base[1:]), tmp_path)
    asked_elsewhere = {
        "url": "http://b/",
        "timeout_s": 5,
        "batch": 2,
        "concurrency": 1,
        "retries": 9,
        "token_env": "X",
    }
    require_same(
        saved,
        keys(base[0], {**base[1], **asked_elsewhere}, *base[2:5], {**base[5], "function": "/b.py:length"}),
        tmp_path,
    )
    # Sources of an older checkpoint did not have the key, and punished nothing.
    before = {key: value for key, value in saved.items() if not key.endswith("overlong_buffer_tokens")}
    require_same(before, saved, tmp_path)
    with pytest.raises(
        UserError, match=r"rewards\.math_verify\.overlong_buffer_tokens: None in the checkpoint, 3"
    ):
        require_same(before, keys(*base[:2], {**base[2], "overlong_buffer_tokens": 3}, *base[3:]), tmp_path)
    # A checkpoint from before there was a list is one of the model alone.
    old = {key: value for key, value in keys().items() if not key.startswith("rewards")}
    require_same(old, keys(), tmp_path)
    with pytest.raises(UserError, match=r"rewards: \[\] in the checkpoint, \['model'\] in the configuration"):
        require_same(old, keys(base[0]), tmp_path)


def test_a_list_of_the_model_alone_is_the_model(files: Path, tmp_path: Path) -> None:
    for name, rewards in (("alone", []), ("list", [{"kind": "model"}])):
        assert run_ranks(1, train, configure("ppo", files, tmp_path / name, **ONE_STEP, rewards=rewards)) == [
            None
        ]
    exports = [load_file(next((tmp_path / name / "hf").glob("*.safetensors"))) for name in ("alone", "list")]
    assert all(torch.equal(tensor, exports[1][key]) for key, tensor in exports[0].items())
    alone, listed = (read_metrics(tmp_path / name)[0] for name in ("alone", "list"))
    assert listed["reward/model/mean"] == alone["objective/scores"]
    counted = {name for name in alone if not name.startswith(("time/", "memory/")) and name != "time"}
    assert {name: listed[name] for name in counted} == {name: alone[name] for name in counted}


def _start_of_critic(config: ReinforcementStage, folder: Path) -> None:
    setup = prepare_stage(config, join(config))
    roles = build_roles(config, setup)
    assert roles.critic is not None
    assert (roles.critic.scale.mean, roles.critic.scale.std) == (0.0, 1.0)
    for role, model in (("policy", roles.policy), ("critic", roles.critic)):
        export_hf(model, setup.sources[role].hf_folder, folder / role)


def test_a_critic_without_a_reward_model_is_the_policy_with_a_drawn_head(files: Path, tmp_path: Path) -> None:
    rewards = [{"kind": "overlong", "buffer_tokens": 2}]
    config = configure("ppo", files, tmp_path / "run", "pp2", **NO_MODEL, rewards=rewards)
    run_ranks(2, _start_of_critic, config, tmp_path)
    policy, critic = (
        {k: v for file in (tmp_path / role).glob("*.safetensors") for k, v in load_file(file).items()}
        for role in ("policy", "critic")
    )
    assert policy.keys() - critic.keys() == {"lm_head.weight"}
    assert all(torch.equal(policy[key], critic[key]) for key in policy.keys() & critic.keys())
    head = critic["score.weight"]
    # OpenRLHF, models/model.py: normal with standard deviation 1 / (hidden + 1).
    assert head.shape == (1, 128) and float(head.std()) == pytest.approx(1 / 129, rel=0.3)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (function("poisoned"), "a score of rewards.poisoned is NaN or infinite on"),
        (function("column"), "rewards.column: "),
        (function("slow", timeout_s=0.5), "took longer than rewards.slow.timeout_s=0.5"),
        (
            {"kind": "service", "url": "http://127.0.0.1:9/", "retries": 0},
            "rewards.service: http://127.0.0.1:9/ did not",
        ),
    ],
)
def test_a_reward_that_fails_ends_the_run_with_key_sample_and_remedy(
    source: dict[str, object], expected: str, files: Path, tmp_path: Path
) -> None:
    keys = {
        **ONE_STEP,
        "models__reward": None,
        "run__max_skipped_updates": 1,
        "algorithm__samples_per_prompt": 2,
    }
    (error,) = run_ranks(1, train, configure("grpo", files, tmp_path / "run", **keys, rewards=[source]))
    assert error is not None and expected in error
    assert "no weight was changed" in error or "nothing is trained on" in error
    assert not (tmp_path / "run/checkpoints").exists() or not list((tmp_path / "run/checkpoints").iterdir())
