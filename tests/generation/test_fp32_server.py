"""A server with parts in fp32: what vLLM is told, and the norm that its layers get."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rto_megatron.cli.pool import _parts
from rto_megatron.config.load import load_recipe
from rto_megatron.generation.vllm.start.server import ServerOptions, _command
from rto_megatron.launching.slurm_job import _pool_options

OPTIONS = ServerOptions(Path("model"), Path("token"), Path("log"))
RECIPE = Path(__file__).parents[2] / "launchers/recipes/quickstart/rto.yaml"
WORKER = "rto_megatron.generation.vllm.worker"


def test_vllm_reads_the_dtype_of_the_head_and_the_extension() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def read(options: ServerOptions) -> tuple[object, object]:
        given = make_arg_parser(FlexibleArgumentParser()).parse_args(_command(options, 8000)[3:])
        return given.hf_overrides, given.worker_extension_cls

    plain, wide = f"{WORKER}.plugin.RtoWorkerExtension", f"{WORKER}.fp32_residual.Fp32ResidualExtension"
    assert read(OPTIONS) == ({}, plain)
    assert read(replace(OPTIONS, fp32_parts=("head",))) == ({"head_dtype": "float32"}, plain)
    assert read(replace(OPTIONS, fp32_parts=("residual",))) == ({}, wide)
    assert read(replace(OPTIONS, fp32_parts=("residual",), dtype="fp32")) == ({}, plain)


def test_a_batch_job_tells_its_servers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = load_recipe(RECIPE, [f"models.policy={tmp_path}", "precision.fp32_parts=[head,residual]"])
    given = [one for one in _pool_options(config, 1, 1) if one.startswith("--fp32")]
    assert given == ["--fp32-head", "--fp32-residual"]
    assert _parts(True, True) == ["head", "residual"]
    assert _parts(False, False) == []


def test_vllms_layers_get_a_norm_that_keeps_the_sum_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import custom_op
    from vllm.model_executor.layers.layernorm import RMSNorm

    monkeypatch.setattr(custom_op, "op_registry_oot", dict(custom_op.op_registry_oot))
    from rto_megatron.generation.vllm.worker.fp32_residual import Fp32ResidualNorm

    custom_op.op_registry_oot["RMSNorm"] = Fp32ResidualNorm  # whoever else imported it before
    torch.manual_seed(0)
    with set_current_vllm_config(VllmConfig()):
        norm = RMSNorm(16, eps=1e-5, dtype=torch.bfloat16)
    assert isinstance(norm, Fp32ResidualNorm)
    torch.nn.init.normal_(norm.weight)
    added, before = torch.randn(3, 16).bfloat16(), torch.randn(3, 16) * 100
    with torch.no_grad():
        normed, residual = norm(added, before)
        first = norm(added)
    assert torch.equal(residual, before + added.float())
    exact = torch.nn.functional.rms_norm(residual.double(), (16,), norm.weight.double(), 1e-5)
    torch.testing.assert_close(normed, exact.bfloat16())
    exact = torch.nn.functional.rms_norm(added.double(), (16,), norm.weight.double(), 1e-5)
    torch.testing.assert_close(first, exact.bfloat16())
