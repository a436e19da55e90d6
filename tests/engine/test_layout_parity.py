"""One optimizer step of every registered method, through its whole stage, moves the weights alike at every layout."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS
from megatron.core import parallel_state
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor
from trainer.tiny_runs import ENGINE_VOCAB, HeldPush, configure, join, write_files

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.config.schema import STAGES, ActorCriticStage, OfflineStage, ReinforcementStage, Stage
from rto_megatron.engine.build_roles import place_frozen
from rto_megatron.engine.export import export_hf
from rto_megatron.engine.source import find_source
from rto_megatron.generation.contract import Sampling
from rto_megatron.generation.scripted import ScriptedEngine
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.connected_pool import ConnectedPool
from rto_megatron.trainer.offline import train_offline
from rto_megatron.trainer.online import train_online
from rto_megatron.types import Prompt, Rollout

SGD = {"kind": "sgd", "max_grad_norm": None, "warmup_fraction": 0.0}
# Gradients differ in size by method, and a tensor that hardly moves shows nothing but the rounding of its weights.
LR = {"reward_model": 20.0, "dpo": 10.0, "rdpo": 10.0, "tdpo": 10.0, "kto": 20.0}
OTHER_LR, CRITIC_LR = 1.0, 0.25
BATCH = 16  # pairs, answers or responses of the step
GROUP = 4  # responses to a prompt, where a method compares them; their step has two updates, so that ratios leave 1
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
    options: str = ""  # of OPTIONS
    roles: str = ""  # of ROLES

    @property
    def folder(self) -> str:
        """The name of the run's folder."""
        options = "".join(f"-{one}" for one in (self.options, self.roles) if one)
        return f"{self.stage}-{self.layout}-{'packed' if self.packed else 'padded'}{options}"

    @property
    def oracle(self) -> "Case":
        """The same on one rank."""
        options = "" if self.options == "recompute" else self.options
        return replace(self, layout="one", packed=True, roles="", options=options)


OPTIONS: Mapping[str, Mapping[str, object]] = {
    "": {},
    # The pool's log-probs are those of uniform draws: some weights are at the cap, others below 1. Each tensor rank
    # bans the end-of-sequence tokens among its own columns, or none.
    "capped": {
        "algorithm__pool_importance_cap": 1.2,
        "sampling__min_response_tokens": 5,
        "optimizer__lr": 1.5,
    },
    # Entropies are sums over the shards of the vocabulary, here without the banned tokens and at a temperature.
    "entropy": {
        "algorithm__entropy_coef": 0.5,
        "sampling__temperature": 0.7,
        "sampling__min_response_tokens": 5,
    },
    # Micro-batches of every layout by tokens, and what a phase does without in host memory.
    "recompute": {"precision__recompute": True},
    "tokens": {
        "batch__micro": None,
        "batch__tokens": 60,
        "offload": ("reference", "reward", "dpo", "gradients", "optimizer"),
    },
}
# Layouts of single roles, beside that of the policy.
ROLES: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "": {},
    "critic_dp": {"critic": {}},
    "critic_tp": {"critic": {"tensor": 2}},
    "reward_tp": {"reward": {"tensor": 2}},
    "reference_tp": {"reference": {"tensor": 2, "sequence": True}},
    "frozen": {"reference": {"tensor": 2, "sequence": True}, "dpo": {"pipeline": 2}, "reward": {}},
    "uneven": {"reference": {"pipeline": 2, "stages": (3, 1)}, "critic": {"pipeline": 2, "stages": "auto"}},
    "critic_cp": {"critic": {"context": 2, "context_scheme": "gather"}},
    # On ranks of their own.
    "own_critic": {"critic": {"ranks": "2-3"}},
    "own_critic_and_reward": {"critic": {"ranks": "2-3", "tensor": 2}, "reward": {"ranks": "2-3"}},
    "own_frozen": {"reference": {"ranks": "2-3"}, "reward": {"ranks": "2-3", "pipeline": 2}, "critic": {}},
    "own_last": {"critic": {"ranks": "2"}, "reference": {"ranks": "2"}},
    "own_reference": {"reference": {"ranks": "2"}},
}
WITH_ROLES = [
    Case("rto", "tp2", roles="critic_dp"),
    Case("rto", "pp2", roles="reward_tp"),
    Case("ppo", "dp2", roles="critic_tp"),
    Case("rto", "tp2_pp2", roles="critic_dp"),
    Case("rto", "dp2", packed=False, roles="frozen"),
    Case("rto", "tp2", options="tokens", roles="critic_dp"),
    Case("rto", "dp2", options="tokens", roles="critic_tp"),
    Case("rto", "dp2", packed=False, options="tokens", roles="frozen"),
    Case("kto", "dp2", roles="reference_tp"),
    Case("rto", "tp2_of_4", roles="own_critic"),
    Case("rto", "tp2_of_4", options="tokens", roles="own_critic_and_reward"),
    Case("rto", "tp2_of_4", packed=False, roles="own_frozen"),
    Case("ppo", "pp2_of_3", roles="own_last"),
    Case("grpo", "dp2_of_3", roles="own_reference"),
    Case("kto", "dp2_of_3", roles="own_reference"),
]
# Rows that are cut over context ranks: every kind of loss alone, the dimensions together for two.
CUT_ROWS = [
    *(Case(stage, "cp2") for stage in ("sft", "reward_model", "dpo", "kto", "rto", "grpo")),
    Case("tdpo", "cp2_gather", packed=False),
    Case("rto", "cp2_gather", options="entropy"),
    Case("rto", "cp2", options="tokens"),
    Case("rto", "cp2_gather", packed=False, options="recompute"),
    Case("dpo", "tp2_cp2_sp", options="recompute"),
    Case("rto", "cp2_pp2"),
    Case("rto", "cp2", roles="critic_dp"),
    Case("ppo", "cp2", roles="critic_cp"),
]
# Interleaved pipelines: every kind of loss alone, other dimensions beside them for two.
INTERLEAVED = [
    *(Case(stage, "pp2_v2") for stage in ("sft", "reward_model", "dpo", "simpo", "kto", "rto", "grpo")),
    Case("tdpo", "pp2_v2", packed=False),
    Case("rto", "pp2_v2", options="tokens"),
    Case("rto", "pp2_v2", options="recompute", roles="uneven"),
    Case("dpo", "pp2_uneven"),
    Case("rto", "pp2_uneven"),
]
INTERLEAVED_ON_FOUR = [
    Case(stage, layout)
    for layout in ("tp2_pp2_v2_sp", "cp2_pp2_v2", "pp2_v2_dp2")
    for stage in ("dpo", "rto")
]
# Methods that compare groups run with RTO's token reward: without it their advantages are a part of these.
GROUPED = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo")
# The reference's hidden states are gathered under sequence parallelism, and padded rows are longer than their answers.
TDPO = [
    Case("tdpo", "tp2_sp"),
    Case("tdpo", "one", packed=False),
    Case("tdpo", "tp2_sp", packed=False),
]
WITH_OPTIONS = [("rto", "capped"), ("rto", "entropy")]
# tools/layout_matrix.py has every method here too; four ranks cost the most.
AT_TP_PP = ("dpo", "tdpo", "rto")
# One of each kind of loss; those that are left out differ in what they pay, which no layout sees.
KINDS = ("sft", "reward_model", "dpo", "tdpo", "kto", "ppo", "rto", "reinforce_pp", "grpo", "gspo")
GROUPS_OF_REPLICAS = (*KINDS, *GROUPED)
AT = {"tp2": tuple(ALGORITHMS), "pp2": KINDS, "dp2": GROUPS_OF_REPLICAS, "tp2_pp2": AT_TP_PP}
CASES = [
    *(Case(stage, layout) for layout in METHODS_AT for stage in ALGORITHMS if stage in AT[layout]),
    *TDPO,
    *(Case(stage, layout, options=options) for layout in METHODS_AT for stage, options in WITH_OPTIONS),
    Case("sft", "tp4"),  # a key-value head on two tensor ranks
    Case("rto", packed=False, options="capped"),
    Case("rto", packed=False, options="entropy"),
    *WITH_ROLES,
    *CUT_ROWS,
    *INTERLEAVED,
]
ON_ONE_RANK = [
    *map(Case, ALGORITHMS),
    *(Case(stage, options=options) for stage, options in WITH_OPTIONS),
    Case("rto", options="tokens"),
]


def _configuration(case: Case, root: Path) -> Stage:
    method = ALGORITHMS[case.stage]
    sections = {"optimizer": LR.get(case.stage, OTHER_LR)}
    keys = {"batch__train": BATCH, "batch__micro": 4, "batch__packed": case.packed, "run__steps": 1}
    if isinstance(method, OnlineMethod):
        keys["batch__rollout"] = BATCH
        if method.config().samples_per_prompt > 1:
            groups = {"algorithm__samples_per_prompt": GROUP, "batch__rollout": BATCH // GROUP}
            keys |= {**groups, "batch__train": BATCH // 2}
        if case.stage in GROUPED:
            keys |= {"algorithm__beta_dpo": 0.05, "algorithm__dpo_clip": None}
        if method.has_critic:
            sections["critic_optimizer"] = CRITIC_LR
    for section, lr in sections.items():
        keys |= {f"{section}__{name}": value for name, value in {**SGD, "lr": lr}.items()}
    if case.stage == "kto":  # a reference whose KL estimate is not cut at 0
        keys["models__reference"] = root / "models/dpo"
    if case.stage == "semi_rto":  # the tiny language has no punctuation
        keys["algorithm__delimiters"] = ("e",)
    keys |= {**OPTIONS[case.options], "parallel__roles": ROLES[case.roles]}
    return configure(case.stage, root, root / case.folder, case.layout, **keys)


def run_cases(cases: Sequence[Case], root: Path) -> None:
    """Trains one case after the other as one rank; exports the critic beside what the run itself exports."""
    for case in cases:
        config = _configuration(case, root)
        place = join(config)
        if isinstance(config, ReinforcementStage):
            engine = PromptEngine(ENGINE_VOCAB) if place.is_replica_lead else None
            train_online(config, place, ConnectedPool(engine, HeldPush(engine)))
        else:
            assert isinstance(config, OfflineStage)
            train_offline(config, place)
        if isinstance(config, ActorCriticStage):
            source = find_source(config.run.dir, has_scalar_head=True, is_random=False, key="test")
            critic = place_frozen("critic", source, True, config.precision, place)
            export_hf(critic, source.hf_folder, config.run.dir / "critic_hf")
        # What is not given its groups would take those of another role there, without a word.
        assert not parallel_state.model_parallel_is_initialized()


_TRAINED: set[tuple[str, Path]] = set()  # layouts whose cases have run, with the folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and models, and the runs of every layout that a test asked for."""
    folder = tmp_path_factory.mktemp("parity")
    write_files(folder)
    return folder


def _weights(case: Case, root: Path) -> dict[str, Tensor]:
    """Whole tensors after the step, by model and Hugging Face name; trains all cases of the layout at first."""
    if (case.layout, root) not in _TRAINED:
        of_layout = [one for one in (*CASES, *INTERLEAVED_ON_FOUR) if one.layout == case.layout]
        if case.layout == "one":
            of_layout += ON_ONE_RANK
        run_ranks(LAYOUTS[case.layout][0], run_cases, of_layout, root, timeout_seconds=300)
        _TRAINED.add((case.layout, root))
    return weights_of(root / case.folder)


def weights_of(run_dir: Path) -> dict[str, Tensor]:
    """Whole tensors that a case exported, by model and Hugging Face name."""
    return {
        f"{role}/{name}": tensor
        for role, export in (("policy", "hf"), ("critic", "critic_hf"))
        for file in sorted((run_dir / export).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def start_of(root: Path) -> dict[str, Tensor]:
    """Those that policy and critic start from."""
    return {
        f"{role}/{name}": tensor
        for role in ("policy", "critic")
        for name, tensor in load_file(root / "models" / role / "model.safetensors").items()
    }


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in INTERLEAVED_ON_FOUR)],
    ids=lambda case: case.folder,
)
def test_a_step_moves_the_weights_as_on_one_rank(case: Case, root: Path) -> None:
    want, got, start = _weights(case.oracle, root), _weights(case, root), start_of(root)
    assert got.keys() == want.keys()
    has_critic = any(name.startswith("critic/") for name in want)
    assert has_critic == issubclass(STAGES[case.stage], ActorCriticStage)
    moved, apart = {}, {}
    for name, tensor in want.items():
        # The head of a reward model is fresh: it starts at no file's weights.
        change = tensor - start[name] if name in start else tensor
        moved[name] = float(change.norm() / tensor.norm())
        apart[name] = float((got[name] - tensor).norm() / change.norm())
    worst = max(apart, key=apart.__getitem__)
    of_weights = _norm([got[name] - want[name] for name in want]) / _norm(want.values())
    print(
        f"{case.folder}: apart by {apart[worst]:.1e} of the change of {worst}, {of_weights:.1e} of all weights; "
        f"tensors moved by {min(moved.values()):.1e} to {max(moved.values()):.1e}"
    )
    assert min(moved.values()) > 2e-3, "moves too little to compare: choose another LR"
    assert apart[worst] < 1e-5, worst
    assert of_weights < 1e-6


@pytest.mark.parametrize("case", WITH_ROLES, ids=lambda case: case.folder)
def test_a_step_measures_what_it_does_on_one_rank(case: Case, root: Path) -> None:
    for one in (case, case.oracle):
        _weights(one, root)
    (got,), (want,) = (_of_models(read_metrics(root / one.folder)) for one in (case, case.oracle))
    assert got == pytest.approx(want, rel=1e-4, abs=1e-6)


def _of_models(steps: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Metrics of a run without those of the machine."""
    return [
        {name: value for name, value in step.items() if not name.startswith(("time/", "memory/"))}
        for step in steps
    ]


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


def test_the_steps_are_worth_comparing(root: Path) -> None:
    """Each method moves the policy its own way, and what could hide a missing reduction is not 0."""
    name = "policy/model.layers.0.mlp.down_proj.weight"
    ends = {case.folder: _weights(case, root)[name] for case in ON_ONE_RANK}
    same = [(one, other) for one, other in combinations(ends, 2) if ends[one].equal(ends[other])]
    assert same == []
    kto, tdpo, grpo = (read_metrics(root / Case(stage).folder)[0] for stage in ("kto", "tdpo", "grpo"))
    assert min(kto["kl"], tdpo["kl/chosen"], tdpo["kl/rejected"], grpo["loss/kl_avg"]) > 0.01
    (capped,) = read_metrics(root / Case("rto", options="capped").folder)
    assert 0.01 < capped["pool/importance_capped_fraction"] < 0.99
