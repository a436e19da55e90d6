#!/usr/bin/env bash
# Does a policy learn the same from rollouts that are ahead of it? RTO on the quickstart's task with rollout.ahead 0, 1
# and 2 and the same correction, at equal episodes; a table of true returns at the end (tools/ahead_returns.py).
# It can be stopped at any time: the same command goes on where it was. An hour on 2 cores, one rank beside the pool.
# Usage: bash launchers/experiments/ahead.sh [DIR]        SEEDS="0 1 2" of the runs      STEPS=20 of 256 episodes each
set -euo pipefail
case ${1:-} in -*) sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 2 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=${1:-runs/ahead} seeds=${SEEDS:-0 1 2} steps=${STEPS:-20}
bash launchers/setup.sh
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
readonly rto=.venv/bin/rto recipes=launchers/recipes/quickstart
mkdir -p "$root/logs" "$root/pool"

launch() { # NAME RECIPE OVERRIDES...: a finished run is not made again
  [ ! -d "$root/$1/hf" ] || return 0
  echo "$1: $root/logs/$1.log"
  "$rto" launch --ranks 1 "$recipes/$2.yaml" "vars.root=$root" "run.dir=$root/$1" parallel.tensor=1 "${@:3}" \
    >>"$root/logs/$1.log" 2>&1 || { tail -n 20 "$root/logs/$1.log" >&2 && exit 1; }
}

[ -d "$root/task" ] || "$rto" synthesize "$root/task" --seed 42 >"$root/logs/synthesize.log" 2>&1
for stage in sft reward_model dpo; do launch "$stage" "$stage"; done
rm -f "$root/pool/address"
"$rto" pool "$root/task/models/policy" --dtype fp32 --token-file "$root/pool/token" \
  --address-file "$root/pool/address" --log-file "$root/pool/server.log" >"$root/logs/pool.log" 2>&1 &
pool=$!
trap 'kill "$pool" 2>/dev/null; wait "$pool" || true' EXIT
until [ -s "$root/pool/address" ]; do
  kill -0 "$pool" 2>/dev/null || { tail -n 20 "$root/logs/pool.log" >&2 && exit 1; }
  sleep 1
done
for seed in $seeds; do
  for ahead in 0 1 2; do
    launch "ahead$ahead-seed$seed" rto "run.seed=$seed" "run.steps=$steps" run.samples_every=null \
      "rollout.ahead=$ahead" algorithm.pool_importance_cap=2 "data.true_reward=$root/task/true_reward.json" \
      "rollout.servers=[$(cat "$root/pool/address")]" "rollout.token_file=$root/pool/token"
  done
done
.venv/bin/python tools/ahead_returns.py "$root"
