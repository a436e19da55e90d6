"""Rows of every public layout say what their authors mean; rows that say two things are refused."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from data.written_rows import LIMITS, assistant, user, write_lines
from transformers import PreTrainedTokenizerBase

from rto_megatron.data.layouts import DEMONSTRATIONS, JUDGEMENTS, PAIRS, PROMPTS, READERS
from rto_megatron.data.loader import load_demonstrations, load_pairs
from rto_megatron.data.row import Row
from rto_megatron.errors import DataError


def says(who: str, text: str, **more: object) -> dict[str, object]:
    return {"from": who, "value": text, **more}


# Layout: columns, and the turns that they stand for.
CONVERSATIONS: dict[str, tuple[str, dict[str, object], list[tuple[str, str]]]] = {
    "messages": ("messages", {"messages": [user("a"), assistant("b")]}, [("user", "a"), ("assistant", "b")]),
    "response": ("response", {"prompt": "a", "response": "b"}, [("user", "a"), ("assistant", "b")]),
    "TRL texts": ("completion", {"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
    "TRL turns": (
        "completion",
        {"prompt": [user("a")], "completion": [assistant("b")]},
        [("user", "a"), ("assistant", "b")],
    ),
    "TRL tools": (
        "completion",
        {
            "prompt": [user("a")],
            "completion": [assistant("b"), {"role": "tool", "content": "c"}, assistant("d")],
        },
        [("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d")],
    ),
    "Alpaca": (
        "alpaca",
        {"instruction": "a", "input": "", "output": "b"},
        [("user", "a"), ("assistant", "b")],
    ),
    "Alpaca with all": (
        "alpaca",
        {"instruction": "a", "input": "x", "output": "b", "system": "s", "history": [["q", "r"]]},
        [("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "a\nx"), ("assistant", "b")],
    ),
    "ShareGPT": (
        "sharegpt",
        {"conversations": [says("human", "a"), says("gpt", "b", weight=1)], "system": "s"},
        [("system", "s"), ("user", "a"), ("assistant", "b")],
    ),
    "ShareGPT with a tool": (
        "sharegpt",
        {"conversation": [says("user", "a"), says("observation", "o"), says("gpt", "b")]},
        [("user", "a"), ("tool", "o"), ("assistant", "b")],
    ),
    "ShareGPT with its prompt": (
        "sharegpt",
        {"prompt": "a", "conversations": [says("system", "s"), says("human", "a"), says("gpt", "b")]},
        [("system", "s"), ("user", "a"), ("assistant", "b")],
    ),
    "messages named conversations": (
        "sharegpt",
        {"conversations": [user("a"), assistant("b")]},
        [("user", "a"), ("assistant", "b")],
    ),
    "parts": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "x"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "b", "image": None}]},
            ]
        },
        [("user", "a\nx"), ("assistant", "b")],
    ),
    "a chosen answer": (
        "texts",
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        [("user", "a"), ("assistant", "b")],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_demonstration_says_what_its_layout_means(name: str) -> None:
    layout, columns, turns = CONVERSATIONS[name]
    said = DEMONSTRATIONS.read(Row("rows.jsonl:1", columns))
    assert said.layout == layout
    assert [(message.role, message.content) for message in said.value] == turns
    assert all(message.fields == {} for message in said.value)


HH = "\n\nHuman: a\n\nAssistant: x\n\nHuman: Is it\n\nso?\n\nAssistant: "
PAIR_ROWS: dict[str, tuple[str, dict[str, object], list[tuple[str, str]]]] = {
    "whole conversations": (
        "conversations",
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        [("user", "a")],
    ),
    "TRL turns": (
        "answers",
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        [("user", "a")],
    ),
    "a text and turns": (
        "answers",
        {"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]},
        [("user", "a")],
    ),
    "texts": ("texts", {"prompt": "a", "chosen": "b", "rejected": "c"}, [("user", "a")]),
    "HH": (
        "transcripts",
        {"chosen": f"{HH}b", "rejected": f"{HH}c"},
        [("user", "a"), ("assistant", "x"), ("user", "Is it\n\nso?")],
    ),
    "Orca": (
        "question",
        {"system": "s", "question": "a", "chosen": "b", "rejected": "c"},
        [("system", "s"), ("user", "a")],
    ),
    "Orca with a blank system text": (
        "question",
        {"system": "", "system_prompt": " ", "question": "a", "chosen": "b", "rejected": "c"},
        [("user", "a")],
    ),
    "Alpaca": (
        "instruction",
        {"instruction": "a", "input": "x", "chosen": "b", "rejected": "c"},
        [("user", "a\nx")],
    ),
}


@pytest.mark.parametrize("name", PAIR_ROWS)
def test_a_pair_says_what_its_layout_means_and_is_two_verdicts(name: str) -> None:
    layout, columns, prompt = PAIR_ROWS[name]
    said = PAIRS.read(Row("rows.jsonl:1", columns))
    whole = [[(message.role, message.content) for message in answer] for answer in said.value]
    assert said.layout == layout
    assert whole == [[*prompt, ("assistant", "b")], [*prompt, ("assistant", "c")]]
    verdicts = JUDGEMENTS.read(Row("rows.jsonl:1", columns)).value
    assert verdicts == [(said.value[0], True), (said.value[1], False)]


REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "two layouts": (
        "demonstrations",
        {"messages": [user("a"), assistant("b")], "instruction": "a", "output": "other"},
        r"its columns messages \(messages\) and instruction \+ input \+ output \(alpaca\) say different things; set "
        "data.layout=messages or data.layout=alpaca",
    ),
    "two pairs": (
        "pairs",
        {"prompt": "a", "question": "other", "chosen": "b", "rejected": "c"},
        r"\(texts\) and question .* say different things",
    ),
    "answers that begin with the prompt": (
        "pairs",
        {"prompt": "what does it say", "chosen": "what does it say? b", "rejected": "what does it say? c"},
        "both begin with the prompt",
    ),
    "an image": (
        "demonstrations",
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}, assistant("b")]},
        "has parts of the types image; only text is read",
    ),
    "an unknown speaker": (
        "demonstrations",
        {"conversations": [says("human", "a"), says("function_call", "{}"), says("gpt", "b")]},
        "turn 1 of 'conversations' is from 'function_call'; known are human",
    ),
    "no turn of ShareGPT": (
        "demonstrations",
        {"conversations": [says("human", "a"), {"from": "gpt"}]},
        "turn 1 of 'conversations' is",
    ),
    "a prompt that ShareGPT's turns do not answer": (
        "demonstrations",
        {"prompt": "other", "conversations": [says("human", "a"), says("gpt", "b")]},
        "column 'prompt' is 'other', and 'conversations' answers",
    ),
    "no answer": (
        "demonstrations",
        {"conversations": [says("gpt", "b")]},
        "expected a prompt and a last message",
    ),
    "a transcript and a text": (
        "pairs",
        {"chosen": f"{HH}b", "rejected": "c"},
        "column 'rejected' is 'c', expected a transcript",
    ),
    "a transcript that waits": (
        "pairs",
        {"chosen": f"{HH}b\n\nHuman: d", "rejected": f"{HH}c"},
        "does not end",
    ),
    "transcripts that part early": (
        "pairs",
        {"chosen": f"{HH}b", "rejected": "\n\nHuman: z\n\nAssistant: c"},
        "do not answer the same prompt",
    ),
    "a history that is none": (
        "demonstrations",
        {"instruction": "a", "output": "b", "history": ["q"]},
        "column 'history' is",
    ),
    "a weight that is none": (
        "demonstrations",
        {"messages": [user("a"), {**assistant("b"), "weight": 0.5}]},
        "message 1 of 'messages' is",
    ),
    "a prompt that is a transcript": (
        "pairs",
        {"prompt": f"{HH.rstrip()}", "chosen": " b", "rejected": " c"},
        "column 'prompt' is a transcript .* one turn of the user",
    ),
    "a prompt to sample for that is a transcript": (
        "prompts",
        {"prompt": f"{HH.rstrip()}"},
        "column 'prompt' is a transcript",
    ),
    "a prompt that is messages as JSON writes them": (
        "prompts",
        {"prompt": json.dumps([user("a")])},
        "column 'prompt' is a list of messages written as text",
    ),
    "answers that are messages as Python writes them": (
        "pairs",
        {
            "prompt": "a",
            "chosen": str([user("a"), assistant("b")]),
            "rejected": str([user("a"), assistant("c")]),
        },
        "column 'chosen' is a list of messages written as text",
    ),
    "texts without a prompt": (
        "pairs",
        {"chosen": "b", "rejected": "c"},
        "no column says what they answer; expected a list of messages",
    ),
    "a null beside a chosen text": ("pairs", {"prompt": "a", "chosen": "b"}, "column 'rejected' is missing"),
    "a null beside a chosen text to judge": (
        "judgements",
        {"prompt": "a", "chosen": "b"},
        "column 'rejected' is missing",
    ),
    "an output without its instruction": (
        "demonstrations",
        {"input": "a", "output": "b"},
        r"no whole layout .*: messages; prompt \+ response; .*instruction \+ input \+ output",
    ),
    "two system texts": (
        "prompts",
        {"prompt": "a", "system": "s", "system_prompt": "t"},
        "columns 'system' and 'system_prompt' say different things",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_may_mean_something_else_is_refused(name: str) -> None:
    examples, columns, message = REFUSED[name]
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{message}"):
        READERS[examples].read(Row("rows.jsonl:1", columns))


def test_the_named_layout_decides_and_others_are_read_as_before() -> None:
    columns = {"messages": [user("a"), assistant("b")], "instruction": "a", "output": "other"}
    for layout, answer in (("messages", "b"), ("alpaca", "other")):
        said = DEMONSTRATIONS.read(Row("rows.jsonl:1", columns), layout)
        assert (said.layout, said.value[-1].content) == (layout, answer)
    plain = DEMONSTRATIONS.read(Row("rows.jsonl:1", {"prompt": "a", "response": "b"}), "alpaca")
    assert plain.layout == "response"


def test_the_named_layout_decides_where_it_is_a_last_resort_too() -> None:
    columns = {"prompt": "a", "response": "b", "chosen": "c", "rejected": "d"}
    for layout, answer in ((None, "b"), ("response", "b"), ("texts", "c")):
        said = DEMONSTRATIONS.read(Row("rows.jsonl:1", columns), layout)
        assert (said.layout, said.value[-1].content) == (layout or "response", answer)
    judged = {"prompt": "a", "completion": "b", "label": False, "chosen": "c", "rejected": "d"}
    verdicts = JUDGEMENTS.read(Row("rows.jsonl:1", judged), "texts").value
    assert [(turns[-1].content, is_desirable) for turns, is_desirable in verdicts] == [
        ("c", True),
        ("d", False),
    ]


@pytest.mark.parametrize(
    "said",
    [
        '[{"role": "user"}]',
        '[{"role": "cook", "name": "content"}]',
        '[{"role": "user", "content": "a"}] is what I sent',
        "Human: a",
        "Assistant: a\n\nHuman: b",
    ],
)
def test_a_text_that_looks_like_turns_and_is_none_is_read_as_it_is(said: str) -> None:
    (turn,) = PROMPTS.read(Row("rows.jsonl:1", {"prompt": said})).value
    assert turn.content == said


def test_layouts_that_say_the_same_are_not_in_doubt() -> None:
    columns = {"messages": [user("a"), assistant("b")], "instruction": "a", "input": "", "output": "b"}
    assert DEMONSTRATIONS.read(Row("rows.jsonl:1", columns)).layout == "messages"


def test_an_answer_of_weight_0_is_no_demonstration(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows: list[Mapping[str, object]] = [
        {"conversations": [says("human", "a", weight=0), says("gpt", "b", weight=1)]},
        {"conversations": [says("human", "a"), says("gpt", "b", weight=0)]},
    ]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the last turn has the weight 0"):
        load_demonstrations(source, tokenizer, LIMITS)


def test_the_report_says_how_rows_were_read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows: list[Mapping[str, object]] = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": f"{HH}b", "rejected": f"{HH}c"},
    ]
    loaded = load_pairs(write_lines(tmp_path / "rows.jsonl", rows), tokenizer, LIMITS)
    assert "layout: texts (2 rows), transcripts (1 rows)" in loaded.report.summary()
    assert tokenizer.decode(loaded.items[0].chosen_ids) == " b</s>"
