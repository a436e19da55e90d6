#!/usr/bin/env bash
# Sets the environment up if needed, then lint, type check and all tests that need no GPU: under 20 minutes on 2 cores.
# Tests that use the session's vLLM server mostly wait for it, so they run beside the others.
# Usage: bash launchers/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CUDA_VISIBLE_DEVICES="" # these tests fork ranks, which CUDA forbids; launchers/test_gpu.sh has those for a GPU
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

bash launchers/setup.sh
echo "[1/4] ruff check"
.venv/bin/ruff check .
echo "[2/4] ruff format --check"
.venv/bin/ruff format --check .
echo "[3/4] mypy (about a minute the first time)"
.venv/bin/mypy
echo "[4/4] pytest (up to 20 minutes)"
log=$(mktemp)
pool_status=0 status=0
.venv/bin/python -m pytest -m "not gpu and pool" -q -p no:cacheprovider "$@" >"$log" 2>&1 &
pool=$!
trap 'kill $pool 2>/dev/null; rm -f "$log"' EXIT
.venv/bin/python -m pytest -m "not gpu and not pool" -q "$@" || status=$?
echo "[4/4] pytest, the tests with the session's vLLM server"
wait $pool || pool_status=$?
cat "$log"
# 5: the given arguments select no test of one half.
[ $status -eq 5 ] && [ $pool_status -eq 0 ] && status=0
[ $pool_status -eq 5 ] && [ $status -eq 0 ] && pool_status=0
exit $((status ? status : pool_status))
