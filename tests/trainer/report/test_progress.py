"""Progress off a terminal is one line per step, on the lead rank only."""

import pytest

from rto_megatron.reporting.progress import progress, say


def test_lead_rank_prints_a_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("sft", total=5, is_lead=True, done=3) as advance:
        advance("loss 1")
        advance("loss 2")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["sft", "4/5"], ["sft", "5/5"]]
    assert lines[1].endswith("loss 2")


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("sft", total=2, is_lead=False) as advance:
        advance("loss 1")
    say("hello", is_lead=False)
    assert capsys.readouterr().out == ""
