"""A checkout whose `rto` only notes what it is asked, for the tests of scripts that run stages one after another."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Stands for the `rto` command: notes what it was asked, serves until SIGTERM as a pool, fails or hangs where told.
PRETENDING_RTO = """#!/bin/bash
echo "$@" >>"$HOME/asked"
echo "$1 ${CUDA_VISIBLE_DEVICES-unset} $RTO_VARIANT" >>"$HOME/devices"
[ "$1" = synthesize ] && mkdir -p "$2"
if [ "$1" = rules ]; then mkdir -p "$2"; touch "$2/prompts_train.jsonl" "$2/prompts_test.jsonl"; fi
case "$*" in
  pool*)
    echo $$ >"$HOME/pool.pid"
    while [ "$1" != --address-file ]; do shift; done
    echo http://127.0.0.1:4242 >"$2"
    trap 'exit 0' TERM
    while :; do sleep 0.1; done ;;
  *"$FAILS"*) echo noise; echo "error: models.policy is missing" >&2; exit 2 ;;
  *"$HANGS"*) echo $$ >"$HOME/stage.pid"; exec sleep 60 ;;
esac
"""


def pretending_checkout(folder: Path) -> Path:
    """The launchers, with a set-up that does nothing, the `rto` above, and a `python` that says $DTYPE."""
    shutil.copytree(ROOT / "launchers", folder / "launchers")
    (folder / "launchers" / "setup.sh").write_text("exit 0\n")
    command = folder / ".venv" / "bin" / "rto"
    command.parent.mkdir(parents=True)
    command.write_text(PRETENDING_RTO)
    command.chmod(0o755)
    python = command.with_name("python")
    python.write_text("#!/bin/bash\necho ${DTYPE-bf16}\n")
    python.chmod(0o755)
    return folder


def is_running(pid_file: Path) -> bool:
    """Whether the process whose number stands in a file is there."""
    return Path(f"/proc/{pid_file.read_text().strip()}/cmdline").exists()
