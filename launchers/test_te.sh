#!/usr/bin/env bash
# TransformerEngine's layers without a GPU: its real modules, with torch in the place of its kernels, against torch's
# layers. Parameters, checkpoints in both directions, exports, pushes, data flow over ranks, whole steps: a few minutes.
# Fetches TransformerEngine's Python part (a wheel of 264 MiB, nothing is compiled) into a folder that nothing else sees.
# Usage: bash launchers/test_te.sh [pytest arguments]        RTO_TE_PACKAGES=DIR keeps the packages in DIR (.venv/te)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launchers/setup.sh

readonly requirements=requirements/transformer-engine-tests.txt
packages=$(realpath -m "${RTO_TE_PACKAGES:-.venv/te}")
uv=$(command -v uv || echo .venv/uv/bin/uv)
if ! cmp -s "$requirements" "$packages/installed"; then
  "$uv" pip install --python .venv/bin/python --no-deps --target "$packages" -r "$requirements"
  cp "$requirements" "$packages/installed"
fi
export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH} RTO_TEST_TRANSFORMER_ENGINE=1
# Every forked rank would compile Megatron's fused activations anew.
export TORCHDYNAMO_DISABLE=1
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest -q tests/fused "$@"
