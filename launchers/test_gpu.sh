#!/usr/bin/env bash
# Runs the tests that need one CUDA GPU: a few minutes, twice where TransformerEngine is installed. They run alone, because nothing may fork once CUDA has started.
# Usage: bash launchers/test_gpu.sh [pytest arguments]
# Uses .venv; without one the python3 on the PATH if it has what the tests import, else launchers/setup.sh makes .venv.
# By hand: python -m pytest -m gpu tests/gpu
# The same bodies without a GPU, to see that they are right: RTO_GPU_TESTS_ON=cpu CUDA_VISIBLE_DEVICES= python -m pytest -m gpu tests/gpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# NGC containers set the override, which turns float32 products into TF32.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0

python=.venv/bin/python
if [ ! -x "$python" ]; then
  if python3 - >/dev/null 2>&1 <<'PROGRAM'; then
import importlib.util, sys
needed = ("torch", "transformers", "megatron.core", "pydantic", "safetensors", "httpx", "aiohttp", "pytest")
sys.exit(sys.version_info < (3, 12) or not all(map(importlib.util.find_spec, needed)))
PROGRAM
    python=python3
  else
    bash launchers/setup.sh
  fi
fi

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: torch of $python sees no CUDA GPU; these tests need one (CUDA_VISIBLE_DEVICES, driver, torch build)" >&2
  exit 2
fi
"$python" -m pytest -m gpu -q tests/gpu tests/platform/test_device.py tests/weight_sync/test_digest.py "$@"
if "$python" -c 'from rto_megatron.platform import kernels; import sys; sys.exit(not kernels.is_installed())'; then
  echo "The same with TransformerEngine's layers, which models in bf16 then have:"
  RTO_TEST_KERNELS=transformer_engine "$python" -m pytest -m gpu -q tests/gpu "$@"
fi
