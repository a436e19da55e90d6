#!/usr/bin/env bash
# What only some recipes need (W&B, SwanLab, math-verify, reasoning-gym, gguf), in an environment of its own over .venv:
# makes .venv/extras, and runs the tests that are skipped without it, or a command there, such as rto or python.
# Usage: bash launchers/extras.sh [COMMAND ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly extras=.venv/extras
readonly files=(requirements/loggers.txt requirements/verifiers.txt requirements/gguf.txt)
readonly tests=(tests/reporting/test_loggers.py tests/rewards/test_verifiers.py tests/convert/test_gguf.py)

fail() {
  echo "error: $*" >&2
  exit 2
}

make_extras() {
  local uv site
  uv=$(command -v uv || echo .venv/uv/bin/uv)
  echo "Making $PWD/$extras: a minute or two, by the network; later runs reuse it." >&2
  rm -rf "$extras"
  "$uv" venv --quiet --python .venv/bin/python "$extras"
  # What both have is of one version, so that nothing of .venv changes under it.
  "$uv" pip freeze --quiet --python .venv/bin/python --exclude-editable >"$extras/constraints.txt"
  "$uv" pip install --quiet --python "$extras/bin/python" "${files[@]/#/--requirements=}" \
    --constraints "$extras/constraints.txt" --overrides requirements/overrides-loggers.txt ||
    fail "the packages could not be installed (uv's message is above); this needs the package index"
  site=$(echo "$PWD"/.venv/lib/python3*/site-packages)
  echo "import site; site.addsitedir('$site')" >"$(echo "$extras"/lib/python3*/site-packages)/under.pth"
  printf '#!%s\nfrom rto_megatron.cli.main import main\n\nmain()\n' "$PWD/$extras/bin/python" >"$extras/bin/rto"
  chmod +x "$extras/bin/rto"
  echo "$wanted" >"$extras/.made"
}

bash launchers/setup.sh
wanted=$(cat .venv/.rto-installed "${files[@]}" requirements/overrides-loggers.txt | cksum)
[ "$(cat "$extras/.made" 2>/dev/null)" = "$wanted" ] || make_extras
export PATH="$PWD/$extras/bin:$PATH"
[ $# -eq 0 ] || exec "$@"
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
said=$(mktemp)
trap 'rm -f "$said"' EXIT
python -m pytest -q -rs -p no:cacheprovider "${tests[@]}" | tee "$said"
! grep -q "^SKIPPED" "$said" || fail "a test was skipped, and none should be here"
