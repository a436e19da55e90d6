"""The furthest tensor between two runs is found, and a matrix of layouts is printed and judged by it."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rto_megatron.proofs.step_parity import CRITIC_EXPORT, WorstTensor, worst_tensors

ROOT = Path(__file__).parents[2]


def _write(folder: Path, **tensors: list[float]) -> Path:
    folder.mkdir(parents=True)
    save_file(
        {name: torch.tensor(numbers) for name, numbers in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def test_the_furthest_tensor_is_told_over_what_the_step_changed_in_it(tmp_path: Path) -> None:
    start = {role: _write(tmp_path / role, a=[3.0, 4.0], b=[1.0, 0.0]) for role in ("policy", "critic")}
    for run in ("one", "other"):
        # a moved by 0.5 of its 5.5, b by 2 of its 3; the head has no beginning.
        _write(tmp_path / run / "hf", a=[3.3, 4.4], b=[3.0, 0.0] if run == "one" else [3.0, 0.2], head=[2.0])
        b = [2.0, 0.0] if run == "one" else [math.nan, 0.0]
        _write(tmp_path / run / CRITIC_EXPORT, a=[6.0, 8.0], b=b)
    found = worst_tensors(start, tmp_path / "one", tmp_path / "other")
    policy = found["policy"]
    assert policy.name == "b"
    assert policy.apart == pytest.approx(0.2 / 2)
    assert policy.moved == pytest.approx(0.5 / 5.5)
    assert found["critic"] == WorstTensor("b", math.inf, pytest.approx(0.5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tolerance", "code", "said"), [("2e-5", 0, "2 of 2 cells"), ("1e-12", 1, "0 of 2 cells")]
)
def test_the_matrix_ends_with_an_error_where_a_cell_is_too_far_away(
    tolerance: str, code: int, said: str
) -> None:
    given = ["--methods", "ppo", "--layouts", "tp2", "own_critic", "--tolerance", tolerance]
    command = [sys.executable, str(ROOT / "tools/layout_matrix.py"), *given]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    print(ended.stdout, ended.stderr)
    assert ended.returncode == code
    assert said in ended.stdout and "own_critic: 1 methods on 4 ranks" in ended.stdout
