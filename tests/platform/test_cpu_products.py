"""Whether a CPU multiplies bf16, and what is said of a recipe that asks it to."""

import platform
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.platform.cpu_products import multiplies_bf16, slow_dtype

RECIPE = Path(__file__).parents[2] / "launchers/recipes/real_language/dpo.yaml"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="what other CPUs need is not known here")
def test_products_of_bf16_take_avx512() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].splitlines()[0].split())
    assert multiplies_bf16() == ({"avx512vl", "avx512bw", "avx512dq"} <= flags or "avx_ne_convert" in flags)


def test_bf16_alone_is_slow_and_only_without_products() -> None:
    said = slow_dtype("bf16", has_bf16=False)
    assert said is not None and said.startswith("precision.dtype=bf16 on a CPU without products of bf16")
    assert said.endswith("set precision.dtype=fp32")
    assert slow_dtype("fp32", has_bf16=False) is None
    assert slow_dtype("bf16", has_bf16=True) is None


@pytest.mark.parametrize(
    ("keys", "is_on_cpu"), [([], True), (["precision.dtype=fp32"], False), (["--gpus", "1"], False)]
)
def test_a_check_for_this_machine_tells_it(keys: list[str], is_on_cpu: bool) -> None:
    shown = CliRunner().invoke(app, ["check", str(RECIPE), *keys])
    assert shown.exit_code == 0
    assert ("without products of bf16" in " ".join(shown.output.split())) == (
        is_on_cpu and not multiplies_bf16()
    )


def test_a_launch_tells_it_before_anything_else(tmp_path: Path) -> None:
    keys = [f"vars.root={tmp_path}", f"vars.model={tmp_path / 'missing'}"]
    told = CliRunner().invoke(app, ["launch", str(RECIPE), *keys])
    assert told.exit_code and "missing" in str(told.exception)
    is_slow = not (torch.cuda.is_available() or multiplies_bf16())
    assert ("without products of bf16" in told.stderr) == is_slow
