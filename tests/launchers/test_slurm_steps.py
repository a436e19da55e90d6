"""The job's script with stand-ins for SLURM's programs and Apptainer: what its steps run, and with which variables."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from rto_megatron.config.load import load_recipe
from rto_megatron.launching.slurm_job import ROOT, Allocation, plan_job
from rto_megatron.lifecycle.status import STATUS_FILE, ExitReason, Status, read_status, write_status

RECIPES = ROOT / "launchers" / "recipes" / "llama3_8b"
STRANGE = '50% #1, %j: it\'s [x] $HOME "q"'
# Each notes in $NOTES what it was given, its parts ended by NUL.
PROGRAMS = {
    "scontrol": 'echo "$1" >>"$NOTES/scontrol"; [ "$1" = show ] && printf "n1\\nn2\\n"',
    "squeue": """
[ ! -e "$NOTES/no-controller" ] || exit 1
case "$*" in *-s*) echo "7.1 pool" ;; *) echo RUNNING ;; esac""",
    "scancel": 'kill -TERM "$(cat "$NOTES/pool.pid")"',
    "srun": """
while [[ $1 == --* ]]; do printf '%s\\0' "$1" >>"$NOTES/srun" && shift; done
export SLURMD_NODENAME=n1 SLURM_NODEID=0
exec "$@"
""",
    # Gives the command a clean environment where the real one would, and nothing is passed to it by other means.
    "apptainer": """
printf '%s\\0' "$@" >>"$NOTES/apptainer"
while [[ $1 != *.sif ]]; do shift; done
[ -z "${APPTAINER_CLEANENV:-}" ] || exec env -i NOTES="$NOTES" "${@:2}"
exec "${@:2}"
""",
    # Its trainer leaves the status in $NOTES/ending-ATTEMPT; what follows is decided by the real command.
    "rto": f"""
case $1 in
  after-attempt)
    [ ! -e "$NOTES/cancelled" ] || exit 1
    exec {ROOT}/.venv/bin/rto "$@" ;;
  address) echo 192.0.2.1 ;;
  pool)
    echo $$ >"$NOTES/pool.pid"
    printf '%s\\0' "$@" >"$NOTES/pool"
    trap 'exit 0' TERM
    while [ "$1" != --address-file ]; do shift; done
    echo http://192.0.2.7:4242 >"$2"
    while :; do sleep 0.05; done ;;
  node)
    printf '%s\\0' "$@" >"$NOTES/node"
    env -0 >"$NOTES/variables"
    ending=$NOTES/ending-$RTO_ATTEMPT
    [ ! -e "$ending" ] || cp "$ending" "$(dirname "$(dirname "$2")")/run_status.json"
    [ ! -e "$NOTES/time-is-up" ] || kill -USR1 "$PPID" ;;
esac
""",
}
PREAMBLE = """
echo Loading cuda/13
echo "${SLURMD_NODENAME:-job}" >>"$NOTES/preambles"
export LOADED="cuda 13, gcc" APPTAINER_CLEANENV=1 run_dir=/elsewhere
root=/elsewhere recipe=/elsewhere num_trainers=0
set -- gone
[ -n "$NEVER_SET" ] || true
"""


class Bench:
    """A checkout and SLURM's programs that only note what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.notes = folder / "notes"
        self.checkout = folder / STRANGE / "checkout"
        self.run_dir = folder / STRANGE / "runs" / "sft"
        self.recipe = folder / "recipe.yaml"
        self.preamble = folder / "modules.sh"
        commands = self.checkout / ".venv" / "bin"
        programs = folder / "programs"
        for made in (self.notes, commands, programs):
            made.mkdir(parents=True)
        for name, text in PROGRAMS.items():
            program = (commands if name == "rto" else programs) / name
            program.write_text(f"#!/bin/bash\n{text}\n")
            program.chmod(0o755)
        self.plan_ending(1, Status(ExitReason.DONE, 4, ""))
        self.path = f"{programs}:{os.environ['PATH']}"

    def plan_ending(self, attempt: int, status: Status | None) -> None:
        """Has an attempt of the trainer end so; None: nobody lives to say how."""
        ending = self.notes / f"ending-{attempt}"
        ending.unlink(missing_ok=True)
        if status is not None:
            write_status(self.notes, status)
            (self.notes / STATUS_FILE).rename(ending)

    def run(
        self, allocation: Allocation, recipe: str = "sft", **models: Path
    ) -> subprocess.CompletedProcess[str]:
        """Writes the job of a recipe whose run folder has a strange name, and runs it."""
        tree = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
        tree["vars"]["root"] = str(self.run_dir.parent)
        tree["models"] |= {role: str(path) for role, path in models.items()}
        self.recipe.write_text(yaml.safe_dump(tree))
        config = load_recipe(self.recipe, ["parallel.tensor=1", "parallel.sequence=false"])
        script = plan_job(config, allocation, 1, 3, [], None).write()
        root = f"root={shlex.quote(str(self.checkout))}"
        script.write_text(re.sub("^root=.*$", lambda _: root, script.read_text(), flags=re.MULTILINE))
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "4"}
        return subprocess.run(
            ["bash", str(script)],
            env={"PATH": self.path, "NOTES": str(self.notes), **job},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    def noted(self, name: str) -> list[str]:
        return (self.notes / name).read_text().split("\0")[:-1]

    def variables(self) -> dict[str, str]:
        return dict(entry.split("=", 1) for entry in self.noted("variables"))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_steps_run_behind_the_preamble_in_apptainer_with_the_jobs_variables(bench: Bench) -> None:
    bench.preamble.write_text(PREAMBLE)
    done = bench.run(
        Allocation(2, interface="lo", gres="gpu:1", apptainer="our.sif", preamble=bench.preamble)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    given = bench.noted("node")
    assert given[:2] == ["node", str(bench.run_dir / "slurm" / "recipe.yaml")]
    options = dict(zip(given[2::2], given[3::2], strict=True))
    assert (options["--nodes"], options["--ranks"], options["--interface"]) == ("2", "1", "lo")
    assert re.fullmatch(r"192\.0\.2\.1:\d+", options["--meeting"])  # not what the preamble printed
    seen = bench.variables()
    assert (seen["SLURM_JOB_ID"], seen["RTO_ATTEMPT"], seen["LOADED"]) == ("7", "1", "cuda 13, gcc")
    # Once for the job, once for each step: the address, the trainer and the decision.
    assert (bench.notes / "preambles").read_text().split() == ["job", "n1", "n1", "n1"]
    started = bench.noted("apptainer")
    assert started[:2] == ["exec", "--nv"]
    assert (
        f'type=bind,"source={bench.run_dir}","destination={bench.run_dir}"'.replace('"q"', '""q""') in started
    )
    assert started.count("our.sif") == 3
    assert {"--gres=gpu:1", "--export=ALL"} <= set(bench.noted("srun"))
    assert not any("gpus-per-node" in option for option in bench.noted("srun"))


def test_pyxis_gets_what_the_preamble_exports_and_not_the_preamble(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.run_dir = tmp_path / "sft"
    bench.preamble.write_text(PREAMBLE)
    done = bench.run(
        Allocation(2, gpus_per_node=1, interface="lo", container="our.sqsh", preamble=bench.preamble)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (bench.notes / "preambles").read_text().split() == ["job"]
    assert bench.variables()["LOADED"] == "cuda 13, gcc"
    assert {"--container-image=our.sqsh", "--gpus-per-node=1"} <= set(bench.noted("srun"))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("module load no-such\n", ""),
        ("set -e\nmodule load no-such\necho went on\n", ""),
        ('[ -z "${SLURMD_NODENAME:-}" ]\n', " on n1"),
    ],
)
def test_a_preamble_that_fails_ends_the_job_before_a_rank_starts(bench: Bench, text: str, where: str) -> None:
    bench.preamble.write_text(text)
    done = bench.run(Allocation(2, interface="lo", preamble=bench.preamble))
    assert done.returncode != 0 and "went on" not in done.stdout
    if not text.startswith("set -e"):
        copy = bench.run_dir / "slurm" / "preamble.sh"
        assert f"error: the last command of {copy} failed{where}\n" in done.stderr
    assert not (bench.notes / "node").exists()


def test_a_pool_writes_its_addresses_into_a_folder_of_any_name(bench: Bench, tmp_path: Path) -> None:
    policy = tmp_path / "Llama-3-8b #2"
    policy.mkdir()
    config = {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (policy / "config.json").write_text(json.dumps(config))
    bench.preamble.write_text(PREAMBLE)
    bench.run_dir = bench.run_dir.with_name("rto")
    done = bench.run(
        Allocation(2, 1, gpus_per_node=1, interface="lo", preamble=bench.preamble), "rto", policy=policy
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pool = bench.run_dir / "pool"
    given = bench.noted("pool")
    assert given[:2] == ["pool", str(policy)]
    assert given[given.index("--ready-within") + 1] == "1800"  # as long as the job waits
    assert given[-4:] == [
        "--address-file", f"{pool}/announced-7.0.1/n1.address", "--log-file", f"{pool}/n1.log"
    ]  # fmt: skip
    assert bench.noted("node")[2:4] == [
        "rollout.servers=[http://192.0.2.7:4242]", f"rollout.token_file={pool}/token"
    ]  # fmt: skip


@pytest.mark.slow
def test_attempts_follow_each_other_until_one_crashes_as_the_last_did(bench: Bench) -> None:
    bench.plan_ending(1, None)
    for attempt in (2, 3):
        bench.plan_ending(attempt, Status(ExitReason.BUG, 2, 'said "no"', attempt, "BUG after step 2"))
    bench.plan_ending(4, Status(ExitReason.DONE, 4, ""))
    done = bench.run(Allocation(2, interface="lo"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "attempt 1] the trainer ended: INFRA_LOST_RANK after step 0 no rank could say why\n" in done.stdout
    assert 'attempt 2] the trainer ended: BUG after step 2 said "no"\n' in done.stdout
    assert "attempt 3] the trainer ended: REPEATED_CRASH after step 2 crashed twice alike" in done.stdout
    status = read_status(bench.run_dir)
    assert status is not None and (status.reason, status.attempt) == (ExitReason.REPEATED_CRASH, 3)


@pytest.mark.slow
def test_a_controller_that_does_not_answer_ends_no_job(bench: Bench) -> None:
    bench.plan_ending(1, None)
    bench.plan_ending(2, Status(ExitReason.DONE, 4, ""))
    (bench.notes / "no-controller").touch()
    done = bench.run(Allocation(2, interface="lo"))
    assert "attempt 2] the trainer ended: DONE after step 4\n" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


def test_only_the_end_of_its_time_queues_a_job_again(bench: Bench) -> None:
    bench.plan_ending(1, Status(ExitReason.PREEMPTED, 3, "told to stop"))
    (bench.notes / "time-is-up").touch()
    done = bench.run(Allocation(2, interface="lo"))
    assert "the job is queued again" in done.stdout
    assert (bench.notes / "scontrol").read_text().split() == ["show", "requeue"]
    (bench.notes / "time-is-up").unlink()
    done = bench.run(Allocation(2, interface="lo"))
    assert done.returncode == 85 and "the job is queued again" not in done.stdout


def test_a_job_whose_decision_cannot_be_made_says_so_and_ends(bench: Bench) -> None:
    (bench.notes / "cancelled").touch()
    done = bench.run(Allocation(2, interface="lo"))
    assert done.returncode == 1
    assert "attempt 1] error: nothing decided what follows this attempt" in done.stdout
    status = read_status(bench.run_dir)
    assert status is not None and status.reason is ExitReason.DONE
