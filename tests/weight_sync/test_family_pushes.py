"""A push into each family's vLLM model leaves what vLLM reads from a file of the same weights, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.pool

# Biases, tied embeddings with a vocabulary that vLLM pads, norms of heads, a sliding window, experts of every kind,
# four norms, multipliers; and those that vLLM runs through transformers' classes.
VARIANTS = [
    "llama3_tied",
    "qwen2_tied",
    "qwen3",
    "mistral",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe_mixed",
    "deepseek_v3",
    "granite",
    "gemma2",
    "gemma3_text",
    "glm4",
    "smollm3",
    "olmo2",
    "seed_oss",
    "phi3",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (here.parents[1], here.parent))),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # On a CPU with AMX vLLM drops what it would need to load attention over latents again.
        "VLLM_MLA_DISABLE": "1",
    }
    command = [sys.executable, str(here / "loaded_families.py"), str(tmp_path_factory.mktemp("families"))]
    done = subprocess.run(
        [*command, *VARIANTS], check=False, env=environment, capture_output=True, text=True, timeout=500
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
