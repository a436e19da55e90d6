"""The whole loop against a real vLLM server, weights pushed from Megatron shards at several layouts."""

import shutil
from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS
from pool_server import VOCAB_SIZE, PoolServer, tiny_llama
from ranks import run_ranks
from tiny_models import write_llama
from trainer.tiny_runs import MODELS, SCALAR, configure, join
from transformers import AutoModelForCausalLM

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.method import OnlineMethod
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.rollout.client import ServerClient
from rto_megatron.trainer.metrics import read_metrics
from rto_megatron.trainer.rto import train_rto
from rto_megatron.weight_sync.canary import canary_token_ids

pytestmark = pytest.mark.pool
TOLERANCE = 1e-4  # nats, fp32 on both sides


@pytest.fixture(scope="module")
def pool_files(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `files`, with a policy that the server can hold."""
    root = tmp_path_factory.mktemp("pool_files")
    shutil.copy(files / "prompts.jsonl", root)
    for role, seed in MODELS.items():
        folder = root / "models" / role
        if role == "policy":
            tiny_llama(seed).save_pretrained(folder)
        else:
            write_llama(folder, seed, vocab_size=VOCAB_SIZE, is_scalar=role in SCALAR)
        shutil.copytree(files / "tokenizer", folder, dirs_exist_ok=True)
    return root


def _train(config: ReinforcementStage) -> None:
    train_rto(config, join(config))


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "tp2_pp2_sp"])
def test_the_pool_samples_with_the_weights_of_every_step(
    layout: str, pool_files: Path, pool_server: PoolServer, tmp_path: Path
) -> None:
    config = configure(
        "rto",
        pool_files,
        tmp_path / "run",
        layout,
        run__steps=3,
        run__save_every=None,
        optimizer__lr=1e-2,
        rollout__servers=(pool_server.address,),
        rollout__token_file=pool_server.token_file,
        rollout__logprob_tolerance=TOLERANCE,
        rollout__sync_timeout_s=60.0,
        sampling__max_response_tokens=24,
    )
    run_ranks(LAYOUTS[layout][0], _train, config)
    gaps = [entry["pool/logprob_gap_max"] for entry in read_metrics(tmp_path / "run")]
    print(layout, gaps)
    assert len(gaps) == 3 and max(gaps) < TOLERANCE
    token_ids = canary_token_ids(VOCAB_SIZE)
    with ServerClient(pool_server.address, pool_server.token, 60) as client:
        assert client.weight_version() == "3"
        served = torch.tensor(client.prompt_logprobs(list(token_ids)))
    trained = _logprobs(tmp_path / "run" / "hf", token_ids)
    assert (served - trained).abs().max() < TOLERANCE
    assert (served - _logprobs(pool_files / "models/policy", token_ids)).abs().max() > 100 * TOLERANCE


def _train_all(configs: list[ReinforcementStage]) -> None:
    for config in configs:
        _train(config)


def test_every_sampling_method_trains_with_the_pool(
    pool_files: Path, pool_server: PoolServer, tmp_path: Path
) -> None:
    names = [name for name, method in ALGORITHMS.items() if isinstance(method, OnlineMethod)]
    delimiters = {"semi_rto": {"algorithm__delimiters": ("red", "sun")}}
    configs = [
        configure(
            name,
            pool_files,
            tmp_path / name,
            run__steps=1,
            run__save_every=None,
            rollout__servers=(pool_server.address,),
            rollout__token_file=pool_server.token_file,
            rollout__logprob_tolerance=TOLERANCE,
            rollout__logprob_gap_alarm=TOLERANCE,
            rollout__sync_timeout_s=60.0,
            sampling__max_response_tokens=16,
            algorithm__pool_importance_cap=2.0,
            **delimiters.get(name, {}),
        )
        for name in names
    ]
    run_ranks(1, _train_all, configs, timeout_seconds=300)
    for config in configs:
        (metrics,) = read_metrics(config.run.dir)
        print(config.stage, f"gap {metrics['pool/logprob_gap_max']:.1e}")
        assert metrics["pool/logprob_gap_max"] < TOLERANCE
        assert metrics["pool/logprob_gap_alarm"] == metrics["pool/importance_capped_fraction"] == 0
        assert metrics["pool/importance_mean"] == pytest.approx(1, abs=TOLERANCE)
        assert metrics["policy/grad_norm"] > 0
        assert metrics["rollout/response_tokens"] <= 16


@torch.no_grad()
def _logprobs(folder: Path, token_ids: tuple[int, ...]) -> torch.Tensor:
    tokens = torch.tensor([token_ids])
    logprobs = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, tokens[0, 1:, None])[:, 0]
