#!/usr/bin/env bash
# How many episodes do PPO, RTO and RTO's ablations need? Tunes, compares and reports; see docs/sample_efficiency.md.
# It can be stopped at any time: the same command goes on where it was, run by run.
# Usage: bash launchers/experiments/sample_efficiency.sh [DIR]
#   SEEDS=N   the design's first N seeds (default 5)      LANES=N   processes side by side, each with a pool (default 2)
#   LANE_ARGS=...   more arguments of `rto sample-efficiency`, such as "--set run.steps=2" for a trial
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=${1:-runs/sample_efficiency} seeds=${SEEDS:-5} lanes=${LANES:-2}
read -ra lane_args <<<"${LANE_ARGS:-}" # several words, of which none is a pattern of files
bash launchers/setup.sh
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$root"
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT

in_lanes() { # PHASE: the seeds dealt out over the lanes
  local lane chosen seed pid
  pids=()
  for lane in $(seq 0 $((lanes - 1))); do
    chosen=''
    for seed in $(seq "$lane" "$lanes" $((seeds - 1))); do chosen+=${chosen:+,}$seed; done
    [ -n "$chosen" ] || continue
    echo "$1, seeds $chosen: $root/$1-$lane.log"
    .venv/bin/rto sample-efficiency "$root" --phase "$1" --num-seeds "$seeds" --seeds "$chosen" "${lane_args[@]}" \
      >>"$root/$1-$lane.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || { echo "error: a lane failed; its log says why" >&2 && exit 1; }
  done
}

in_lanes tune
in_lanes compare
.venv/bin/rto sample-efficiency "$root" --phase report --num-seeds "$seeds"
