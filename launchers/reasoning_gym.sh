#!/usr/bin/env bash
# GRPO on a reasoning-gym task, in about 10 minutes on 2 cores: a tiny model learns to answer sums by SFT, then by its verifier
# alone, and the verifier's reward on prompts of another seed is shown before and after, with standard errors.
# Usage: bash launchers/reasoning_gym.sh [DIR]        default: runs/reasoning_gym; what DIR has is kept and gone on with
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=${1:-runs/reasoning_gym}
readonly root recipes=launchers/recipes/reasoning_gym
readonly options='{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=""

rto() {
  bash launchers/extras.sh rto "$@"
}

write() { # NAME SIZE SEED
  [ -f "$root/$1.jsonl" ] || rto reasoning-gym chain_sum --out "$root/$1.jsonl" --size "$2" --seed "$3" --options "$options"
}

mkdir -p "$root"
write train 2000 1
write test 500 2
[ -f "$root/model/config.json" ] ||
  rto tokenizer "$root/train.jsonl" --out "$root/model" --vocab 400 --hidden 64 --positions 128
for stage in sft grpo; do
  rto launch --ranks 1 "$recipes/$stage.yaml" "vars.root=$root"
done
for system in sft grpo; do
  rto launch --ranks 1 "$recipes/evaluate.yaml" "vars.root=$root" "vars.system=$system"
done
rto report "$root"
