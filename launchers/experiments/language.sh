#!/usr/bin/env bash
# PPO, RTO, RS-PPO, a control and an oracle on SmolLM2-135M-Instruct, whose true reward is a program: tunes, compares and
# reports; docs/language.md has the design and the hours. It can be stopped at any time: the same command goes on where it
# was, run by run, and a run that was stopped goes on from its last checkpoint.
# Usage: bash launchers/experiments/language.sh [DIR]
#   SEEDS=N   the design's first N seeds (default 5)      MODEL=DIR   the model (default runs/smollm2, made if not there)
#   FACTOR=1      of the learning rate, where that was chosen before; as docs/language.md chose it (default: chosen here)
#   LANE_ARGS=...   more arguments of `rto language`, such as "--set run.steps=2" for a trial
set -euo pipefail
case ${1:-} in -*) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 2 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=${1:-runs/language} seeds=${SEEDS:-5} lanes=1 model=${MODEL:-runs/smollm2}
read -ra lane_args <<<"${LANE_ARGS:-}" # several words, of which none is a pattern of files
[ -f "$model/config.json" ] || bash launchers/real_model.sh "$model"
bash launchers/setup.sh
# Rank and pool take turns: each with both cores, neither spinning while it waits for the other.
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE VLLM_CPU_KVCACHE_SPACE=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
command=(.venv/bin/rto language "$root" --model "$model" ${FACTOR:+--factor "$FACTOR"})
. launchers/experiments/lanes.sh
experiment
