"""What follows an attempt: one table of cases, and the command through which a SLURM job asks."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.errors import RunFolderError
from rto_megatron.launching.attempts import ATTEMPTS_FILE, Next, Tally, decide, decide_in_job, silent_end
from rto_megatron.launching.torchrun import RankFailure
from rto_megatron.lifecycle.status import ExitReason, Status, read_status, write_status

AGAIN, REQUEUE, END = Next.AGAIN, Next.REQUEUE, Next.END
FRESH = Tally(3, "", "")  # before the first attempt
CRASHED = Tally(2, "here", "step_000002")
LAST = Tally(0, "there", "step_000002")
NEVER_AGAIN = ("DONE", "PREEMPTED", "INTERRUPTED", "CONFIG", "NAN", "OOM", "DISK", "CHECKPOINT")
MAY_PASS = ("INFRA_NO_GENERATOR", "INFRA_NO_REWARD", "INFRA_LOST_RANK", "HANG", "BUG")


def ended(reason: str, fingerprint: str = "here") -> Status:
    return Status(ExitReason(reason), 3, "as told", 1, fingerprint)


@pytest.mark.parametrize(
    ("status", "newest", "tally", "when_stopped", "expected", "reason", "restarts_left"),
    [
        *((ended(reason), "step_000002", FRESH, None, END, reason, 3) for reason in NEVER_AGAIN),
        *((ended(reason), "step_000002", FRESH, None, AGAIN, reason, 2) for reason in MAY_PASS),
        # Twice alike without a new checkpoint; another crash, or a checkpoint between them, is no repetition.
        (ended("BUG"), "step_000002", CRASHED, None, END, "REPEATED_CRASH", 2),
        (ended("HANG", "there"), "step_000002", CRASHED, None, AGAIN, "HANG", 1),
        (ended("BUG"), "step_000003", CRASHED, None, AGAIN, "BUG", 2),
        (ended("BUG", ""), "", FRESH, None, AGAIN, "BUG", 2),
        # Restarts are counted until there is a new checkpoint.
        (ended("BUG"), "step_000002", LAST, None, END, "BUG", 0),
        (ended("BUG"), "step_000003", LAST, None, AGAIN, "BUG", 2),
        # A stop that was asked for: what may pass is not tried again here, and all else is as it was.
        (ended("PREEMPTED"), "step_000003", CRASHED, REQUEUE, REQUEUE, "PREEMPTED", 2),
        (ended("PREEMPTED"), "step_000003", CRASHED, END, END, "PREEMPTED", 2),
        (ended("INFRA_LOST_RANK"), "step_000002", LAST, REQUEUE, REQUEUE, "INFRA_LOST_RANK", 0),
        (ended("BUG"), "step_000002", CRASHED, END, END, "BUG", 2),
        (ended("DONE"), "step_000003", CRASHED, REQUEUE, END, "DONE", 2),
        (ended("DISK"), "step_000003", CRASHED, REQUEUE, END, "DISK", 2),
    ],
)  # fmt: skip
def test_what_follows_an_attempt(
    status: Status,
    newest: str,
    tally: Tally,
    when_stopped: Next | None,
    expected: Next,
    reason: str,
    restarts_left: int,
) -> None:
    decision = decide(status, newest, tally, restarts=3, when_stopped=when_stopped)
    assert (decision.next, decision.status.reason) == (expected, reason)
    assert decision.tally.restarts_left == restarts_left
    if expected is AGAIN:
        assert (decision.tally.fingerprint, decision.tally.checkpoint) == (status.fingerprint, newest)


def test_without_restarts_the_first_crash_ends_the_run() -> None:
    assert decide(ended("BUG"), "step_000001", Tally(0, "", ""), restarts=0).is_out_of_restarts


def after_attempt(run_dir: Path, attempt: int, *options: str) -> list[str]:
    """The word, the exit status and the text that the command prints."""
    arguments = [str(run_dir), "--attempt", str(attempt), "--restarts", "2", *options]
    shown = CliRunner().invoke(app, ["after-attempt", *arguments])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("\n") == 1
    return shown.stdout.rstrip("\n").split(" ", 2)


def test_a_job_counts_its_attempts_in_the_run_folder(tmp_path: Path) -> None:
    nobody = "the trainer ended: INFRA_LOST_RANK after step 0 no rank could say why"
    assert after_attempt(tmp_path, 1) == ["AGAIN", "1", nobody]
    assert read_status(tmp_path) == Status(
        ExitReason.INFRA_LOST_RANK, 0, "no rank could say why", 1, "no status"
    )
    write_status(tmp_path, Status(ExitReason.BUG, 2, 'said "no"\nand\\left', 2, "BUG at 2"))
    assert after_attempt(tmp_path, 2) == [
        "AGAIN", "1", 'the trainer ended: BUG after step 2 said "no" and\\left'
    ]  # fmt: skip
    write_status(tmp_path, Status(ExitReason.HANG, 2, "waited", 3, "HANG at 2"))
    assert after_attempt(tmp_path, 3) == [
        "END", "1", "the trainer ended: HANG after step 2 waited; no restart is left (2 in a row without a new "
        "checkpoint)"
    ]  # fmt: skip
    assert not (tmp_path / ATTEMPTS_FILE).exists()


def test_a_job_does_not_go_on_to_a_third_crash_alike(tmp_path: Path) -> None:
    crash = Status(ExitReason.BUG, 2, "broken", 1, "BUG at 2")
    write_status(tmp_path, crash)
    assert after_attempt(tmp_path, 1)[0] == "AGAIN"
    write_status(tmp_path, crash)
    word, status, text = after_attempt(tmp_path, 2)
    assert (word, status) == ("END", "1") and "crashed twice alike (BUG at 2)" in text
    status_left = read_status(tmp_path)
    assert status_left is not None and status_left.reason is ExitReason.REPEATED_CRASH


@pytest.mark.parametrize(
    ("reason", "options", "expected"),
    [
        ("DONE", ["--time-is-up"], ["END", "0"]),
        ("CONFIG", [], ["END", "2"]),
        ("INTERRUPTED", [], ["END", "130"]),
        ("PREEMPTED", [], ["END", "85"]),  # a person touched STOP
        ("PREEMPTED", ["--time-is-up"], ["REQUEUE", "85"]),
        ("BUG", ["--time-is-up"], ["REQUEUE", "1"]),
    ],
)
def test_a_job_ends_with_the_status_of_its_reason(
    reason: str, options: list[str], expected: list[str], tmp_path: Path
) -> None:
    write_status(tmp_path, ended(reason))
    assert after_attempt(tmp_path, 1, *options)[:2] == expected


def test_a_checkpoint_between_two_crashes_gives_all_restarts_again(tmp_path: Path) -> None:
    for attempt in range(1, 7):
        (tmp_path / "checkpoints" / f"step_{attempt:06d}").mkdir(parents=True)
        write_status(tmp_path, ended("BUG"))
        assert decide_in_job(tmp_path, attempt, 1, is_time_up=False).next is AGAIN


@pytest.mark.parametrize("content", [None, "", "{}", json.dumps({"restarts_left": None})])
def test_a_decision_without_the_count_of_those_before_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / ATTEMPTS_FILE).write_text(content)
    with pytest.raises(RunFolderError, match=r"attempts\.json: found no tally.*submit the job again"):
        decide_in_job(tmp_path, 2, 3, is_time_up=False)


def test_an_abort_says_that_a_collective_over_nccl_may_have_run_out_of_time(tmp_path: Path) -> None:
    aborted, crashed = (silent_end(tmp_path, RankFailure(1, -number), 1, 0) for number in (6, 11))
    assert aborted.reason == crashed.reason == ExitReason.BUG  # started again like a HANG
    assert "ended by SIGABRT" in aborted.message and "run.collective_timeout_s" in aborted.message
    assert "ended by SIGSEGV" in crashed.message and "run.collective_timeout_s" not in crashed.message
