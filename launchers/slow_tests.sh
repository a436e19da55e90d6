#!/usr/bin/env bash
# The tests that launchers/test.sh leaves out, as they start servers, launchers or schedulers of their own: about a quarter of an hour on 2 cores.
# Usage: bash launchers/slow_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launchers/setup.sh
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# What launchers/test_gpu.sh runs on a GPU, here on the CPU: a stale call would be the first thing that its owner sees.
# A run of its own, as those tests keep one process group to their end.
RTO_GPU_TESTS_ON=cpu .venv/bin/python -m pytest -q -m gpu tests/gpu
exec .venv/bin/python -m pytest -q -m "slow and not gpu" "$@"
