#!/usr/bin/env bash
# How many episodes do PPO, RTO and RTO's ablations need? Tunes, compares and reports; see docs/sample_efficiency.md.
# It can be stopped at any time: the same command goes on where it was, run by run.
# Usage: bash launchers/experiments/sample_efficiency.sh [DIR]
#   SEEDS=N   the design's first N seeds (default 5)      LANES=N   processes side by side, each with a pool (default 2)
#   LANE_ARGS=...   more arguments of `rto sample-efficiency`, such as "--set run.steps=2" for a trial
set -euo pipefail
case ${1:-} in -*) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 2 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=${1:-runs/sample_efficiency} seeds=${SEEDS:-5} lanes=${LANES:-2}
read -ra lane_args <<<"${LANE_ARGS:-}" # several words, of which none is a pattern of files
bash launchers/setup.sh
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
command=(.venv/bin/rto sample-efficiency "$root")
. launchers/experiments/lanes.sh
experiment
