#!/usr/bin/env bash
# The pinned stack for a machine with GPUs, and its optional kernels: TransformerEngine, built here against the installed
# torch, and NVIDIA's apex. launchers/setup.sh alone installs what a run needs; this adds TransformerEngine's layers.
# Usage: bash launchers/install_gpu.sh [--with-apex] [--for-image] [--dry-run]
#   --with-apex  NVIDIA's apex too. This package uses nothing of it: Adam is torch's, in one kernel, and gradients are not
#                added up inside of matrix products; it is for other programs of the same environment.
#   --for-image  for the build of a container image, and wherever else no GPU is: do not look for one
#   --dry-run    print the commands and what of this machine is in their way; change nothing
# Needs a GPU with a driver for CUDA 13, a toolkit 13 (CUDA_HOME, that of the nvcc on the PATH, or /usr/local/cuda; nvcc and
# the runtime's headers are enough), a C++ compiler, git for apex, and about 3 GiB of memory for each of MAX_JOBS (default:
# one for each 3 GiB, at most one a core).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly cuda_major=13 oldest_driver=580 # of torch 2.13.0 as PyPI has it, and of transformer-engine[core_cu13]
readonly apex=git+https://github.com/NVIDIA/apex@10417aceddd7d5d05d7cbf7b0fc2daad1105f8b4
with_apex='' for_image='' dry_run=''
for argument in "$@"; do
  case $argument in
    --with-apex) with_apex=yes ;;
    --for-image) for_image=yes ;;
    --dry-run) dry_run=yes ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 2 ;;
  esac
done

fail() { # MESSAGE: ends the script; a dry run goes on, to show everything at once
  echo "error: $*" >&2
  [ -n "$dry_run" ] || exit 2
}

run() { # [NAME=VALUE...] COMMAND...
  printf '+'
  printf ' %q' "$@"
  echo
  [ -n "$dry_run" ] || env "$@"
}

driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1) || true
if [ -n "$for_image" ]; then
  : # the machine that runs the image has the driver
elif [ -z "$driver" ]; then
  fail "nvidia-smi shows no GPU; on a machine without one: bash launchers/setup.sh, or --for-image to build all the same"
elif [ "${driver%%.*}" -lt "$oldest_driver" ]; then
  fail "the driver is $driver, and CUDA $cuda_major needs $oldest_driver or newer; renew the driver"
fi
has_headers() { [ -f "$1/include/cuda_runtime.h" ]; }
toolkit=${CUDA_HOME:-}
if [ -z "$toolkit" ]; then
  # nvcc may be a link into its toolkit, or a script in a folder without one.
  nvcc=$(readlink -m "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")
  toolkit=$(dirname "$(dirname "$nvcc")")
  has_headers "$toolkit" || toolkit=/usr/local/cuda
fi
nvcc=$toolkit/bin/nvcc
release=$("$nvcc" --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p') || true
if [ -z "$release" ]; then
  fail "no nvcc at $nvcc: TransformerEngine is built with it; install the CUDA toolkit $cuda_major and set CUDA_HOME"
elif [ "${release%%.*}" != "$cuda_major" ]; then
  fail "$nvcc is of CUDA $release, and torch of CUDA $cuda_major; set CUDA_HOME to a toolkit $cuda_major"
elif ! has_headers "$toolkit"; then
  fail "no cuda_runtime.h in $toolkit/include: install the headers of the CUDA runtime, or set CUDA_HOME to a toolkit with them"
fi
compiler=${CXX:-g++}
command -v "$compiler" >/dev/null || fail "no C++ compiler ($compiler); install your system's g++ package"
[ -z "$with_apex" ] || command -v git >/dev/null || fail "no git, from which apex comes; install your system's git package"

memory_gib=$(awk '/MemAvailable/ { print int($2 / 1024 / 1024) }' /proc/meminfo)
cores=$(nproc)
jobs=$((memory_gib / 3 < cores ? memory_gib / 3 : cores))
jobs=${MAX_JOBS:-$((jobs > 0 ? jobs : 1))}
readonly python=.venv/bin/python
uv=$(command -v uv || echo .venv/uv/bin/uv)
packages=.venv/lib/python3.12/site-packages/nvidia
pin() { grep -o "^$1[^ ]*" requirements/gpu-extras.txt; }
transformer_engine=$(pin transformer-engine)
build=(CUDA_HOME="$toolkit" MAX_JOBS="$jobs")

run RTO_VARIANT=gpu bash launchers/setup.sh
# What the builds import; without isolation nothing brings it, and with isolation they would not see torch.
run "$uv" pip install --python "$python" wheel packaging ninja
# The release page has binaries for some versions of torch; building always gives the one that fits this torch. Headers that
# a small toolkit lacks come from the packages of torch, behind the toolkit's own.
run "${build[@]}" NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE \
  "CPATH=$PWD/$packages/cudnn/include:$PWD/$packages/nccl/include:$PWD/$packages/cu13/include" \
  "$uv" pip install --python "$python" --no-build-isolation -r requirements.txt -r requirements/gpu.txt \
  "$transformer_engine" --overrides requirements/overrides-gpu.txt
if [ -n "$with_apex" ]; then
  run "${build[@]}" APEX_CPP_EXT=1 APEX_CUDA_EXT=1 \
    "$uv" pip install --python "$python" --no-build-isolation --no-deps "$apex"
fi
run .venv/bin/rto doctor
[ -n "$dry_run" ] || echo "The kernels are installed. Next: bash launchers/acceptance.sh"
