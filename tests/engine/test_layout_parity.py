"""One optimizer step of every registered method, through its whole stage, moves the weights alike at every layout."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from engine.layouts import LAYOUTS
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor
from trainer.tiny_runs import ENGINE_VOCAB, HeldPush, configure, join, write_files

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.config.schema import STAGES, ActorCriticStage, OfflineStage, ReinforcementStage, Stage
from rto_megatron.engine.export import export_hf
from rto_megatron.engine.roles import build_frozen
from rto_megatron.engine.source import find_source
from rto_megatron.rollout.engine import Sampling
from rto_megatron.rollout.scripted import ScriptedEngine
from rto_megatron.trainer.metrics import read_metrics
from rto_megatron.trainer.offline import train_offline
from rto_megatron.trainer.rto import Sampler, train_rto
from rto_megatron.types import Prompt, Rollout

SGD = {"kind": "sgd", "lr": 0.5, "max_grad_norm": None, "warmup_fraction": 0.0}
BATCH = 16  # pairs, answers or responses of the step
# Keys without which a method would do nothing particular on the tiny data.
KEYS: dict[str, dict[str, object]] = {"semi_rto": {"algorithm__delimiters": ("e",)}}
METHODS_AT = ["tp2", "pp2", "dp2", "tp2_pp2"]


class PromptEngine(ScriptedEngine):
    """Draws from the prompt and the number of its sibling: a replica's share of the prompts changes nothing."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        same_everywhere = replace(sampling, seed=0)
        num_seen: Counter[str] = Counter()
        drawn = []
        for prompt in prompts:
            num_seen[prompt.id] += 1
            siblings = super().generate([prompt] * num_seen[prompt.id], same_everywhere, version)
            drawn.append(siblings[-1])
        return drawn


@dataclass(frozen=True)
class Case:
    """One run of one step."""

    stage: str
    layout: str = "one"
    packed: bool = True

    @property
    def folder(self) -> str:
        """Of the run."""
        return f"{self.stage}-{self.layout}-{'packed' if self.packed else 'padded'}"


# The reference's hidden states are gathered under sequence parallelism, and padded rows are longer than their answers.
TDPO = [
    Case("tdpo", "tp2_sp"),
    Case("tdpo", "one", packed=False),
    Case("tdpo", "tp2_sp", packed=False),
    Case("tdpo", "tp2_pp2_sp"),
]
CASES = [*(Case(stage, layout) for layout in METHODS_AT for stage in ALGORITHMS), *TDPO]


def _configuration(case: Case, root: Path) -> Stage:
    kind, method = STAGES[case.stage], ALGORITHMS[case.stage]
    keys = {f"optimizer__{name}": value for name, value in SGD.items()}
    if issubclass(kind, ActorCriticStage):
        keys |= {f"critic_optimizer__{name}": value for name, value in SGD.items()}
    if isinstance(method, OnlineMethod):
        keys["batch__rollout"] = BATCH // method.config().samples_per_prompt
    keys |= {"batch__train": BATCH, "batch__micro": 4, "batch__packed": case.packed, "run__steps": 1}
    return configure(case.stage, root, root / case.folder, case.layout, **keys, **KEYS.get(case.stage, {}))


def _run(cases: Sequence[Case], root: Path) -> None:
    """Trains one case after the other as one rank; exports the critic beside what the run itself exports."""
    for case in cases:
        config, place = _configuration(case, root), None
        place = join(config)
        if isinstance(config, ReinforcementStage):
            engine = PromptEngine(ENGINE_VOCAB) if place.is_replica_lead else None
            train_rto(config, place, Sampler(engine, HeldPush(engine)))
        else:
            assert isinstance(config, OfflineStage)
            train_offline(config, place)
        if isinstance(config, ActorCriticStage):
            source = find_source(config.run.dir, has_scalar_head=True, is_random=False, key="test")
            critic = build_frozen("critic", source, True, config.precision, place)
            export_hf(critic, source.hf_folder, config.run.dir / "critic_hf")


_ROOTS: dict[str, Path] = {}  # layout -> folder of its runs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and models, and the runs of every layout that a test asked for."""
    folder = tmp_path_factory.mktemp("parity")
    write_files(folder)
    return folder


def _weights(case: Case, root: Path) -> dict[str, Tensor]:
    """Whole tensors after the step, by model and Hugging Face name; trains all cases of the layout at first."""
    if case.layout not in _ROOTS:
        of_layout = [one for one in CASES if one.layout == case.layout]
        if case.layout == "one":
            of_layout += [Case(stage) for stage in ALGORITHMS]
        run_ranks(LAYOUTS[case.layout][0], _run, of_layout, root, timeout_seconds=300)
        _ROOTS[case.layout] = root
    return {
        f"{role}/{name}": tensor
        for role, export in (("policy", "hf"), ("critic", "critic_hf"))
        for file in sorted((root / case.folder / export).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def _start(root: Path) -> dict[str, Tensor]:
    return {
        f"{role}/{name}": tensor
        for role in ("policy", "critic")
        for name, tensor in load_file(root / "models" / role / "model.safetensors").items()
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.folder)
def test_a_step_moves_the_weights_as_on_one_rank(case: Case, root: Path) -> None:
    want, got, start = _weights(Case(case.stage), root), _weights(case, root), _start(root)
    assert got.keys() == want.keys()
    assert ("critic/lm_head.weight" in want or "critic/score.weight" in want) == issubclass(
        STAGES[case.stage], ActorCriticStage
    )
    moves, of_change, of_weights = {}, {}, {}
    for name, tensor in want.items():
        apart = (got[name] - tensor).norm()
        # The head of a reward model is fresh: it starts at no file's weights.
        change = tensor - start[name] if name in start else tensor
        moves[name] = float(change.norm() / tensor.norm())
        of_change[name], of_weights[name] = float(apart / change.norm()), float(apart / tensor.norm())
    worst = max(of_change, key=lambda name: of_change[name])
    print(
        f"{case.folder}: change {of_change[worst]:.1e} ({worst}), weights {max(of_weights.values()):.1e}, "
        f"moved {min(moves.values()):.1e} to {max(moves.values()):.1e}"
    )
    assert of_change[worst] < 1e-5, (worst, of_change[worst])
    assert max(of_weights.values()) < 1e-6


def test_the_steps_are_worth_comparing(root: Path) -> None:
    """Each method moves the policy its own way, and what could hide a missing reduction is not 0."""
    ends = {stage: _weights(Case(stage), root) for stage in ALGORITHMS}
    name = "policy/model.layers.0.mlp.down_proj.weight"
    for stage, end in ends.items():
        same = [other for other in ends if other != stage and ends[other][name].equal(end[name])]
        assert same == [], stage
    (kto,) = read_metrics(root / Case("kto").folder)
    assert kto["kl"] > 0
