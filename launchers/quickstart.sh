#!/usr/bin/env bash
# The whole job on this machine, in 15 minutes on 2 cores: install, make the synthetic task, then SFT -> reward model ->
# DPO -> PPO and RTO with a vLLM pool, and a table of what each policy earns.
# On the CPU, or on a machine with at least 3 GPUs: two for the trainer's ranks and one for the pool.
# Usage: bash launchers/quickstart.sh [--budget full|small] [--root DIR]
#   --budget small  few steps everywhere: an end-to-end test, too short to learn
#   --root DIR      the run folder; an existing one is continued
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
budget=full root=runs/quickstart-$(date +%m%d-%H%M%S)
while [ $# -gt 0 ]; do
  case $1 in
    --budget) budget=${2:?--budget needs full or small} && shift 2 ;;
    --root) root=${2:?--root needs a folder} && shift 2 ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 2 ;;
  esac
done
case $budget in
  full) small='' times=(10 75 95 95 110 150 70) ;;
  small) small=yes times=(10 20 20 20 30 30 50) ;;
  *) echo "error: --budget $budget: it is full or small" >&2 && exit 2 ;;
esac

if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
else
  mapfile -t gpus < <(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')
fi
# setup.sh would choose the same; said once, both agree on whether vLLM's CUDA build is there.
export RTO_VARIANT=${RTO_VARIANT:-$([[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]] && echo gpu || echo cpu)}
trainer_gpus='' pool_gpu=''
if [ "$RTO_VARIANT" = gpu ]; then
  if [ ${#gpus[@]} -lt 3 ]; then
    echo "error: ${#gpus[@]} GPUs are visible, and the quickstart needs at least 3 (2 trainer ranks and 1 for" \
      "the pool); on the CPU it runs with: RTO_VARIANT=cpu bash launchers/quickstart.sh" >&2
    exit 2
  fi
  trainer_gpus=${gpus[0]},${gpus[1]} pool_gpu=${gpus[-1]}
fi
export CUDA_VISIBLE_DEVICES=$trainer_gpus
again='' # what a command below needs, for a CPU run on a machine with GPUs
[ "$RTO_VARIANT" = gpu ] || [ ${#gpus[@]} -eq 0 ] || again='RTO_VARIANT=cpu CUDA_VISIBLE_DEVICES= '

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
readonly recipes=launchers/recipes/quickstart logs=$root/logs
go_on="${again}bash launchers/quickstart.sh --budget $budget --root $(printf %q "$root")"
. launchers/staged.sh
stages "${times[@]}"

train() { # NAME OVERRIDES...
  run "$1" "$rto" launch --ranks 2 "$recipes/$1.yaml" "vars.root=$root" "${@:2}"
}

bash launchers/setup.sh
mkdir -p "$logs"
echo "Run folder: $root"

announce "synthetic task with a known reward, tokenizer, tiny model"
if [ -d "$root/task" ]; then
  echo "      already there"
else
  run synthesize "$rto" synthesize "$root/task" --seed 42
fi
# Loads while the next stages train.
CUDA_VISIBLE_DEVICES=$pool_gpu start_pool "$root/pool" "$root/task/models/policy" --dtype fp32
announce "SFT, Megatron-core on two ranks"
train sft ${small:+run.steps=6}
announce "reward model"
train reward_model ${small:+run.steps=4}
announce "DPO"
train dpo ${small:+run.steps=4}
wait_for_pool
announce "PPO: the pool samples, and gets the weights after every step"
train ppo "${pool_keys[@]}" ${small:+run.steps=2}
announce "RTO: the same, with the DPO model's token rewards"
train rto "${pool_keys[@]}" ${small:+run.steps=2}
announce "evaluation of SFT, DPO, PPO and RTO on held-out prompts"
for system in sft dpo ppo rto; do
  run "evaluate_$system" "$rto" launch --ranks 2 "$recipes/evaluate.yaml" "vars.root=$root" \
    "vars.system=$system" "evaluate.name=${system^^}" "${pool_keys[@]}"
done

"$rto" report "$root"
echo "Everything took $((SECONDS - began)) s. Run folder: $root (metrics.jsonl and TensorBoard of every stage)."
echo "Next: tensorboard --logdir $(printf %q "$root"), or another RTO from the same models:"
echo "  ${again}NPROC=2 bash launchers/local.sh $recipes/rto.yaml vars.root=$(printf %q "$root") run.dir=$(printf %q "$root")/rto_no_clip" \
  "algorithm.dpo_clip=null"
