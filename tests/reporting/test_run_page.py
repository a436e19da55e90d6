"""The page of `rto view`: the numbers of known rollouts, in a real browser, and nothing in their texts runs."""

import json
import re
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from reporting.browser import CHROMIUM, chromium_tab
from typer.testing import CliRunner

from rto_megatron.cli.main import app
from rto_megatron.data.token_text import TokenText
from rto_megatron.errors import RecipeError, UserError
from rto_megatron.reporting.metrics import MetricLog
from rto_megatron.reporting.rollout_files import RolloutFiles
from rto_megatron.reporting.rollout_table import StepRollouts, rollout_table
from rto_megatron.reporting.run_page import view_of, write_page
from rto_megatron.types import Rollout

HOSTILE = (
    "</script><script>window.ran=1</script>",
    "\"'><img src=x onerror=window.ran=2>",
    "<!--<script>",
    "]]>\u2028\u2029&lt;b&gt;\\u003c",
    "javascript:window.ran=3",
)
NAMES = (
    *("sampled", "logp_pool", "logp_policy", "logp_ref", "dpo_logratio", "value"),
    *("reward", "reward_score", "reward_dpo", "reward_kl", "advantage", "return"),
)


def _number(name: str, step: int, row: int, token: int) -> float:
    """Another one everywhere."""
    return (-1) ** token * (NAMES.index(name) + step / 8 + row / 64 + token / 512)


def _decode(ids: Sequence[int]) -> str:
    return "".join(HOSTILE[one] for one in ids)


def _write_run(
    run_dir: Path,
    steps: int,
    num_responses: int = 2,
    num_tokens: int = 5,
    decode: Callable[[Sequence[int]], str] = _decode,
) -> None:
    files = RolloutFiles(
        run_dir, 0, steps, lambda kept: rollout_table(kept, decode, TokenText(decode, anchor=4))
    )
    ids = tuple(token % 5 for token in range(num_tokens))
    for step in range(1, steps + 1):
        rollouts = tuple(
            Rollout(f"p{row}{HOSTILE[row % 2]}", (0, 1), ids, (0.0,) * num_tokens, "stop", step - 1)
            for row in range(num_responses)
        )
        grids = {
            name: np.array(
                [[_number(name, step, row, t) for t in range(num_tokens)] for row in range(num_responses)],
                dtype=np.float32,
            )
            for name in NAMES
        }
        grids["sampled"] = np.ones_like(grids["sampled"])
        sums = {"score": grids["reward_score"].sum(1), "reward": grids["reward"].sum(1)}
        files.write(StepRollouts(step, rollouts, sums, grids))
    files.close()
    with MetricLog(run_dir) as log:
        for step in range(1, steps + 1):
            log.write(
                step, {"reward/score": step / 3, "policy/grad_norm": float("nan") if step == 2 else 1.5}
            )


def test_a_page_where_a_folder_stands_or_none_is_above_it_is_refused(tmp_path: Path) -> None:
    for out, said in (
        (tmp_path, "is a folder; expected the name of a file"),
        (tmp_path / "a/b", "there is no folder"),
    ):
        refused = CliRunner().invoke(app, ["view", str(tmp_path / "run"), "--out", str(out)])
        assert isinstance(refused.exception, RecipeError) and said in str(refused.exception)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_the_numbers_of_two_runs_and_runs_no_text(tmp_path: Path) -> None:
    pytest.importorskip("websockets")
    first, second = tmp_path / "<img src=x onerror=window.ran=4>", tmp_path / "other"
    _write_run(first, steps=3)
    _write_run(second, steps=2)
    page = tmp_path / "view.html"
    shown = CliRunner().invoke(app, ["view", str(first), str(second), "--out", str(page)])
    assert shown.exit_code == 0, shown.output
    with chromium_tab(tmp_path / "profile") as tab:
        tab.open(page)
        assert tab.value("window.ran === undefined && document.images.length === 0")
        assert tab.value("document.getElementById('title').textContent") == f"{first} and {second}"
        pieces = "[...document.querySelectorAll('#tokens-0 span')].map((span) => span.textContent)"
        assert tab.value(pieces) == list(HOSTILE)
        titles = "[...document.querySelectorAll('#tokens-PLACE span')].map((span) => span.title)"
        for quantity in ("reward_dpo", "value", "advantage"):
            tab.value(
                f"quantity.value = '{quantity}'; quantity.dispatchEvent(new Event('change')); quantity.value"
            )
            for place, step in ((0, 3), (1, 2)):  # the newest step of each, its first response
                wanted = [f"{quantity} {float(f'{_number(quantity, step, 0, t):.4g}'):g}" for t in range(5)]
                assert tab.value(titles.replace("PLACE", str(place))) == wanted
        colours = tab.value(
            "[...document.querySelectorAll('#tokens-0 span')].map((span) => span.style.backgroundColor)"
        )
        assert [one[:13] for one in colours[:2]] == ["rgba(9, 105, ", "rgba(207, 34,"]  # above 0, below 0
        # The second row of the first run; the other run follows to the same prompt.
        tab.value("document.querySelectorAll('.run')[0].querySelectorAll('tbody tr')[1].click()")
        tab.value("document.querySelectorAll('#tokens-1 span')[2].dispatchEvent(new Event('mouseenter'))")
        numbers = dict(
            tab.value(
                "[...document.querySelectorAll('#numbers-1 tr')].map((row) => [...row.cells].map((c) => c.textContent))"
            )
        )
        assert float(numbers["value"]) == pytest.approx(_number("value", 2, 1, 2), rel=1e-3)
        assert float(numbers["gap"]) == pytest.approx(-1.0)  # logp_pool is one less in this table
        assert float(numbers["kl"]) == pytest.approx(-1.0)
        assert tab.value("document.querySelectorAll('#curves figure').length") == 2
        assert (
            tab.value("document.querySelectorAll('#curves path')[0].getAttribute('d')")
            == "M0.00 50.00M200.00 50.00"
        )
        # What the page's policy forbids: a script that a text would bring along, and any request.
        tab.value(
            "window.stopped = 0; addEventListener('securitypolicyviolation', () => window.stopped++);"
            "const made = document.createElement('script'); made.textContent = 'window.ran = 5';"
            "document.body.append(made); fetch('http://127.0.0.1:9/').catch(() => 0)"
        )
        stopped = "new Promise((go) => setTimeout(() => go([window.ran === undefined, window.stopped]), 50))"
        assert tab.value(stopped) == [True, 2]


def test_the_page_holds_no_text_of_a_run_outside_its_json(tmp_path: Path) -> None:
    _write_run(tmp_path / "run", steps=1)
    write_page([tmp_path / "run"], tmp_path / "view.html")
    page = (tmp_path / "view.html").read_text()
    assert page.count("<script") == 2 and page.count("</script>") == 2 and "<!--" not in page
    data = re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)
    assert data is not None and not set("<>&\u2028\u2029") & set(data[1])
    assert json.loads(data[1])[0]["rollouts"][0]["pieces"] == list(HOSTILE)
    assert "default-src 'none'" in page and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert (tmp_path / "view.html").stat().st_mode & 0o077 == 0


def test_a_long_run_stays_small_and_the_page_says_what_it_left_out(tmp_path: Path) -> None:
    _write_run(tmp_path / "run", steps=2, num_responses=16, num_tokens=1500)
    write_page([tmp_path / "run"] * 2, tmp_path / "view.html")
    assert (tmp_path / "view.html").stat().st_size < 5_000_000
    view = view_of(tmp_path / "run", (), ())
    assert 1 < len(view.rollouts) < 32 and view.note == f"{len(view.rollouts)} of 32 responses are shown"
    assert {row["step"] for row in view.rollouts} == {1, 2}


def test_a_run_without_rollouts_says_which_key_writes_them(tmp_path: Path) -> None:
    with MetricLog(tmp_path / "sft") as log:
        log.write(1, {"loss": 2.0})
    assert "run.keep_rollouts" in view_of(tmp_path / "sft", (), ()).note
    with pytest.raises(UserError, match=r"run\.keep_rollouts"):
        view_of(tmp_path / "sft", (3,), ())
    with pytest.raises(UserError, match=r"neither metrics\.jsonl nor rollouts"):
        view_of(tmp_path, (), ())


def test_marks_that_are_escaped_count_as_what_they_become(tmp_path: Path) -> None:
    def decode(ids: Sequence[int]) -> str:
        return "<" * 60 * len(ids)

    _write_run(tmp_path / "run", steps=2, num_responses=32, num_tokens=300, decode=decode)
    write_page([tmp_path / "run"] * 2, tmp_path / "view.html")
    assert (tmp_path / "view.html").stat().st_size < 5_000_000


def test_of_a_long_run_only_what_is_shown_is_made_into_numbers_of_python(tmp_path: Path) -> None:
    """64 responses of 1500 tokens; the page has room for a few of them, and all would take over 50 MB."""
    _write_run(tmp_path / "run", steps=2, num_responses=32, num_tokens=1500)
    tracemalloc.start()
    view = view_of(tmp_path / "run", (), ())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(view.rollouts) < 20
    assert peak < 30_000_000
