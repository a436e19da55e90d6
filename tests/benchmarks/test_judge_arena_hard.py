"""`rto judge` of Arena-Hard: two games a question, words that are no labels, categories with baselines of their own."""

import json
from pathlib import Path

import pytest
from benchmarks.chat_service import Body, Said, chat_service, text_of
from benchmarks.made_files import arena, read_lines, rto, write_lines

from rto_megatron.errors import DataError, JudgeError, RecipeError


def sure_of_ours(body: Body) -> Said:
    text = text_of(body)
    is_first = text.index("ours") < text.index("base")
    return Said("I see. [[A>>B]]" if is_first else "I see. [[B>A]]")


def sure_in_odd_lines(body: Body) -> Said:
    """With what str.splitlines takes for an end of line and JSON leaves as it is."""
    return Said(f"First.\u2028\x85{sure_of_ours(body).content}")


@pytest.mark.parametrize("version", ["v0.1", "v2.0"])
def test_arena_hard_is_judged_in_both_orders_and_scored(version: str, tmp_path: Path) -> None:
    with chat_service(sure_of_ours) as heard:
        rto(*arena(tmp_path, version), "--endpoint", heard.url)
    assert len(heard.bodies) == 6
    assert (heard.bodies[0]["temperature"], heard.bodies[0]["max_tokens"]) == (0, 4096)
    path = tmp_path / "out/model_judgment/org_gpt/ours.jsonl"
    rows = read_lines(path)
    assert [one["question_id" if version == "v0.1" else "uid"] for one in rows] == ["q0", "q1", "q2"]
    # Game 0 shows the baseline first.
    assert [[game["score"] for game in one["games"]] for one in rows] == [["B>A", "A>>B"]] * 3
    assert {(one["model"], one["judge"], one["baseline"]) for one in rows} == {("ours", "org/gpt", "base")}
    rto("score", path, "--json", tmp_path / "s.json")
    pools = json.loads((tmp_path / "s.json").read_text())["arena_hard"]
    assert all(pool["scores"][0]["win_rate"]["rate"] == 100 for pool in pools)
    assert sum(pool["scores"][0]["num_battles"] for pool in pools) == 3 * (1 + 3)


def test_a_judge_that_ends_without_a_verdict_is_asked_to_go_on_once(tmp_path: Path) -> None:
    def respond(body: Body) -> Said:
        messages = body["messages"]
        assert isinstance(messages, list)
        is_first_question = "Ask 0?" in text_of(body)
        if len(messages) > 2:
            assert messages[2] == {"role": "assistant", "content": "Hm."}
            return Said("Still hm." if is_first_question else "[[A=B]]")
        return Said("Hm.")

    with chat_service(respond) as heard:
        rto(*arena(tmp_path, "v0.1"), "--endpoint", heard.url)
        assert len(heard.bodies) == 2 * 6
        rto(*arena(tmp_path, "v0.1"), "--endpoint", heard.url)
        assert len(heard.bodies) == 2 * 6
    rows = read_lines(tmp_path / "out/model_judgment/org_gpt/ours.jsonl")
    games = [[(game["judgment"], game["score"]) for game in one["games"]] for one in rows]
    assert games == [[("Hm.\nStill hm.", None)] * 2, *[[("Hm.\n[[A=B]]", "A=B")] * 2] * 2]


def test_a_judge_without_a_verdict_in_most_games_is_an_error(tmp_path: Path) -> None:
    """Both games of two questions and one of the third: five of six."""

    def respond(body: Body) -> Said:
        text = text_of(body)
        is_judged = "Ask 0?" in text and text.index("ours") < text.index("base")
        return Said("[[A=B]]" if is_judged else "I cannot say.")

    said = "more than half of the comparisons have no verdict"
    with chat_service(respond) as heard, pytest.raises(JudgeError, match=said):
        rto(*arena(tmp_path, "v2.0"), "--endpoint", heard.url)
    rows = read_lines(tmp_path / "out/model_judgment/org_gpt/ours.jsonl")
    assert sum(game["score"] is None for one in rows for game in one["games"]) == 5


@pytest.mark.parametrize("version", ["v0.1", "v2.0"])
def test_a_judge_whose_words_are_no_labels_is_stopped_after_ten_replies(version: str, tmp_path: Path) -> None:
    with chat_service(lambda body: Said("The first one is better: [[A]]")) as heard:
        with pytest.raises(JudgeError, match="none of the judge's first 10 replies has a verdict"):
            rto(*arena(tmp_path, version, count=20), "--endpoint", heard.url, "--concurrency", 2)
        assert len(heard.bodies) <= 12


def test_a_category_is_judged_alone(tmp_path: Path) -> None:
    with chat_service(sure_of_ours) as heard:
        rto(*arena(tmp_path, "v2.0"), "--endpoint", heard.url, "--category", "creative_writing")
        assert len(heard.bodies) == 2
        with pytest.raises(RecipeError, match="has creative_writing, hard_prompt"):
            rto(*arena(tmp_path, "v2.0"), "--endpoint", heard.url, "--category", "coding")


def test_the_second_category_is_added_to_the_first_and_judged_again_replaces_itself(tmp_path: Path) -> None:
    """Each of v2.0 has a baseline of its own, so each is a command of its own, into one folder."""
    arguments = [*arena(tmp_path, "v2.0", count=5), "--out", tmp_path / "both"]
    for category in ("creative_writing", "hard_prompt", "creative_writing"):
        with chat_service(sure_in_odd_lines) as heard:
            rto(*arguments, "--endpoint", heard.url, "--category", category)
    rows = read_lines(tmp_path / "both/model_judgment/org_gpt/ours.jsonl")
    assert sorted((one["uid"], one["category"]) for one in rows) == [
        ("q0", "hard_prompt"),
        ("q1", "creative_writing"),
        ("q2", "hard_prompt"),
        ("q3", "creative_writing"),
        ("q4", "hard_prompt"),
    ]


def test_answers_under_a_system_prompt_are_judged_by_their_question(tmp_path: Path) -> None:
    """As v2.0's gen_answer.py writes them of a model with `sys_prompt`."""
    arguments = arena(tmp_path, "v2.0")
    path = tmp_path / "model_answer/base.jsonl"
    rows = read_lines(path)
    system = {"role": "system", "content": "You are a base."}
    write_lines(path, [{**one, "messages": [system, *one["messages"]]} for one in rows])
    with chat_service(sure_of_ours) as heard:
        rto(*arguments, "--endpoint", heard.url)
    assert all("You are a base." not in text_of(body) for body in heard.bodies)
    write_lines(path, [{**one, "messages": one["messages"][:1]} for one in rows])
    with pytest.raises(DataError, match=r"base\.jsonl:1: is no answer of arena_hard_v2\.0"):
        rto(*arguments, "--endpoint", "http://127.0.0.1:9/v1")
