#!/usr/bin/env bash
# Checks on the GPUs of this machine what the tests prove over gloo, and ends with a table: pass, fail or skipped. Without
# GPUs the same list runs on the CPU with two ranks, in two to three minutes.
# Usage: bash launchers/acceptance.sh [--only CHECK,...] [--root DIR]
#   --only CHECK,...  some of: doctor collectives parity kernels pool resume
#   --root DIR        keeps models, runs and logs in DIR/acceptance, whose last runs go; default: runs
# LIMIT_S=N ends a command of a check after N seconds; default: 900.
# Exit status 0 if nothing failed; 1 otherwise.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
only=doctor,collectives,parity,kernels,pool,resume root=runs
while [ $# -gt 0 ]; do
  case $1 in
    --only) only=${2:?--only needs names of checks} && shift 2 ;;
    --root) root=${2:?--root needs a folder} && shift 2 ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 2 ;;
  esac
done
for name in ${only//,/ }; do
  case $name in
    doctor | collectives | parity | kernels | pool | resume) ;;
    *) echo "error: --only $name: there is no such check; see bash launchers/acceptance.sh --help" >&2 && exit 2 ;;
  esac
done

bash launchers/setup.sh || exit
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0
readonly python=.venv/bin/python rto=.venv/bin/rto recipe=launchers/recipes/quickstart/rto.yaml
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -eq 1 ]; then
  echo "error: one GPU is visible, and these checks need two or more, or none (CUDA_VISIBLE_DEVICES= runs them on the CPU);" \
    "for one GPU: bash launchers/test_gpu.sh" >&2
  exit 2
fi
ranks=$((gpus ? gpus : 2))
root=$root/acceptance
mkdir -p "$root/logs"
root=$(cd "$root" && pwd)
rm -rf "$root/step" "$root/rto" "$root/resume"

# A collective that hangs must become a line of the table.
limited() { timeout --kill-after=30 "${LIMIT_S:-900}" "$@"; }

on_ranks() { # COUNT ARGUMENTS...: Python under torchrun, which starts one process per rank
  limited "$python" -m torch.distributed.run --standalone --nproc-per-node "$1" "${@:2}"
}

doctor() {
  on_ranks "$ranks" -m rto_megatron.cli.main doctor "$recipe" "${overrides[@]}" "run.dir=$root/rto"
}

collectives() {
  on_ranks "$ranks" tools/acceptance.py collectives "$root"
}

parity() { # layouts of 2 ranks, and of 4 where there are as many
  on_ranks 1 tools/acceptance.py step "$root" one &&
    on_ranks 2 tools/acceptance.py step "$root" dp2 tp2 tp2_sp pp2 &&
    if [ "$ranks" -ge 4 ]; then on_ranks 4 tools/acceptance.py step "$root" tp2_pp2_sp tp2_dp2 pp2_dp2; fi
}

kernels() {
  limited "$python" tools/acceptance.py kernels "$root"
}

pool() { # one GPU for the pool; two ranks train, or one where there are two GPUs
  local split=(--ranks 2) layout=()
  [ "$gpus" -ne 2 ] || { split=(--ranks 1) && layout=(parallel.tensor=1); }
  [ "$gpus" -eq 0 ] || split+=(--pool-gpus 1)
  limited "$rto" launch "${split[@]}" "$recipe" "${overrides[@]}" "${layout[@]}" "run.dir=$root/rto" run.steps=1 &&
    "$python" tools/acceptance.py figures "$root/rto"
}

resume() { # with Adam, whose state a checkpoint must carry
  limited "$rto" resume-check "$recipe" "${overrides[@]}" optimizer.kind=adam optimizer.lr=1e-3 \
    critic_optimizer.kind=adam critic_optimizer.lr=1e-3 --steps 1 --scratch "$root/resume"
}

declare -A titles=(
  [doctor]="machine and environment"
  [collectives]="collectives"
  [parity]="an RTO step at TP, PP and DP equals one rank's"
  [kernels]="layers equal TransformerEngine's"
  [pool]="push into a vLLM pool, proved, and an RTO step"
  [resume]="a resumed run is bit-equal"
)
if [ "$only" != collectives ]; then # the one check that needs no model
  "$python" tools/acceptance.py prepare "$root" >"$root/logs/prepare.log" 2>&1 ||
    { cat "$root/logs/prepare.log" >&2 && exit 1; }
  mapfile -t overrides <"$root/overrides"
fi
echo "Checking on $([ "$gpus" -gt 0 ] && echo "$gpus GPUs over NCCL" || echo "the CPU over gloo"); logs in $root/logs"

table='' num_failed=0
for name in ${only//,/ }; do
  echo "  ${titles[$name]} ..."
  started=$SECONDS log=$root/logs/$name.log
  "$name" >"$log" 2>&1
  status=$?
  figures=$(tail -n 1 "$log")
  figures=${figures#figures: }
  case $status in
    0) outcome=pass ;;
    77) outcome=skipped ;;
    *) outcome=FAIL && num_failed=$((num_failed + 1)) && figures="status $status; see $log" ;;
  esac
  table+=$(printf '%-8s %-48s %5s s  %s' "$outcome" "${titles[$name]}" $((SECONDS - started)) "$figures")$'\n'
done
printf '\n%s' "$table"
[ "$num_failed" -eq 0 ] || { echo "$num_failed failed" && exit 1; }
