"""A mixture whose experts lie on different ranks is pushed to a real vLLM server after every step."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine.layouts import LAYOUTS
from pool_server import VOCAB_SIZE, PoolServer, start_pool_server
from ranks import run_ranks
from tiny_families import write_family
from trainer.pool_runs import require_served, three_steps
from trainer.tiny_runs import join
from transformers import AutoConfig

from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.trainer.online import train_online

pytestmark = [pytest.mark.pool, pytest.mark.slow]


@pytest.fixture(scope="module")
def mixture_files(pool_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pool_files` has, with a mixture as the policy, which is the reference and the DPO model too."""
    root = tmp_path_factory.mktemp("mixture")
    shutil.copytree(pool_files, root, dirs_exist_ok=True)
    for role in ("policy", "reference", "dpo"):
        shutil.rmtree(root / "models" / role)
        write_family(root / "models" / role, "qwen3_moe", vocab_size=VOCAB_SIZE)
        for file in (pool_files / "models" / role).glob("*token*"):
            shutil.copy(file, root / "models" / role)
    return root


@pytest.fixture(scope="module")
def server(mixture_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolServer]:
    """A server with random weights of the mixture."""
    config = AutoConfig.from_pretrained(mixture_files / "models/policy")
    yield from start_pool_server(tmp_path_factory.mktemp("server"), config)


def _train(config: ReinforcementStage) -> None:
    train_online(config, join(config))


@pytest.mark.parametrize("layout", ["ep2", "ep2_pp2", "ep2_pp2_v2"])
def test_the_pool_samples_with_the_experts_of_every_step(
    layout: str, mixture_files: Path, server: PoolServer, tmp_path: Path
) -> None:
    config = three_steps(tmp_path / "run", mixture_files, server, layout)
    run_ranks(LAYOUTS[layout][0], _train, config)
    require_served(tmp_path / "run", mixture_files, server)
