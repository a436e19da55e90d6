"""A push into each family's vLLM model leaves what vLLM reads from a file of the same weights, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.pool

# Biases, tied embeddings with a vocabulary that vLLM pads, norms of heads, a sliding window, experts of every kind,
# four norms, joined tensors, a class of transformers that vLLM runs.
VARIANTS = [
    "llama3_tied",
    "qwen2_tied",
    "qwen3",
    "mistral",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe_mixed",
    "deepseek_v3",
    "gemma2",
    "glm4",
    "olmo2",
    "phi3",
    # Loaded as some of those above are.
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("granite", "gemma3_text", "smollm3", "seed_oss")
    ),
]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, object]]:
    """Of the variants that are asked for."""
    here = Path(__file__).parent
    own = [
        item
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == Path(__file__)
    ]
    chosen = [str(item.callspec.params["variant"]) for item in own]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (here.parents[1], here.parent))),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # On a CPU with AMX vLLM drops what it would need to load attention over latents again.
        "VLLM_MLA_DISABLE": str(int(torch.cpu._is_amx_tile_supported())),
    }
    command = [sys.executable, str(here / "loaded_families.py"), str(tmp_path_factory.mktemp("families"))]
    done = subprocess.run(
        [*command, *chosen], check=False, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pushed_model_is_the_one_that_vllm_reads_from_a_file(
    variant: str, outcomes: dict[str, dict[str, object]]
) -> None:
    outcome = outcomes[variant]
    print(outcome)
    assert outcome["differ"] == []
    assert outcome["differed"] == outcome["compared"], "the weights before the push were others"
