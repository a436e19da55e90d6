"""A whole run through the stages' own loop computes with TransformerEngine's layers, and torch's optimizer."""

from pathlib import Path

import pytest
import torch
from fused import standin
from megatron.core import optimizer
from megatron.core.extensions.transformer_engine import HAVE_TE
from ranks import run_ranks
from trainer.tiny_runs import configure, train, write_files

from rto_megatron.reporting.metrics import read_metrics


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, models and data."""
    root = tmp_path_factory.mktemp("files")
    write_files(root)
    return root


def _run(stage: str, files: Path, run_dir: Path, layout: str) -> set[str]:
    config = configure(
        stage, files, run_dir, layout, precision={"dtype": "bf16", "kernels": "auto"}, run__steps=2,
        run__save_every=1,
    )  # fmt: skip
    standin.CALLS.clear()
    assert train(config) is None
    return set(standin.CALLS)


@pytest.mark.parametrize(("stage", "layout", "ranks"), [("rto", "tp2_sp", 2), ("dpo", "one", 1)])
def test_a_run_computes_with_the_kernels_of_its_process(
    stage: str, layout: str, ranks: int, files: Path, tmp_path: Path
) -> None:
    kernels = {"Linear", "LayerNormLinear", "RMSNorm", "DotProductAttention thd padding_causal"}
    assert run_ranks(ranks, _run, stage, files, tmp_path, layout) == [kernels] * ranks
    assert len(read_metrics(tmp_path)) == 2


def test_the_optimizer_is_torchs_where_transformer_engine_is_installed() -> None:
    assert HAVE_TE
    assert (optimizer.Adam, optimizer.SGD) == (torch.optim.AdamW, torch.optim.SGD)
