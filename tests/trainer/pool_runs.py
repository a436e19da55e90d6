"""Tiny runs against a real vLLM server, and what must hold of the server when they end."""

from pathlib import Path

import torch
from pool_server import VOCAB_SIZE, PoolServer
from trainer.tiny_runs import configure
from transformers import AutoModelForCausalLM

from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.weight_sync.canary import canary_token_ids

TOLERANCE = 1e-4  # nats, fp32 on both sides


def three_steps(
    run_dir: Path, files: Path, server: PoolServer, layout: str, **keys: object
) -> ReinforcementStage:
    """RTO with steps large enough that the weights of one are not those of the next."""
    return configure(
        "rto",
        files,
        run_dir,
        layout,
        run__steps=3,
        run__save_every=None,
        optimizer__lr=1e-2,
        rollout__servers=(server.address,),
        rollout__token_file=server.token_file,
        rollout__logprob_tolerance=TOLERANCE,
        rollout__sync_timeout_s=60.0,
        sampling__max_response_tokens=24,
        **keys,
    )


def require_served(run_dir: Path, files: Path, server: PoolServer) -> None:
    """The server sampled with the weights of each of the three steps, and holds those at the end."""
    gaps = [entry["pool/logprob_gap_max"] for entry in read_metrics(run_dir)]
    print(gaps)
    assert len(gaps) == 3 and max(gaps) < TOLERANCE
    token_ids = canary_token_ids(VOCAB_SIZE)
    with ServerClient(server.address, server.token, 60) as client:
        assert client.weight_version() == "3"
        served = torch.tensor(client.prompt_logprobs(list(token_ids)))
    trained = logprobs(run_dir / "hf", token_ids)
    assert (served - trained).abs().max() < TOLERANCE
    assert (served - logprobs(files / "models/policy", token_ids)).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def logprobs(folder: Path, token_ids: tuple[int, ...]) -> torch.Tensor:
    tokens = torch.tensor([token_ids])
    logprobs = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, tokens[0, 1:, None])[:, 0]
