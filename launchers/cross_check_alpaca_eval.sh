#!/usr/bin/env bash
# Compares the win rates of `rto score` with those of the package alpaca-eval, in an environment of its own beside .venv's
# packages: on made-up judgments of 805 instructions, or on yours. Needs the package index; about two minutes the first time.
# Usage: bash launchers/cross_check_alpaca_eval.sh [ANNOTATIONS DF_GAMED REFERENCE]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launchers/setup.sh
readonly python=.venv/bin/python other=.venv/alpaca-eval work=.venv/alpaca-eval-files
uv=$(command -v uv || echo .venv/uv/bin/uv)
if [ ! -x "$other/bin/alpaca_eval" ]; then
  "$uv" venv --quiet --python "$python" "$other"
  # What it was written for: its own pins leave newer ones open, with which it no longer runs.
  "$uv" pip install --quiet --python "$other/bin/python" alpaca-eval==0.6.6 'scikit-learn<1.6' 'pandas<3' 'datasets<4' 'setuptools<80'
fi
mkdir -p "$work"
annotations=${1:-$work/annotations.json} gamed=${2:-$work/df_gamed.csv} reference=${3:-$work/reference.json}
[ $# -gt 0 ] || "$python" tools/make_judgments.py "$work"
"$other/bin/python" -W ignore tools/alpaca_eval_numbers.py "$annotations" "$gamed" >"$work/theirs.json"
.venv/bin/rto score "$annotations" --gamed "$gamed" --reference "$reference" --json "$work/ours.json" >/dev/null
"$python" - "$work" <<'PYTHON'
import json, pathlib, sys

work = pathlib.Path(sys.argv[1])
(ours,) = json.loads((work / "ours.json").read_text())["alpaca_eval"]
theirs = json.loads((work / "theirs.json").read_text())
flat = {**ours["rate"], "lc": ours["controlled"]["win_rate"], "lc_error": ours["controlled"]["standard_error"]}
pairs = {
    "win_rate": "win_rate", "standard_error": "standard_error", "discrete_win_rate": "discrete_win_rate", "num_wins": "n_wins",
    "num_losses": "n_wins_base", "num_ties": "n_draws", "lc": "length_controlled_winrate", "lc_error": "lc_standard_error",
}
worst = 0.0
for mine, name in pairs.items():
    difference = abs(flat[mine] - theirs[name])
    worst = max(worst, difference)
    print(f"{mine:20} ours {flat[mine]:.6f}  alpaca-eval {theirs[name]:.6f}  difference {difference:.2g}")
sys.exit(f"error: they differ by {worst:.2g}, more than 0.01" if worst > 0.01 else 0)
PYTHON
echo "rto score and alpaca-eval agree to 0.01."
