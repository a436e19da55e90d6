#!/usr/bin/env bash
# RTO on a real language model, in about 70 minutes on 2 cores that multiply bf16 (twice that on others, in fp32), with 16 GiB
# of memory and of disk: SmolLM2-135M-Instruct answers prompts that ask for three rules each, a program rates the answers, a
# reward model and DPO learn from noisy pairs of them, then PPO and RTO, and a table of what each policy earns on held-out
# prompts: true reward, reward model, KL, length.
# Usage: bash launchers/real_language.sh [--root DIR] [--model DIR] [--data DIR] [--budget full|small]
#   --root DIR      the run folder (default runs/real_language); the same command goes on where it was stopped
#   --model DIR     another chat model, as a Hugging Face folder (default runs/smollm2, made if it is not there)
#   --data DIR      your preference data in place of the program's: preferences_train, preferences_test, prompts_train and
#                   prompts_test, each .jsonl, .jsonl.gz or .parquet; there is no true reward then
#   --budget small  few steps everywhere: an end-to-end test, too short to learn
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=runs/real_language model=runs/smollm2 data='' budget=full
while [ $# -gt 0 ]; do
  case $1 in
    --root) root=${2:?--root needs a folder} && shift 2 ;;
    --model) model=${2:?--model needs a folder} && shift 2 ;;
    --data) data=${2:?--data needs a folder} && shift 2 ;;
    --budget) budget=${2:?--budget needs full or small} && shift 2 ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 2 ;;
  esac
done
case $budget in
  full) small='' times=(30 10 400 700 700 1350 1400 450) ;;
  small) small=yes times=(30 10 60 60 60 90 90 200) ;;
  *) echo "error: --budget $budget: it is full or small" >&2 && exit 2 ;;
esac

part_of_data() { # NAME: the file of the user's folder with this name
  local found
  for found in "$data/$1".{jsonl,jsonl.gz,parquet}; do
    [ -f "$found" ] && echo "$found" && return
  done
  echo "error: $data has no $1.jsonl, $1.jsonl.gz or $1.parquet; --data needs preferences_train, preferences_test," \
    "prompts_train and prompts_test" >&2
  exit 2
}

# One rank with two threads, and a pool with two that waits while the rank computes. Nothing here asks a model hub.
export CUDA_VISIBLE_DEVICES='' RTO_VARIANT=cpu OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE VLLM_CPU_KVCACHE_SPACE=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
readonly recipes=launchers/recipes/real_language logs=$root/logs
go_on="bash launchers/real_language.sh --budget $budget --root $(printf %q "$root") --model $(printf %q "$model")${data:+ --data $(printf %q "$data")}"
shared=("vars.root=$root" "vars.model=$model")
learnt=() sampled=() longest=()
if [ -n "$data" ]; then
  # One each: of several assignments in a row bash tells the last one's failure alone.
  pairs=$(part_of_data preferences_train)
  held_out_pairs=$(part_of_data preferences_test)
  prompts=$(part_of_data prompts_train)
  held_out=$(part_of_data prompts_test)
  # Real texts are longer than the task's, so there are fewer of them in a step, and fewer steps.
  longest=("data.max_prompt_tokens=256") times=("${times[0]}" "${times[@]:3}") # neither prompts nor pairs are made
  learnt=("vars.pairs=$pairs" "vars.held_out_pairs=$held_out_pairs" data.max_length=400 data.eval_samples=64 batch.train=16
    batch.micro=4 run.steps=30 run.eval_every=15)
  sampled=('rewards=[{kind: model}]' sampling.max_response_tokens=96 sampling.temperature=1.0 batch.micro=8)
fi
. launchers/staged.sh
stages "${times[@]}"

launch() { # NAME RECIPE OVERRIDE...
  run "$1" "$rto" launch --ranks 1 "$recipes/$2.yaml" "${shared[@]}" ${longest[@]+"${longest[@]}"} "${@:3}"
}

rate() { # NAME PROMPTS COUNT: answers of the start model, unless they are there
  [ -f "$root/$1/evaluation.json" ] ||
    launch "$1" sample "vars.prompts=$2" "run.dir=$root/$1" "data.eval_samples=$3" "${pool_keys[@]}"
}

check_data() { # STAGE OVERRIDE...: its first rows, before the training that would end at one of them
  "$rto" check "$recipes/$1.yaml" "${shared[@]}" "${longest[@]}" "${@:2}" >"$logs/check_$1.log" 2>&1 ||
    give_up "$logs/check_$1.log"
}

learn() { # STAGE
  launch "$1" "$1" ${learnt[@]+"${learnt[@]}"} ${small:+run.steps=2 batch.train=4 batch.micro=4}
}

reinforce() { # STAGE
  launch "$1" "$1" ${sampled[@]+"${sampled[@]}"} "vars.prompts=$prompts" "${pool_keys[@]}" \
    ${data:+run.steps=15 batch.rollout=16} ${small:+run.steps=2 batch.train=4 batch.rollout=4 batch.micro=4}
}

evaluate() { # SYSTEM FOLDER
  [ -f "$root/evaluations/$1/evaluation.json" ] ||
    launch "evaluate_$1" evaluate "vars.system=$1" "vars.policy=$2" "vars.held_out=$held_out" \
      ${sampled[@]+"${sampled[@]}"} "${pool_keys[@]}" ${data:+data.eval_samples=100} ${small:+data.eval_samples=8}
}

announce "the model"
if [ "$model" = runs/smollm2 ]; then
  bash launchers/real_model.sh "$model" | sed '/^Next:/,$d'
else
  bash launchers/setup.sh
  [ -f "$model/config.json" ] || { echo "error: --model $model holds no config.json; name a Hugging Face folder" >&2 && exit 2; }
fi
mkdir -p "$logs"
echo "Run folder: $root"
# A run goes on in the dtype in which it began, also on another machine.
[ -s "$root/dtype" ] || .venv/bin/python -m rto_megatron.platform.cpu_products >"$root/dtype"
dtype=$(cat "$root/dtype")
[ "$dtype" = bf16 ] || echo "This CPU has no products of bf16: all models are in fp32, which takes about twice as long."
shared+=("precision.dtype=$dtype")
if [ -n "$data" ]; then
  check_data reward_model "${learnt[@]}"
  check_data rto "${sampled[@]}" "vars.prompts=$prompts"
  check_data evaluate "${sampled[@]}" "vars.system=start" "vars.policy=$model" "vars.held_out=$held_out"
fi
start_pool "$root/pool" "$model" --dtype "$dtype" --max-model-len 512
if [ -z "$data" ]; then
  announce "prompts"
  prompts=$root/task/prompts_train.jsonl held_out=$root/task/prompts_test.jsonl
  [ -f "$held_out" ] || run prompts "$rto" rules "$root/task"
  announce "answers of the start model, rated by the program, and pairs of them"
  wait_for_pool
  rate sampled "$prompts" $([ -n "$small" ] && echo 16 || echo 600)
  rate sampled_test "$held_out" $([ -n "$small" ] && echo 16 || echo 60)
  for part in train test; do
    answers=$([ $part = train ] && echo sampled || echo sampled_test)
    [ -f "$root/pairs_$part.jsonl" ] ||
      run "pairs_$part" "$rto" data pairs "$root/$answers/evaluation.jsonl" --prompts "$root/task/prompts_$part.jsonl" \
        --by reward/rules --noise 0.15 --out "$root/pairs_$part.jsonl"
  done
fi
announce "reward model"
learn reward_model
announce "DPO"
learn dpo
wait_for_pool
announce "PPO: the pool samples, and gets the weights after every step"
reinforce ppo
announce "RTO: the same, with the DPO model's token rewards"
reinforce rto
announce "the start model, DPO, PPO and RTO on held-out prompts"
evaluate start "$model"
for system in dpo ppo rto; do
  evaluate $system "$root/$system"
done

"$rto" report "$root/evaluations" | sed '/^No verdict/d'
run view "$rto" view "$root/rto" "$root/ppo" --out "$root/view.html"
again=("${shared[@]}" "run.dir=$root/rto_more" run.seed=1)
[ -z "$data" ] || again+=("vars.prompts=$prompts" "${longest[@]}" "${sampled[@]}" batch.rollout=16)
cat <<NEXT
Everything took $((SECONDS - began)) s. This is one seed and few steps: the errors are of the prompts alone.
Look at what each token earned: $root/view.html (one file, in any browser)
Next:
  $rto rollouts $root/rto --sort reward --limit 5
  NPROC=1 bash launchers/local.sh $recipes/rto.yaml$(printf ' %q' "${again[@]}")
  bash launchers/experiments/language.sh          # seeds, arms and a control: docs/language.md
NEXT
