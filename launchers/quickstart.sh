#!/usr/bin/env bash
# The whole job on this machine, in 15 minutes on 2 cores: install, make the synthetic task, then SFT -> reward model ->
# DPO -> PPO and RTO with a vLLM pool, and a table of what each policy earns.
# On the CPU, or on a machine with at least 3 GPUs: two for the trainer's ranks and one for the pool.
# Usage: bash launchers/quickstart.sh [--budget full|small] [--root DIR]
#   --budget small  few steps everywhere: an end-to-end test, too short to learn
#   --root DIR      the run folder; an existing one is continued
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
started=$SECONDS
budget=full root=runs/quickstart-$(date +%m%d-%H%M%S)
while [ $# -gt 0 ]; do
  case $1 in
    --budget) budget=${2:?--budget needs full or small} && shift 2 ;;
    --root) root=${2:?--root needs a folder} && shift 2 ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 2 ;;
  esac
done
case $budget in
  full) small='' times=("75 s" "95 s" "95 s" "110 s" "150 s" "70 s") ;;
  small) small=yes times=("1 min" "1 min" "1 min" "1 min" "1 min" "2 min") ;;
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
readonly recipes=launchers/recipes/quickstart rto=.venv/bin/rto logs=$root/logs pool=$root/pool
stage_pid='' pool_pid='' pool_keys=() stage=0
readonly num_stages=7

stop() { # PID: SIGTERM, and SIGKILL if it has not ended after 20 s
  [ -n "$1" ] || return 0
  kill -TERM "$1" 2>/dev/null || return 0
  for _ in $(seq 100); do
    kill -0 "$1" 2>/dev/null || return 0
    sleep 0.2
  done
  kill -KILL "$1" 2>/dev/null || true
}
trap 'stop "$stage_pid"; stop "$pool_pid"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

announce() { # TITLE TIME
  stage=$((stage + 1))
  echo "[$stage/$num_stages] $1: about $2"
}

show_end_of() { # LOG: its last error message, else its last lines
  local line
  line=$(grep -n '^error' "$1" | tail -1 | cut -d: -f1) || true
  if [ -n "$line" ]; then tail -n "+$line" "$1" | head -40; else tail -n 30 "$1"; fi >&2
}

give_up() { # LOG
  show_end_of "$1"
  echo "error: this stage failed; its log is $1. To go on from here:" >&2
  echo "  ${again}bash launchers/quickstart.sh --budget $budget --root $(printf %q "$root")" >&2
  exit 1
}

run() { # LOG COMMAND...: progress on a terminal, everything else in the log
  local log=$logs/$1.log begin=$SECONDS
  shift
  # In the background, so that a signal to this script is acted upon at once.
  if [ -t 1 ]; then "$@" 2>>"$log" & else "$@" >>"$log" 2>&1 & fi
  stage_pid=$!
  wait "$stage_pid" || give_up "$log"
  stage_pid=''
  echo "      done in $((SECONDS - begin)) s"
}

start_pool() {
  CUDA_VISIBLE_DEVICES=$pool_gpu "$rto" pool "$root/task/models/policy" --dtype fp32 \
    --token-file "$pool/token" --address-file "$pool/address" --log-file "$pool/server.log" >"$logs/pool.log" 2>&1 &
  pool_pid=$!
}

wait_for_pool() {
  until [ -s "$pool/address" ]; do
    kill -0 "$pool_pid" 2>/dev/null || give_up "$logs/pool.log"
    sleep 1
  done
  pool_keys=("rollout.servers=[$(cat "$pool/address")]" "rollout.token_file=$pool/token")
}

train() { # NAME OVERRIDES...
  run "$1" "$rto" launch --ranks 2 "$recipes/$1.yaml" "vars.root=$root" "${@:2}"
}

bash launchers/setup.sh
mkdir -p "$logs" "$pool"
rm -f "$pool/address"
echo "Run folder: $root"

announce "synthetic task with a known reward, tokenizer, tiny model" "10 s"
if [ -f "$root/task/.complete" ]; then
  echo "      already there"
else
  run synthesize "$rto" synthesize "$root/task" --seed 42
  touch "$root/task/.complete"
fi
start_pool # loads while the next stages train
announce "SFT, Megatron-core on two ranks" "${times[0]}"
train sft ${small:+run.steps=6}
announce "reward model" "${times[1]}"
train reward_model ${small:+run.steps=4}
announce "DPO" "${times[2]}"
train dpo ${small:+run.steps=4}
wait_for_pool
announce "PPO: the pool samples, and gets the weights after every step" "${times[3]}"
train ppo "${pool_keys[@]}" ${small:+run.steps=2}
announce "RTO: the same, with the DPO model's token rewards" "${times[4]}"
train rto "${pool_keys[@]}" ${small:+run.steps=2}
announce "evaluation of SFT, DPO, PPO and RTO on held-out prompts" "${times[5]}"
for system in sft dpo ppo rto; do
  run "evaluate_$system" "$rto" launch --ranks 2 "$recipes/evaluate.yaml" "vars.root=$root" \
    "vars.system=$system" "evaluate.name=${system^^}" "${pool_keys[@]}"
done

"$rto" report "$root"
echo "Everything took $((SECONDS - started)) s. Run folder: $root (metrics.jsonl and TensorBoard of every stage)."
echo "Next: tensorboard --logdir $(printf %q "$root"), or another RTO from the same models:"
echo "  ${again}NPROC=2 bash launchers/local.sh $recipes/rto.yaml vars.root=$(printf %q "$root") run.dir=$(printf %q "$root")/rto_no_clip" \
  "algorithm.dpo_clip=null"
