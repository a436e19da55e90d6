"""What the evaluate stage refuses before it samples; held-out metrics that do not depend on the layout."""

from pathlib import Path

import pytest
from engine.fixed_rollouts import rollouts
from engine.layouts import LAYOUTS, frozen
from ranks import run_ranks
from trainer.tiny_runs import configure, join, train

from rto_megatron.config.schema import EvaluateStage
from rto_megatron.config.training import ParallelConfig, RoleGridConfig, RoleName
from rto_megatron.data.cut import Layout
from rto_megatron.data.tokenizer import tokenizer_fingerprint
from rto_megatron.data.true_reward import TrueReward
from rto_megatron.errors import UserError
from rto_megatron.parallel.topology import Topology
from rto_megatron.platform.device import prepare
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.evaluate import evaluate, kl_to_reference
from rto_megatron.types import WHOLE


def _config(files: Path, run_dir: Path, num_prompts: int, true_reward: Path | None = None) -> EvaluateStage:
    return EvaluateStage.model_validate(
        {
            "stage": "evaluate",
            "run": {"dir": run_dir},
            "precision": {"dtype": "fp32"},
            "models": {"policy": files / "models/policy", "reference": files / "models/reference"},
            "data": {
                "eval": str(files / "prompts.jsonl"),
                "eval_samples": num_prompts,
                "max_prompt_tokens": 100,
            },
            "sampling": {"max_response_tokens": 8},
            "evaluate": {"name": "SFT", "true_reward": true_reward},
        }
    )


def _evaluate(config: EvaluateStage) -> str:
    try:
        evaluate(config, join(config))
    except UserError as error:
        return str(error)
    return "not refused"


def test_fewer_prompts_than_replicas_are_refused_on_every_rank(files: Path, tmp_path: Path) -> None:
    for error in run_ranks(2, _evaluate, _config(files, tmp_path, num_prompts=1)):
        assert "1 prompts cannot be shared by 2 replicas" in error


def test_a_true_reward_of_another_tokenizer_is_refused_before_sampling(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "true_reward.json"
    (missing,) = run_ranks(1, _evaluate, _config(files, tmp_path, 2, path))
    assert f"true reward {path} does not exist" in missing
    own = tokenizer_fingerprint(files / "models/policy")
    answers = []
    for fingerprint in ("other", own):
        TrueReward({}, {}, 0.0, 2, 0.0, 1.0, 1.0, 0, fingerprint).save(path)
        answers += run_ranks(1, _evaluate, _config(files, tmp_path, 2, path))
    assert f"{path} was written for another tokenizer than the one in {files / 'models/policy'}" in answers[0]
    assert "token_file is not set" in answers[1]  # the pool, which this configuration does not name


def _kl(files: Path, num_replicas: int, roles: dict[RoleName, RoleGridConfig]) -> list[float]:
    place = Topology.init(prepare(), ParallelConfig(roles=roles), seed=1)
    policy = frozen(place, files / "models/policy", is_scalar=False)
    reference = frozen(place.of("reference"), files / "models/reference", is_scalar=False)
    own = rollouts()[place.data_rank :: num_replicas]
    layout = Layout(2, True, place.row_multiple, place.device.torch_device)
    return kl_to_reference(own, policy, reference, layout, WHOLE)


def test_the_kl_to_a_reference_of_another_layout_is_that_of_one_rank(files: Path) -> None:
    (alone,) = run_ranks(1, _kl, files, 1, {})
    for rank, found in enumerate(
        run_ranks(2, _kl, files, 2, {"reference": RoleGridConfig(tensor=2, sequence=True)})
    ):
        assert found == pytest.approx(alone[rank::2], rel=1e-4)


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_one_held_out_row_is_measured_alike_on_one_and_two_replicas(
    stage: str, files: Path, tmp_path: Path
) -> None:
    data = files / ("sft.jsonl" if stage == "sft" else "pairs.jsonl")
    evals = []
    for layout in ("one", "dp2"):
        run_dir = tmp_path / layout
        config = configure(
            stage, files, run_dir, layout, run__steps=1, data__eval=str(data), data__eval_samples=1
        )
        assert run_ranks(LAYOUTS[layout][0], train, config) == [None] * LAYOUTS[layout][0]
        (entry,) = read_metrics(run_dir)
        evals.append({name: value for name, value in entry.items() if name.startswith("eval/")})
    assert "eval/loss" in evals[0]
    assert evals[1] == pytest.approx(evals[0], rel=1e-4)
