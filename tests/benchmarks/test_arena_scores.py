"""Arena-Hard's rates against golden numbers, through files in the official layouts."""

import json
import math
import random
import statistics
from pathlib import Path

import numpy as np
import pytest
from benchmarks.made_files import GOLDEN, rto, write_lines
from scipy.optimize import minimize

from rto_megatron.benchmarks.arena_judgments import LABELS, Version, battles, label_of, read_judgments
from rto_megatron.benchmarks.arena_scores import StyledBattles, styled_rates
from rto_megatron.errors import DataError

STYLED = GOLDEN["ah_v0_1_style_control"]


def judgments(path: Path, games: list[list[str | None]], **columns: str) -> Path:
    rows = [
        {
            **({"question_id": name} if "uid" not in columns else {"uid": name}),
            "model": "ours", "judge": "gpt-4-1106-preview", **{k: v for k, v in columns.items() if k != "uid"},
            "games": [{"user_prompt": "", "judgment": "", "score": label} for label in labels],
        }
        for name, *labels in games
    ]  # fmt: skip
    return write_lines(path, rows)


def test_the_plain_rate_equals_golden_numbers_through_the_command(tmp_path: Path) -> None:
    golden = GOLDEN["ah_v0_1_raw"]
    path = judgments(tmp_path / "model_judgment/gpt-4-1106-preview/ours.jsonl", golden["games"])
    shown = rto("score", tmp_path / "model_judgment", "--json", tmp_path / "s.json")
    (pool,) = json.loads((tmp_path / "s.json").read_text())["arena_hard"]
    (scored,) = pool["scores"]
    assert scored["win_rate"]["rate"] == pytest.approx(golden["score"], rel=1e-12)
    assert (scored["num_battles"], scored["num_unjudged"]) == (golden["n_battles"], 1)
    assert (pool["baseline"], pool["judges"]) == ("gpt-4-0314", ["gpt-4-1106-preview"])
    assert "55.3" in shown and "against gpt-4-0314" in shown
    assert battles(read_judgments(path)).wins.sum() == golden["model_wins"] + golden["ties"] / 2


def test_the_standard_error_is_over_questions(tmp_path: Path) -> None:
    """Ten times the same question is no more evidence than one, twenty questions with as many battles are."""
    alike = [[f"q{n}", "A>B", "B>A"] if n % 2 else [f"q{n}", "B>A", "A>B"] for n in range(20)]
    path = judgments(tmp_path / "ours.jsonl", alike)
    rto("score", path, "--json", tmp_path / "s.json")
    (pool,) = json.loads((tmp_path / "s.json").read_text())["arena_hard"]
    # Both games of a question agree: 20 means of 0 and 1, not 40 battles.
    assert pool["scores"][0]["standard_error"] == pytest.approx(
        100 * np.std([0, 1] * 10, ddof=1) / np.sqrt(20)
    )


def test_version_2_counts_questions_with_both_verdicts_and_each_category_alone(tmp_path: Path) -> None:
    games: list[list[str | None]] = [["q1", "A>B", None], ["q2", "A<<B", "A=B"], ["q3", "A>B", "B>A"]]
    hard = judgments(tmp_path / "a.jsonl", games, uid="", category="hard_prompt", baseline="o3-mini")
    rows = [json.loads(line) for line in hard.read_text().splitlines()]
    rows.append({**rows[2], "uid": "q4", "category": "creative_writing", "baseline": "gemini"})
    write_lines(hard, rows)
    rto("score", hard, "--json", tmp_path / "s.json")
    pools = json.loads((tmp_path / "s.json").read_text())["arena_hard"]
    # q1 is left out; q2: A<<B is a strong win of the model, then a tie; q3: the model loses both games.
    rates = {pool["category"]: pool["scores"][0]["win_rate"]["rate"] for pool in pools}
    assert rates == {"hard_prompt": pytest.approx(100 * 3.5 / 6), "creative_writing": 0}
    assert pools[0]["scores"][0]["num_unjudged"] == 1
    assert [pool["baseline"] for pool in pools] == ["o3-mini", "gemini"]


def test_where_no_baseline_is_named_it_is_the_official_one_of_version_and_category(tmp_path: Path) -> None:
    path = judgments(tmp_path / "a.jsonl", [["q1", "A>B", "B>A"]], uid="", category="hard_prompt")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    others = [{**rows[0], "uid": name, "category": name} for name in ("creative_writing", "own")]
    write_lines(path, [*rows, *others])
    for options, found in (
        ([], ["o3-mini-2025-01-31", "gemini-2.0-flash-001", "unnamed"]),
        (["--baseline", "mine"], ["mine"] * 3),
    ):
        rto("score", path, "--json", tmp_path / "s.json", *options)
        pools = json.loads((tmp_path / "s.json").read_text())["arena_hard"]
        assert [pool["baseline"] for pool in pools] == found


def styled(models: list[str]) -> StyledBattles:
    chosen = [one for one in STYLED["battles"] if one["model_b"] in models]
    names = ("token", "header", "list", "bold")
    styles = [
        [(one[f"{name}_a"] - one[f"{name}_b"]) / (one[f"{name}_a"] + one[f"{name}_b"] + 1) for name in names]
        for one in chosen
    ]
    wins = [{"model_a": 0.0, "model_b": 1.0}.get(one["winner"], 0.5) for one in chosen]
    places = [models.index(one["model_b"]) for one in chosen]
    return StyledBattles("v0.1", tuple(models), np.array(places), np.array(wins), np.array(styles))


def test_rates_at_equal_style_equal_golden_numbers_and_depend_on_the_pool() -> None:
    together = styled_rates(styled(["m1", "m2"]), num_rounds=2, seed=0)
    alone = [styled_rates(styled([name]), num_rounds=2, seed=0)[0] for name in ("m1", "m2")]
    for rates, golden in ((together, STYLED["score_sc"]), (alone, STYLED["score_sc_if_model_alone_in_pool"])):
        assert [one.rate for one in rates] == pytest.approx([golden["m1"], golden["m2"]], abs=1e-3)


@pytest.mark.parametrize(("version", "percent"), [("v0.1", 95), ("v2.0", 90)])
def test_the_interval_at_equal_style_holds_as_much_of_the_rounds_as_the_version_says(
    version: Version, percent: int
) -> None:
    """Of one model whose answers are styled as the baseline's, a round's rate is the mean of the drawn battles."""
    wins = np.array([1.0, 0.0, 0.5, 1.0] * 10)
    fought = StyledBattles(version, ("ours",), np.zeros(40, dtype=int), wins, np.zeros((40, 4)))
    (rate,) = styled_rates(fought, num_rounds=12, seed=3)
    chance = np.random.default_rng(3)
    means = [100 * wins[chance.integers(40, size=40)].mean() for _ in range(12)]
    wanted = np.percentile(means, [50 - percent / 2, 50 + percent / 2])
    assert [rate.low, rate.high] == pytest.approx(wanted, abs=0.2)


def pool_files(folder: Path) -> None:
    """The golden battles as files: a question a battle, won in game 0, game 1 without a verdict."""
    rows: dict[str, list[dict[str, object]]] = {"base": [], "m1": [], "m2": []}
    judged: dict[str, list[list[str | None]]] = {"m1": [], "m2": []}
    for number, one in enumerate(STYLED["battles"]):
        label = {"model_a": "A>B", "model_b": "B>A"}.get(one["winner"], "A=B")
        judged[one["model_b"]].append([f"q{number}", label, None])
        for model, side in (("base", "a"), (one["model_b"], "b")):
            style = {
                "token_len": one[f"token_{side}"],
                "header_count": {"h1": one[f"header_{side}"], "h2": 0},
                "list_count": {"ordered": one[f"list_{side}"]},
                "bold_count": {"**": one[f"bold_{side}"]},
            }
            answer = {"question_id": f"q{number}", "model_id": model, "conv_metadata": style}
            rows[model].append({**answer, "choices": [{"index": 0, "turns": [{"content": "x"}]}]})
    for model, games in judged.items():
        path = judgments(folder / f"model_judgment/j/{model}.jsonl", games, baseline="base")
        write_lines(path, [{**json.loads(line), "model": model} for line in path.read_text().splitlines()])
    for model, answers in rows.items():
        write_lines(folder / f"model_answer/{model}.jsonl", answers)


def test_style_control_of_files_names_its_pool(tmp_path: Path) -> None:
    pool_files(tmp_path)
    shown = rto(
        "score", tmp_path / "model_judgment", "--answers", tmp_path / "model_answer", "--rounds", 20,
        "--json", tmp_path / "s.json",
    )  # fmt: skip
    (pool,) = json.loads((tmp_path / "s.json").read_text())["arena_hard"]
    rates = {one["model"]: one["styled"]["rate"] for one in pool["scores"]}
    assert rates == pytest.approx(STYLED["score_sc"], abs=1e-3)
    assert all(one["styled"]["low"] < one["styled"]["rate"] < one["styled"]["high"] for one in pool["scores"])
    assert "equal style is that of this pool: m1, m2, and the baseline" in shown and "unverified" in shown


def chances_20(styles: dict[tuple[str, str], list[int]], judged: dict[str, list[list[str]]]) -> list[float]:
    """Slowly, as v2.0's show_result.py defines it: (model, question) -> counts; model -> question and labels."""
    strength = {"A>>B": (0, 3), "A>B": (0, 1), "A=B": (0.5, 1), "B>A": (1, 1), "B>>A": (1, 3)}
    battles: list[tuple[str, float, list[float]]] = []
    for model, games in judged.items():
        for question, first, second in games:
            (tokens, *marks), (tokens_b, *marks_b) = styles[model, question], styles["base", question]
            dense = [(n / (tokens + 1), m / (tokens_b + 1)) for n, m in zip(marks, marks_b, strict=True)]
            differences = [
                (tokens - tokens_b) / (tokens + tokens_b),
                *((x - y) / (x + y + 1) for x, y in dense),
            ]
            (won, times), (lost, more) = strength[first], strength[second]
            battles += [(model, won, differences)] * times + [(model, 1 - lost, differences)] * more
    columns = list(zip(*(one for _, _, one in battles), strict=True))
    scaled = [[(x - statistics.mean(c)) / statistics.stdev(c) for x in c] for c in columns]
    names = ["base", *judged]

    def loss(parameters: np.ndarray) -> float:
        total = 0.0
        for number, (model, won, _) in enumerate(battles):
            logit = parameters[names.index(model)] - parameters[0]
            logit += sum(parameters[len(names) + place] * scaled[place][number] for place in range(4))
            total += won * math.log1p(math.exp(-logit)) + (1 - won) * math.log1p(math.exp(logit))
        return total

    found = minimize(loss, np.full(len(names) + 4, 0.5), method="BFGS", options={"gtol": 1e-7}).x
    return [100 / (1 + math.exp(found[0] - rating)) for rating in found[1 : len(names)]]


def test_style_control_of_version_2_equals_a_slow_loop_of_its_definition(tmp_path: Path) -> None:
    chance = random.Random(0)
    questions = [f"q{number}" for number in range(12)]
    names = ("base", "m1", "m2")
    styles = {
        (name, q): [chance.randint(20, 400), *chance.choices(range(9), k=3)]
        for name in names
        for q in questions
    }
    judged = {name: [[q, *chance.choices(LABELS, k=2)] for q in questions] for name in names[1:]}
    for model, games in judged.items():
        path = judgments(
            tmp_path / f"model_judgment/{model}.jsonl", games, uid="", category="hard_prompt", baseline="base"
        )
        write_lines(path, [{**json.loads(line), "model": model} for line in path.read_text().splitlines()])
    for name in names:
        rows = []
        for question in questions:
            tokens, headers, items, bold = styles[name, question]
            metadata = {
                "token_len": tokens,
                "header_count": {"h1": headers, "h2": 0},
                "list_count": {"ordered": items, "unordered": 0},
                "bold_count": {"**": bold, "__": 0},
            }
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": {"answer": "x"}},
            ]
            rows.append({"uid": question, "model": name, "messages": messages, "metadata": metadata})
        write_lines(tmp_path / f"model_answer/{name}.jsonl", rows)
    rto(
        "score", tmp_path / "model_judgment", "--answers", tmp_path / "model_answer", "--rounds", 20,
        "--json", tmp_path / "s.json",
    )  # fmt: skip
    (pool,) = json.loads((tmp_path / "s.json").read_text())["arena_hard"]
    rates = [one["styled"]["rate"] for one in pool["scores"]]
    assert rates == pytest.approx(chances_20(styles, judged), abs=1e-3)
    assert all(one["styled"]["low"] < one["styled"]["rate"] < one["styled"]["high"] for one in pool["scores"])


def test_style_control_says_what_answers_it_lacks(tmp_path: Path) -> None:
    pool_files(tmp_path)
    (tmp_path / "model_answer/base.jsonl").unlink()
    arguments = ("score", tmp_path / "model_judgment", "--answers", tmp_path / "model_answer")
    with pytest.raises(DataError, match="no answers of base"):
        rto(*arguments)
    write_lines(
        tmp_path / "model_answer/base.jsonl",
        [{"question_id": "q0", "model_id": "base", "choices": [{"turns": [{"content": "x"}]}]}],
    )
    with pytest.raises(
        DataError, match=r"(?s)have no counts of style.*question q1 is judged and not answered"
    ):
        rto(*arguments)


def test_answers_of_a_model_in_two_places_are_refused_and_those_of_others_not_read(tmp_path: Path) -> None:
    pool_files(tmp_path)
    (tmp_path / "model_answer/others.jsonl").write_text("no answers\n")
    rto("score", tmp_path / "model_judgment", "--answers", tmp_path, "--rounds", 10)
    text = (tmp_path / "model_answer/m1.jsonl").read_text()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/m1.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"several answers of one model"):
        rto("score", tmp_path / "model_judgment", "--answers", tmp_path)


def test_a_question_twice_and_other_kinds_of_files_are_refused(tmp_path: Path) -> None:
    path = judgments(tmp_path / "ours.jsonl", [["q1", "A>B", "A>B"], ["q1", "A>B", "A>B"]])
    with pytest.raises(DataError, match="'q1' is judged more than once"):
        rto("score", path)
    with pytest.raises(DataError, match="games is None, expected a list of two"):
        rto("score", write_lines(path, [{"question_id": "q1", "model": "ours"}]))
    with pytest.raises(DataError, match="judge answers first"):
        rto("score", (tmp_path / "empty").mkdir() or tmp_path / "empty")


@pytest.mark.parametrize(
    ("said", "old", "new"),
    [
        ("so [[A>B]]", ("A>B", False), ("A>B", False)),
        ("[[A>B]] and again [[A>B]]", ("A>B", False), ("A>B", False)),
        ("[[A>B]], no: [[B>>A]]", (None, False), ("B>>A", False)),
        ("undecided", (None, True), (None, False)),
        ("[A=B]", (None, True), ("A=B", False)),
        ("so [[a>>b]]", (None, True), ("A>>B", False)),
        ("[[A<<B]]", (None, False), ("A<<B", False)),
        ("[[A]]", (None, False), (None, False)),
    ],
)
def test_verdicts_are_read_as_each_version_does(
    said: str, old: tuple[str | None, bool], new: tuple[str | None, bool]
) -> None:
    assert (label_of(said, "v0.1"), label_of(said, "v2.0")) == (old, new)
