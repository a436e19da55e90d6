"""`rto judge` against a server: what is asked, in which order, what becomes of replies, limits, refusals and kills."""

import json
import math
import random
import threading
from functools import partial
from pathlib import Path

import pytest
from benchmarks.chat_service import Body, Refused, Said, chat_service, text_of
from benchmarks.made_files import (
    GOLDEN,
    INSTRUCTIONS,
    alpaca_outputs,
    arena,
    arena_answers,
    rto,
    write_json,
)

from rto_megatron.benchmarks.chat_endpoint import JudgeReply
from rto_megatron.benchmarks.judging import preference, shows_model_first, written_preference
from rto_megatron.errors import DataError, JudgeError, MachineError, RecipeError, RunFolderError, UserError

KEY = "sk-canary-0123456789"


def prefers(word: str) -> object:
    """A judge that is sure of the answer which has `word` in it."""

    def respond(body: Body) -> Said:
        text = text_of(body)
        first = text.index(f"{word} on") < text.index("ours on" if word == "base" else "base on")
        return Said(
            "m" if first else "M",
            [("m" if first else "M", -0.02), ("M" if first else "m", -4.0), ("x", -9.0)],
        )

    return respond


def answer_always(answer: Said | Refused, body: Body) -> Said | Refused:
    return answer


@pytest.fixture
def alpaca(tmp_path: Path) -> tuple[Path, Path]:
    return alpaca_outputs(tmp_path / "ours.json", "ours"), alpaca_outputs(tmp_path / "base.json", "base")


def judge_alpaca(url: str, files: tuple[Path, Path], out: Path, *more: object) -> str:
    answers, baseline = files
    return rto(
        "judge", answers, "--baseline", baseline, "--endpoint", url, "--judge", "gpt", "--out", out, *more
    )


def test_a_preference_weighs_both_letters_as_golden_numbers_do() -> None:
    golden = GOLDEN["ae_logprob_parser"]
    top = tuple((one["token"], one["logprob"]) for one in golden["top_logprobs"])
    assert preference(JudgeReply("M", top, None, 0, 0)) == pytest.approx(golden["preference_unswitched"])
    for letter, only in (("M", golden["only_M_present"]), ("m", golden["only_m_present"])):
        assert preference(JudgeReply(letter, ((letter, -0.1), ("x", -3)), None, 0, 0)) == only
    assert preference(JudgeReply("x", (("x", -0.1),), None, 0, 0)) is None


def test_a_written_letter_stands_alone() -> None:
    said = {"m": 1, " M.": 2, "The better one is M": 2, "m or M": None, "Model m": 1, "maybe": None, "": None}
    assert {text: written_preference(text) for text in said} == said


def test_alpaca_eval_is_judged_in_drawn_orders_and_scored(alpaca: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    with chat_service(prefers("ours")) as heard:
        shown = judge_alpaca(heard.url, alpaca, tmp_path / "out", "--key-file", tmp_path / "key")
    rows = json.loads((tmp_path / "out/annotations.json").read_text())
    assert [one["instruction"] for one in rows] == INSTRUCTIONS
    # 2 - p(m) / (p(m) + p(M)) where the judge is sure of the model, whichever side it stood on.
    assert [one["preference"] for one in rows] == pytest.approx([1 + 1 / (1 + math.exp(-3.98))] * len(rows))
    said = {text: next(text_of(one) for one in heard.bodies if text in text_of(one)) for text in INSTRUCTIONS}
    orders = {text: "ours on" in asked.split("base on")[0] for text, asked in said.items()}
    assert orders == {
        text: random.Random(f"is_switched_outputs{text}0").choices([False, True])[0] for text in INSTRUCTIONS
    }
    assert len(set(orders.values())) == 2
    body = heard.bodies[0]
    assert {name: body[name] for name in ("model", "temperature", "max_tokens", "logprobs", "top_logprobs")} == {
        "model": "gpt", "temperature": 1, "max_tokens": 1, "logprobs": True, "top_logprobs": 5,
    }  # fmt: skip
    assert set(heard.keys) == {f"Bearer {KEY}"}
    assert "6 requests, 600 tokens read, 42 written" in shown
    assert all(KEY not in path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    rto("score", tmp_path / "out", "--json", tmp_path / "s.json")
    (scored,) = json.loads((tmp_path / "s.json").read_text())["alpaca_eval"]
    assert scored["rate"]["win_rate"] == pytest.approx(100 / (1 + math.exp(-3.98)))
    assert (scored["rate"]["model"], scored["rate"]["baseline"]) == ("ours", "base")


def test_equal_outputs_are_a_tie_that_nobody_is_asked_about(tmp_path: Path) -> None:
    base = alpaca_outputs(tmp_path / "base.json", "base")
    rows = json.loads(base.read_text())
    ours = write_json(tmp_path / "ours.json", [{**one, "generator": "ours"} for one in rows])
    with chat_service(prefers("ours")) as heard:
        judge_alpaca(heard.url, (ours, base), tmp_path / "out")
    assert heard.bodies == []
    assert {one["preference"] for one in json.loads((tmp_path / "out/annotations.json").read_text())} == {1.5}


def test_nothing_is_asked_twice_and_nothing_is_lost_where_judging_ended(
    alpaca: tuple[Path, Path], tmp_path: Path
) -> None:
    good = prefers("ours")
    count, lock = [0], threading.Lock()

    def ends_after_three(body: Body) -> Said | Refused:
        with lock:
            count[0] += 1
            return good(body) if count[0] <= 3 else Refused(429, '{"error": {"code": "insufficient_quota"}}')

    out = tmp_path / "out"
    with chat_service(ends_after_three) as heard, pytest.raises(JudgeError, match="quota is used up"):
        judge_alpaca(heard.url, alpaca, out, "--concurrency", 2)
    with pytest.raises(DataError, match="judging is not finished: repeat the rto judge command"):
        rto("score", out)
    with (out / "judge_replies.jsonl").open("a") as file:
        file.write('{"request": "cut by a k')
    with chat_service(good) as heard:
        shown = judge_alpaca(heard.url, alpaca, out)
        assert len(heard.bodies) == len(INSTRUCTIONS) - 3
        assert "3 requests, 300 tokens read, 21 written; before: 3 requests" in shown
        before = (out / "annotations.json").read_text()
        judge_alpaca(heard.url, alpaca, out)
        assert len(heard.bodies) == len(INSTRUCTIONS) - 3
    assert (out / "annotations.json").read_text() == before
    with chat_service(good) as whole:
        judge_alpaca(whole.url, alpaca, tmp_path / "whole")
    assert (tmp_path / "whole/annotations.json").read_text() == before


def test_a_limit_of_rates_is_waited_for_and_other_failures_are_tried_again(
    alpaca: tuple[Path, Path], tmp_path: Path
) -> None:
    good, lock = prefers("ours"), threading.Lock()
    ills = [Refused(429, "slow down", {"retry-after": "0.2"}), Refused(503, "busy", {"retry-after": "0.1"})]

    def respond(body: Body) -> Said | Refused:
        with lock:
            return ills.pop() if ills else good(body)

    with chat_service(respond) as heard:
        judge_alpaca(heard.url, alpaca, tmp_path / "out")
        assert len(heard.bodies) == len(INSTRUCTIONS) + 2
    with chat_service(lambda body: Refused(503, "down", {"retry-after": "0.01"})) as heard:
        with pytest.raises(
            JudgeError, match="gave no answer to 3 requests, the last time: it answered 503: down"
        ):
            judge_alpaca(heard.url, alpaca, tmp_path / "new", "--retries", 2, "--concurrency", 1)
        assert len(heard.bodies) == 3


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            Refused(401, "bad key"),
            "status 401; the key is missing or wrong: name it with --key-file or --key-env",
        ),
        (Refused(404, "no model gpt"), "status 404; there is no such model or route.*no model gpt"),
        (Refused(200, "<html>"), "answered no chat completion.*<html>"),
        (Said("M"), "come without log-probs.*--no-logprobs"),
    ],
)
def test_an_endpoint_that_cannot_judge_is_told_at_once(
    answer: Said | Refused, said: str, alpaca: tuple[Path, Path], tmp_path: Path
) -> None:
    with chat_service(lambda body: answer) as heard:
        with pytest.raises(JudgeError, match=said):
            judge_alpaca(heard.url, alpaca, tmp_path / "out", "--concurrency", 1)
        assert len(heard.bodies) == 1


def test_a_key_that_the_endpoint_repeats_is_neither_shown_nor_kept(
    alpaca: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(KEY)
    for said in (Refused(401, f"wrong {KEY}"), Refused(400, f'{{"code": "content_filter", "of": "{KEY}"}}')):
        with chat_service(partial(answer_always, said)) as heard, pytest.raises(JudgeError) as told:
            judge_alpaca(heard.url, alpaca, tmp_path / "out", "--key-file", tmp_path / "key")
        assert KEY not in str(told.value) + (tmp_path / "out/judge_replies.jsonl").read_text()
    assert "[key]" in (tmp_path / "out/judge_replies.jsonl").read_text()


def test_a_server_that_is_not_there_is_named(alpaca: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(
        JudgeError, match=r"http://127\.0\.0\.1:9/v1/chat/completions gave no answer to 1 requests"
    ):
        judge_alpaca("http://127.0.0.1:9/v1", alpaca, tmp_path / "out", "--retries", 0)


def test_refusals_and_replies_off_format_are_told_and_asked_about_again_on_demand(
    alpaca: tuple[Path, Path], tmp_path: Path
) -> None:
    good = prefers("ours")

    def respond(body: Body) -> Said | Refused:
        text = text_of(body)
        if "Say one." in text:
            return Said(None, refusal="I will not judge this.")
        if "Say two." in text:
            return Refused(400, '{"error": {"code": "content_filter"}}')
        return Said("Both", [("Both", -0.1)]) if "Say three." in text else good(body)

    out = tmp_path / "out"
    with chat_service(respond) as heard:
        shown = judge_alpaca(heard.url, alpaca, out)
        assert len(heard.bodies) == len(INSTRUCTIONS)
        judge_alpaca(heard.url, alpaca, out)
        assert len(heard.bodies) == len(INSTRUCTIONS)
    rows = json.loads((out / "annotations.json").read_text())
    assert [one["preference"] is None for one in rows] == [True, True, True, False, False, False]
    assert "3 questions have no verdict" in shown and "I will not judge this." in shown
    with chat_service(good) as heard:
        judge_alpaca(heard.url, alpaca, out, "--again")
        assert len(heard.bodies) == 3
        judge_alpaca(heard.url, alpaca, out, "--again")
        assert len(heard.bodies) == 3
    assert all(one["preference"] for one in json.loads((out / "annotations.json").read_text()))


def test_a_judge_without_any_verdict_is_stopped_after_ten_replies(tmp_path: Path) -> None:
    instructions = [f"Say {number}." for number in range(40)]
    files = [alpaca_outputs(tmp_path / f"{name}.json", name, instructions) for name in ("ours", "base")]
    with chat_service(lambda body: Said("Well...", [("Well", -0.1)])) as heard:
        with pytest.raises(JudgeError, match="none of the judge's first 10 replies has a verdict"):
            judge_alpaca(heard.url, (files[0], files[1]), tmp_path / "out", "--concurrency", 2)
        assert len(heard.bodies) <= 12


def test_letters_alone_are_taken_where_the_endpoint_has_no_log_probs(
    alpaca: tuple[Path, Path], tmp_path: Path
) -> None:
    with chat_service(lambda body: Said("M")) as heard:
        judge_alpaca(heard.url, alpaca, tmp_path / "out", "--no-logprobs")
    assert "logprobs" not in heard.bodies[0]
    rows = json.loads((tmp_path / "out/annotations.json").read_text())
    assert [one["preference"] for one in rows] == [
        1 if shows_model_first(text) else 2 for text in INSTRUCTIONS
    ]


_CHATML = (
    "<|im_start|>system\nJudge.\n<|im_end|>\n<|im_start|>user\n"
    '{instruction} [{"model": "m", "output": """{output_1}"""}, {"model": "M", "output": """{output_2}"""}]\n<|im_end|>'
)
_CONFIG = (
    "judge_model: gpt\nsystem_prompt: Judge.\nprompt_template: "
    '["<|User Prompt|>\\n{question_1}\\n{answer_1} {x}\\n{answer_2}"]\n'
)


def test_templates_of_the_benchmarks_are_filled_and_braces_in_answers_stay(tmp_path: Path) -> None:
    (tmp_path / "clf.txt").write_text(_CHATML)
    (tmp_path / "judge_config.yaml").write_text(_CONFIG)
    ours = write_json(
        tmp_path / "o.json", [{"instruction": "Say {x}", "output": "{output_2}", "generator": "ours"}]
    )
    base = write_json(tmp_path / "b.json", [{"instruction": "Say {x}", "output": "b", "generator": "base"}])
    with chat_service(lambda body: Said("m", [("m", -0.1)])) as heard:
        judge_alpaca(heard.url, (ours, base), tmp_path / "out", "--template", tmp_path / "clf.txt")
        shown = ("{output_2}", "b") if shows_model_first("Say {x}") else ("b", "{output_2}")
        first, second = (
            f'{{"model": "{one}", "output": """{text}"""}}' for one, text in zip("mM", shown, strict=True)
        )
        wanted = f"Say {{x}} [{first}, {second}]"
        assert heard.bodies[0]["messages"] == [
            {"role": "system", "content": "Judge."},
            {"role": "user", "content": wanted},
        ]
    with chat_service(lambda body: Said("[[A=B]]")) as heard:
        rto(*arena(tmp_path, "v0.1"), "--endpoint", heard.url, "--template", tmp_path / "judge_config.yaml")
        texts = sorted(body["messages"][1]["content"] for body in heard.bodies)  # type: ignore[index]
        assert texts[0] == "<|User Prompt|>\nAsk 0?\nbase 0 {x}\nours 0"
    rows = json.loads((tmp_path / "out/annotations.json").read_text())
    assert rows[0]["annotator"].startswith("gpt (clf.txt ")


def test_answers_that_do_not_fit_together_are_named_before_anybody_is_asked(tmp_path: Path) -> None:
    ours = alpaca_outputs(tmp_path / "ours.json", "ours", [*INSTRUCTIONS[1:], "Say one. "])
    base = alpaca_outputs(tmp_path / "base.json", "base")
    with pytest.raises(
        DataError, match=r"does not answer 1 instructions.*'Say one.'; 1 of them differ in white space"
    ):
        judge_alpaca("http://127.0.0.1:9/v1", (ours, base), tmp_path / "out")
    arguments = arena(tmp_path, "v0.1")
    arena_answers(tmp_path / "model_answer/base.jsonl", "base", "v0.1", count=1)
    with pytest.raises(DataError, match=r"base\.jsonl does not answer 2 questions: q1, q2"):
        rto(*arguments, "--endpoint", "http://127.0.0.1:9/v1")
    with pytest.raises(DataError, match=r"answers alpaca_eval and .* arena_hard_v0\.1"):
        judge_alpaca("http://127.0.0.1:9/v1", (ours, tmp_path / "model_answer/ours.jsonl"), tmp_path / "out")
    rows = json.loads(base.read_text())
    write_json(base, [{**one, "generator": "ours", "output": "x"} for one in rows])
    with pytest.raises(DataError, match="answer differently, and both are of a model called 'ours'"):
        judge_alpaca("http://127.0.0.1:9/v1", (ours, base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        (["--key-env", "NO_SUCH_KEY"], MachineError, "has no such variable"),
        (["--key-file", "/nowhere/key"], MachineError, "/nowhere/key cannot be read"),
        (["--key-env", "A", "--key-file", "b"], RecipeError, "remove one"),
        (["--endpoint", "ftp://there"], RecipeError, "expected an address as https"),
        (["--endpoint", "there:8000/v1"], RecipeError, "expected an address as https"),
        (["--endpoint", "http://there:abc/v1"], RecipeError, "expected an address as https"),
        (["--out", __file__], RunFolderError, r"is a file; expected the name of a folder to write"),
        (["--endpoint", f"https://me:{KEY}@there/v1"], RecipeError, "before an @"),
        (["--template", "/nowhere.yaml"], RecipeError, "cannot be read"),
        (["--questions", "q.jsonl"], RecipeError, "are Arena-Hard's"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], kind: type[UserError], said: str, alpaca: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(kind, match=said) as refused:
        judge_alpaca("http://127.0.0.1:9/v1", alpaca, tmp_path / "out", *options)
    assert KEY not in str(refused.value)


def test_a_template_without_a_place_for_an_answer_is_refused(
    alpaca: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "t.yaml").write_text("user: '{question} {answer_a}'")
    with pytest.raises(RecipeError, match=r"it has no \{answer_b\}, in any of the ways answer_b, answer_2"):
        judge_alpaca("http://127.0.0.1:9/v1", alpaca, tmp_path / "out", "--template", tmp_path / "t.yaml")
