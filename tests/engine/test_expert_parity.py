"""One optimizer step of mixtures whose experts lie on different ranks moves the weights as on one rank."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS
from engine.test_layout_parity import Case, run_cases, start_of, weights_of
from ranks import run_ranks
from tiny_families import write_family
from torch import Tensor
from trainer.tiny_runs import MODELS, SCALAR, write_files

FAMILIES = {"reward": "qwen3_moe", "critic": "qwen2_moe"}  # the other roles are Mixtral's
# Every loss and every output that one reads, at the cheapest layout; the others differ in where experts lie.
LOSSES = ("sft", "reward_model", "dpo", "simpo", "tdpo", "kto", "rto", "grpo")
CASES = [
    *(Case(stage, "ep2") for stage in LOSSES),
    *(Case(stage, layout) for layout in ("ep2_tp2", "ep2_pp2") for stage in ("dpo", "rto")),
    Case("rto", "ep2_tp2_etp2"),
    Case("rto", "ep2", options="tokens"),
    Case("rto", "ep2", packed=False, options="tokens"),
]
# Experts beside interleaved stages, and beside rows that are cut, on four ranks.
ON_FOUR = [
    Case(stage, layout)
    for layout in ("ep2_pp2_v2", "cp2_ep4", "cp2_ep2_pp2", "tp2_cp2_ep2_sp", "tp2_cp2_ep4_sp")
    for stage in ("dpo", "rto")
]
_TRAINED: set[str] = set()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and mixtures in the place of the dense models."""
    folder = tmp_path_factory.mktemp("experts")
    write_files(folder)
    for role, seed in MODELS.items():
        shutil.rmtree(folder / "models" / role)
        write_family(folder / "models" / role, FAMILIES.get(role, "mixtral"), role in SCALAR, seed)
        shutil.copytree(folder / "tokenizer", folder / "models" / role, dirs_exist_ok=True)
    return folder


def _train(layout: str, root: Path) -> None:
    if layout not in _TRAINED:
        cases = [case for case in (*CASES, *ON_FOUR) if case.layout == layout]
        if layout == "one":
            cases = list(dict.fromkeys(case.oracle for case in CASES))
        run_ranks(LAYOUTS[layout][0], run_cases, cases, root, timeout_seconds=300)
        _TRAINED.add(layout)


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in ON_FOUR)],
    ids=lambda case: case.folder,
)
def test_a_step_moves_mixtures_as_on_one_rank(case: Case, root: Path) -> None:
    for one in (case.oracle, case):
        _train(one.layout, root)
    want, got, start = weights_of(root / case.oracle.folder), weights_of(root / case.folder), start_of(root)
    assert got.keys() == want.keys()
    apart = {name: float((got[name] - tensor).norm() / tensor.norm()) for name, tensor in want.items()}
    moved = {
        name: float((tensor - start[name]).norm() / tensor.norm())
        for name, tensor in want.items()
        if name in start
    }
    worst = max(apart, key=apart.__getitem__)
    experts = [value for name, value in moved.items() if ".experts." in name]
    still = sum(value < 1e-3 for value in experts) / len(experts)
    print(f"{case.folder}: apart by {apart[worst]:.1e} of {worst}; {still:.2f} of the experts hardly moved")
    assert still < 0.2, "experts get no tokens, or move too little to compare: choose another LR"
    assert apart[worst] < 1e-5, worst
    of_weights = _norm([got[name] - want[name] for name in want]) / _norm(want.values())
    assert of_weights < 1e-6


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())
