#!/usr/bin/env bash
# Sets the environment up if needed, then lint, type check and the tests that need no GPU: about 15 minutes on 2 cores.
# launchers/slow_tests.sh has those with servers, launchers and schedulers of their own.
# Usage: bash launchers/test.sh [pytest arguments]        TEST_PROCESSES=N shares the tests out over N processes (2).
#        bash launchers/test.sh --fast    leaves out what starts ranks, servers or programs: under 3 minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CUDA_VISIBLE_DEVICES="" # these tests fork ranks, which CUDA forbids; launchers/test_gpu.sh has those for a GPU
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset PYTHONDONTWRITEBYTECODE # more than a hundred processes start, and each would compile the package anew

bash launchers/setup.sh
echo "[1/4] ruff check"
.venv/bin/ruff check .
echo "[2/4] ruff format --check"
.venv/bin/ruff format --check .
echo "[3/4] mypy (about a minute the first time)"
.venv/bin/mypy
echo "[4/4] pytest in two processes (about 15 minutes on 2 cores, a few with --fast)"
.venv/bin/python -m pytest -m "not gpu and not slow" -q -n "${TEST_PROCESSES:-2}" --dist loadgroup --no-loadscope-reorder "$@"
