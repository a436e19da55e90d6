#!/usr/bin/env bash
# Runs one stage on this machine: sets the environment up if needed, starts a pool if the stage samples and names none,
# starts the ranks with torchrun (one per GPU that the pool leaves, else tensor x pipeline), stops all at the end.
# Usage: bash launchers/local.sh RECIPE [key=value ...]        NPROC=N sets the number of ranks.
# A crash is followed by a fresh start from the last checkpoint. SIGTERM or RUN_DIR/STOP: saved after the step (status 85).
set -euo pipefail
if [ $# -lt 1 ]; then
  sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}"
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launchers/setup.sh"
exec "$root/.venv/bin/rto" launch ${NPROC:+--ranks "$NPROC"} "$@"
