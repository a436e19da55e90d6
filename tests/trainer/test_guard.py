"""Poisoned numbers never reach the weights: nothing of a refused update stays in any model, on any rank."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS
from ranks import run_ranks
from trainer.test_faults import place_of, poison, rare_prompt
from trainer.tiny_runs import ENGINE_VOCAB, HeldPush, configure, join

from rto_megatron.config.schema import ReinforcementStage, Stage
from rto_megatron.engine.megatron import TrainedModel
from rto_megatron.errors import UserError
from rto_megatron.generation.contract import Sampling
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.guard import POISONED_FILE, SKIPPED, NotFiniteError
from rto_megatron.trainer.offline import _store_scale, train_offline
from rto_megatron.trainer.online import train_online
from rto_megatron.trainer.run import Run
from rto_megatron.types import Prompt, Rollout

Change = Callable[[Rollout], Rollout]


class PoisonedEngine(ScriptedEngine):
    """Applies `change` to the response `index` of version `at`; None: to all of them."""

    def __init__(self, change: Change | None, index: int | None = 0, at: int = 1) -> None:
        super().__init__(ENGINE_VOCAB)
        self._change, self._index, self._at = change, index, at

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """Draws as ScriptedEngine does, with the poison."""
        drawn = super().generate(prompts, sampling, version)
        if self._change is None or version != self._at:
            return drawn
        return [self._change(r) if self._index in (None, i) else r for i, r in enumerate(drawn)]


def _hash(value: object, into: "hashlib._Hash") -> None:
    """Tensors and numbers of a state, in order; the learning rate is no state of the optimizer."""
    if isinstance(value, torch.Tensor):
        into.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key, part in value.items():
            if key != "lr":
                into.update(str(key).encode())
                _hash(part, into)
    elif isinstance(value, list | tuple):
        for part in value:
            _hash(part, into)
    else:
        into.update(str(value).encode())


def _digest(model: TrainedModel) -> str:
    own = hashlib.sha256()
    _hash([list(model.module.parameters()), model.optimizer.state_dict()], own)
    return own.hexdigest()


def _watched(config: Stage, engine: PoisonedEngine | None) -> tuple[list[dict[str, str]], str]:
    """What this rank's trained models were before the first step and after each, and the error that ended the run."""
    seen: list[dict[str, str]] = []
    steps, log = Run.steps, Run.log

    def look(run: Run) -> None:
        seen.append({n: _digest(m) for n, m in run._models.items() if isinstance(m, TrainedModel)})

    def watched_steps(run: Run) -> Iterator[int]:
        look(run)
        return steps(run)

    def watched_log(run: Run, *values: object) -> dict[str, float]:
        look(run)
        return log(run, *values)

    Run.steps, Run.log = watched_steps, watched_log  # of this rank's process, which ends after the test
    place = join(config)
    try:
        if isinstance(config, ReinforcementStage):
            engine = engine if place.is_replica_lead else None
            train_online(config, place, ConnectedPool(engine, HeldPush(engine)))
        else:
            train_offline(config, place)
    except UserError as error:
        return seen, f"{error.reason} {error}"
    return seen, ""


def _refusals(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / POISONED_FILE).read_text().splitlines()]


def _only_step_2_is_skipped(
    config: Stage, layout: str, change: Change | None = None, index: int | None = 0
) -> dict[str, list[str]]:
    """Runs three steps of one update each, of which the second is poisoned; returns what was found then."""
    for seen, error in run_ranks(LAYOUTS[layout][0], _watched, config, PoisonedEngine(change, index)):
        assert error == ""
        assert len(seen) == 4
        assert seen[1] == seen[2]
        for role in seen[0]:
            assert len({seen[0][role], seen[1][role], seen[3][role]}) == 3, role
    skipped = [entry[SKIPPED] for entry in read_metrics(config.run.dir)]
    assert skipped == [0.0, 1.0, 0.0]
    (refusal,) = _refusals(config.run.dir)
    assert refusal["step"] == 2
    found = refusal["found"]
    assert isinstance(found, dict)
    return found


def _plan(monkeypatch: pytest.MonkeyPatch, folder: Path, fault: str) -> None:
    monkeypatch.setenv("RTO_FAULT", fault)
    monkeypatch.setenv("RTO_FAULT_LOG", str(folder / "faults.log"))


@pytest.mark.parametrize(
    ("stage", "layout", "fault"),
    [
        ("rto", "one", "fwd_bwd:2:0:nan"),
        ("rto", "dp2", "fwd_bwd:2:1:nan"),
        # One tensor rank of the last pipeline stage: the other ranks see nothing wrong in their own loss.
        ("rto", "tp2_pp2", "fwd_bwd:2:3:nan"),
        ("rto", "dp2", "logprob:2:1:nan"),
        ("sft", "dp2", "fwd_bwd:2:1:nan"),
        ("dpo", "pp2", "fwd_bwd:2:1:nan"),
    ],
)
def test_nan_on_one_rank_steps_no_model_on_any(
    stage: str, layout: str, fault: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plan(monkeypatch, tmp_path, fault)
    size = {"batch__train": 8} if stage == "rto" else {}
    config = configure(stage, files, tmp_path / "run", layout, run__steps=3, **size)
    found = _only_step_2_is_skipped(config, layout)
    (what,) = found
    expected = "a log-prob of the policy" if "logprob" in fault else "the loss of policy"
    assert what == f"{expected} is NaN or infinite"
    assert found[what] and all(name.startswith("p") for name in found[what])
    assert (tmp_path / "faults.log").read_text().splitlines() == [fault]


def _without_tokens(rollout: Rollout) -> Rollout:
    return replace(rollout, response_ids=(), sampled_logprobs=())


@pytest.mark.parametrize(
    ("change", "index", "what"),
    [
        (_without_tokens, None, "a response has no token"),
        (
            lambda r: replace(r, response_ids=(*r.response_ids[:-1], 5), finish_reason="stop"),
            0,
            "a finished response has no end-of-sequence",
        ),
        (
            lambda r: replace(r, sampled_logprobs=(float("nan"),) * len(r.response_ids)),
            0,
            "a log-prob of the pool is NaN or infinite",
        ),
    ],
)
def test_broken_responses_are_not_trained_on(
    change: Change, index: int | None, what: str, files: Path, tmp_path: Path
) -> None:
    config = configure("rto", files, tmp_path / "run", "dp2", run__steps=3, batch__train=8)
    found = _only_step_2_is_skipped(config, "dp2", change, index)
    assert list(found) == [what]
    # Both replicas have a broken first response, and the file names the samples of all replicas.
    assert len(found[what]) == (8 if index is None else 2)


def test_a_step_whose_responses_are_all_cut_is_not_stepped_by_momentum(files: Path, tmp_path: Path) -> None:
    def cut(rollout: Rollout) -> Rollout:
        return replace(rollout, finish_reason="length")

    config = configure(
        "rto", files, tmp_path / "run", run__steps=3, batch__train=8, algorithm__truncated="mask"
    )
    (what,) = _only_step_2_is_skipped(config, "one", cut, None)
    assert what == "every response is cut and algorithm.truncated=mask trains on none"


def test_a_run_in_which_every_response_is_cut_is_told_what_to_change(files: Path, tmp_path: Path) -> None:
    def cut(rollout: Rollout) -> Rollout:
        return replace(rollout, finish_reason="length")

    config = configure(
        "rto",
        files,
        tmp_path / "run",
        batch__train=8,
        algorithm__truncated="mask",
        run__max_skipped_updates=1,
    )
    engine = PoisonedEngine(cut, None, at=0)
    ((_, error),) = run_ranks(1, _watched, config, engine)
    assert error.startswith(
        "CONFIG step 1: 1 updates in a row were refused, the last because every response is"
    )
    assert "a larger sampling.max_response_tokens" in error


@pytest.mark.parametrize("role", ["dpo", "reward"])
def test_the_one_step_with_a_poisoned_sample_is_skipped(role: str, files: Path, tmp_path: Path) -> None:
    token, prompts = rare_prompt(files, tmp_path)
    bad = poison(files / "models" / role, tmp_path / role, token)
    config = configure(
        "rto", files, tmp_path / "run", run__steps=2, batch__train=8, data__train=prompts,
        **{f"models__{role}": bad},
    )  # fmt: skip
    ((seen, error),) = run_ranks(1, _watched, config, PoisonedEngine(None))
    assert error == ""
    (refusal,) = _refusals(tmp_path / "run")
    assert list(refusal["found"].values()) == [["rare"]]
    for step in (1, 2):
        for name, digest in seen[step].items():
            assert (digest == seen[step - 1][name]) == (step == refusal["step"]), (step, name)


@pytest.mark.parametrize("layout", ["one", "dp2"])
def test_scores_of_1e9_are_refused_until_the_run_stops(layout: str, files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "models/reward", tmp_path / "reward")
    path = tmp_path / "reward/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mean": 0.0, "std": 1e-9}))
    config = configure(
        "rto", files, tmp_path / "run", layout, run__steps=4, run__save_every=1, run__max_skipped_updates=2,
        batch__train=8, models__reward=tmp_path / "reward",
    )  # fmt: skip
    for seen, error in run_ranks(LAYOUTS[layout][0], _watched, config, PoisonedEngine(None)):
        assert len({json.dumps(one) for one in seen}) == 1
        assert error.startswith("NAN step 2: 2 updates in a row were refused")
        assert "beyond algorithm.score_limit=1000" in error
    assert [len(next(iter(one["found"].values()))) for one in _refusals(tmp_path / "run")] == [8, 8]
    assert (tmp_path / "run/checkpoints/step_000001").is_dir()
    assert not (tmp_path / "run/checkpoints/step_000002").exists()


def test_a_reward_model_without_finite_scores_stores_no_scale(tmp_path: Path) -> None:
    means = {"mean_reward": float("nan"), "mean_squared_reward": float("nan")}
    with pytest.raises(NotFiniteError, match="scores the held-out pairs with mean nan"):
        _store_scale(means, 3, tmp_path, place_of(1, 1))


def test_dpo_with_a_reference_that_gives_nan_names_the_pairs_and_stops(files: Path, tmp_path: Path) -> None:
    token, _ = rare_prompt(files, tmp_path)
    bad = poison(files / "models/reference", tmp_path / "reference", token)
    config = configure(
        "dpo", files, tmp_path / "run", "dp2", run__steps=4, run__max_skipped_updates=1,
        models__reference=bad, batch__train=20, batch__micro=1,
    )  # fmt: skip
    for seen, error in run_ranks(2, _watched, config, None):
        assert seen == seen[:1]
        assert "step 1: 1 updates in a row were refused, the last because the loss of policy" in error
    (refusal,) = _refusals(tmp_path / "run")
    (ids,) = refusal["found"].values()
    assert 0 < len(ids) < 20


def test_refusals_in_a_row_count_on_in_a_resumed_run(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plan(monkeypatch, tmp_path, ",".join(f"fwd_bwd:{step}:0:nan" for step in (2, 3, 4)))
    shorter, whole = (configure("sft", files, tmp_path / "run", run__steps=steps) for steps in (3, 4))
    ((_, error),) = run_ranks(1, _watched, shorter, None)
    assert error == ""
    ((_, error),) = run_ranks(1, _watched, whole, None)
    assert error.startswith("NAN step 4: 3 updates in a row were refused")
