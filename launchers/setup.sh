#!/usr/bin/env bash
# Makes .venv with Python 3.12 and the pinned stack; a second call returns at once unless the requirements changed.
# Usage: bash launchers/setup.sh        RTO_PYTHON=PATH chooses the Python, RTO_VARIANT=cpu|gpu the vLLM build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv marker=.venv/.rto-installed needed_gib=12

fail() {
  echo "error: $*" >&2
  exit 2
}

is_python() { # COMMAND VERSION: whether COMMAND really runs (a pyenv shim can exist and fail) and is VERSION or newer
  "$1" -c "import sys; sys.exit(sys.version_info[:2] $2)" >/dev/null 2>&1
}

find_python312() {
  local candidate
  for candidate in "${RTO_PYTHON:-python3.12}" python3.12 python3 python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python \
    /usr/bin/python3.12 /usr/local/bin/python3.12 /opt/homebrew/bin/python3.12; do
    if is_python "$candidate" "!= (3, 12)"; then
      command -v "$candidate"
      return
    fi
  done
}

find_uv() { # prints the path of a working uv and installs one for this project if there is none
  local candidate python
  for candidate in uv "$venv/uv/bin/uv" "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv"; do
    if "$candidate" --version >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  for python in "$1" python3 /usr/bin/python3 python; do
    if [ -n "$python" ] && is_python "$python" "< (3, 8)"; then
      if "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m pip install --quiet --target "$venv/uv" uv >&2 && break
      elif "$python" -m venv "$venv/uv" >/dev/null 2>&1; then
        "$venv/uv/bin/python" -m pip install --quiet uv >&2 && break
      fi
    fi
  done
  [ -x "$venv/uv/bin/uv" ] || return 1
  echo "$venv/uv/bin/uv"
}

without_list() { # COMMAND...: hides uv's line per package, but not on a terminal: a filter costs the progress bars
  if [ -t 2 ]; then
    "$@"
  else
    "$@" 2>&1 | grep --line-buffered -v '^ [-+~] ' >&2
    return "${PIPESTATUS[0]}"
  fi
}

variant=${RTO_VARIANT:-$([[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]] && echo gpu || echo cpu)}
[ -f "requirements/$variant.txt" ] || fail "RTO_VARIANT=$variant: it is cpu or gpu"
wanted="$variant $(cat requirements.txt "requirements/$variant.txt" "requirements/overrides-$variant.txt" \
  requirements/dev.txt pyproject.toml | cksum)"
if [ -f "$marker" ] && [ "$(cat "$marker")" = "$wanted" ] && is_python "$venv/bin/python" "!= (3, 12)"; then
  exit 0
fi

echo "Setting up $PWD/.venv for a machine with $([ "$variant" = gpu ] && echo GPUs || echo 'no GPU'):" \
  "one to ten minutes, by the network; later runs reuse it."
free_gib=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1024 / 1024))
[ -d "$venv/lib" ] || [ "$free_gib" -ge "$needed_gib" ] ||
  fail "the disk of $PWD has $free_gib GiB free and the environment needs $needed_gib; free some or move the checkout"
if [ "$variant" = gpu ] && ! command -v "${CC:-cc}" >/dev/null && ! command -v gcc >/dev/null; then
  fail "no C compiler (cc, gcc): Triton builds GPU kernels with one; install your system's gcc package"
fi

python=$(find_python312)
if [ -e "$venv/bin" ] && ! is_python "$venv/bin/python" "!= (3, 12)"; then
  rm -rf "$venv" # made by another Python, or by one that is gone
fi
if [ -f "$marker" ] && [[ "$(cat "$marker")" != "$variant "* ]]; then
  rm -rf "$venv" # both vLLM builds are the package vllm, one would be left among the files of the other
fi
mkdir -p "$venv"
uv=$(find_uv "$python") ||
  fail "uv is missing and could not be installed: no network, or no Python 3 with pip or venv;" \
    "install uv or your system's python3-venv package"
if [ ! -x "$venv/bin/python" ]; then
  [ -n "$python" ] || echo "No working Python 3.12 was found; uv fetches one."
  "$uv" venv --quiet --allow-existing --python "${python:-3.12}" "$venv" ||
    fail "there is no working Python 3.12, and uv could not fetch one (its message is above);" \
      "install Python 3.12, or name one with RTO_PYTHON=PATH"
fi
rm -f "$marker"
without_list "$uv" pip install --python "$venv/bin/python" -r requirements.txt -r "requirements/$variant.txt" \
  -r requirements/dev.txt --overrides "requirements/overrides-$variant.txt" ||
  fail "the packages could not be installed (uv's message is above); if it could not fetch, this machine has no" \
    "network: connect it and run the same command again, which keeps what was downloaded"
"$uv" pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation -e . ||
  fail "the package itself could not be installed (uv's message is above)"
# Loading all of it once proves that it loads, and leaves the byte code that several processes would make at a time.
echo "Loading the packages for the first time: about half a minute."
env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR "$venv/bin/python" -W ignore -c "import \
datasets, megatron.core.models.gpt, torch.distributed.run, torch.utils.tensorboard, transformers.models.llama, \
vllm.entrypoints.openai.api_server, vllm.v1.engine.core" ||
  fail "the installed packages do not load (Python's message is above); remove $venv and run the same command again"
echo "$wanted" >"$marker"
echo "The environment is ready."
