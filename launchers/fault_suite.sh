#!/usr/bin/env bash
# Kills, stops and fails real launches, ten kills in one run among them, and checks what is left: about 10 minutes.
# launchers/slow_tests.sh has the same with one kill. Usage: bash launchers/fault_suite.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launchers/setup.sh
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
RTO_FAULT_KILLS=10 exec .venv/bin/python -m pytest -q tests/faults tests/platform/test_fault_plan.py "$@"
