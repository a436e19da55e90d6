"""What rows hold reaches the model, or is refused by name: turns, tools, calls, reasoning, the date."""

import copy
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import pytest
from data.written_rows import assistant, user, write_lines
from transformers import PreTrainedTokenizerBase

from rto_megatron.data.limits import Limits
from rto_megatron.data.loader import load_demonstrations, load_judged, load_pairs, load_prompts
from rto_megatron.data.template import TemplateOptions
from rto_megatron.errors import DataError, TokenizerError

TURNS = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'tool'] %}<{{ m.role }}>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<assistant>"
)
END = "{{ eos_token }}{% endif %}{% endfor %}"
# Renders tools and calls, the reasoning of the last turn alone, and drops what it does not know.
REASONS = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}" + TURNS + "{% if loop.last and "
    "m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content if loop.last else (m.content or '').split('</think>')[-1] }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    + END + "{% if add_generation_prompt %}<assistant>{% endif %}"
)  # fmt: skip
# Its generation prompt opens a thought, and finished turns hold none.
OPENS = TURNS + "{{ m.content.split('</think>')[-1] }}" + END + (
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)  # fmt: skip
OPENS_AND_KEEPS = OPENS.replace("m.content.split('</think>')[-1]", "m.content")
DATED = "{{ strftime_now('%d %b %Y') }}{% if loud %}!{% endif %}" + TURNS + "{{ m.content }}" + END + (
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)  # fmt: skip
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "fox"}}}


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template or changed.chat_template
    return changed


def limits(**options: object) -> Limits:
    return Limits(300, 600, "error", template=TemplateOptions(**options))


def sft(
    row: Mapping[str, object], tokenizer: PreTrainedTokenizerBase, folder: Path, **options: object
) -> tuple[str, str, str]:
    """Prompt and answer as text, and the report."""
    source = write_lines(folder / "sft.jsonl", [row])
    loaded = load_demonstrations(source, tokenizer, limits(**options))
    (one,) = loaded.items
    return (
        str(tokenizer.decode(one.prompt_ids)),
        str(tokenizer.decode(one.response_ids)),
        loaded.report.summary(),
    )


@pytest.mark.parametrize("row", [{"messages": [user("a"), assistant("b")]}, {"prompt": "a", "response": "b"}])
def test_a_template_that_is_no_jinja_is_the_tokenizers_mistake(
    row: Mapping[str, object], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    broken = with_template(tokenizer, TURNS + "{{ m.content ")
    with pytest.raises(
        TokenizerError, match=r"the tokenizer's chat template is no Jinja template \(line 1: "
    ):
        sft(row, broken, tmp_path)


def turn(role: str, content: object = "the dog", **fields: object) -> dict[str, object]:
    return {"role": role, "content": content, **fields}


LOST = {
    "a role": (
        REASONS,
        {"messages": [turn("developer", "be short"), user("a"), assistant("b")]},
        r"message 0 \(developer\); it renders the roles system, user, assistant, tool",
    ),
    "another role": (REASONS, {"messages": [turn("human", "a"), assistant("b")]}, r"message 0 \(human\)"),
    "tools": (
        None,
        {"messages": [user("a"), assistant("b")], "tools": [TOOL]},
        "the tools; it reads no tools",
    ),
    "tools as text": (
        None,
        {"messages": [user("a"), assistant("b")], "tools": json.dumps([TOOL])},
        "leaves out the tools",
    ),
    "calls": (
        None,
        {"messages": [user("a"), turn("assistant", "b", tool_calls=[CALL])]},
        r"'tool_calls' of message 1 \(assistant\); of a turn it reads role, content",
    ),
    "calls beside null": (
        None,
        {"messages": [user("a"), turn("assistant", None, tool_calls=[CALL])]},
        r"refuses the roles \['user', 'assistant'\]",
    ),
    "reasoning": (
        None,
        {"messages": [user("a"), turn("assistant", "b", reasoning_content="because")]},
        r"'reasoning_content' of message 1 \(assistant\)",
    ),
    "a field of the trained turn": (
        None,
        {"messages": [user("a"), turn("assistant", "b", citation="page 3")]},
        r"'citation' of message 1 \(assistant\)",
    ),
    "an argument": (
        None,
        {"messages": [user("a"), assistant("b")], "chat_template_kwargs": {"enable_thinking": False}},
        "does not read enable_thinking",
    ),
    "two system texts": (
        None,
        {"system": "be kind", "messages": [turn("system", "be rude"), user("a"), assistant("b")]},
        "column 'system' is 'be kind', and the messages begin with the system turn 'be rude'",
    ),
}


@pytest.mark.parametrize(("template", "row", "words"), LOST.values(), ids=LOST.keys())
def test_what_the_template_drops_is_refused(
    template: str | None,
    row: dict[str, object],
    words: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match=words) as refused:
        sft(row, with_template(tokenizer, template), tmp_path)
    assert "sft.jsonl:1: " in str(refused.value)


def test_tools_calls_and_reasoning_reach_the_model(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """With text that a template of the publisher would give, written by hand."""
    row = {
        "tools": [TOOL],
        "messages": [
            user("a"),
            turn("assistant", None, tool_calls=[{**CALL, "function": {"name": "look", "arguments": '{"at": "fox"}'}}]),
            turn("tool", "a fox", tool_calls=None, name=None),
            turn("assistant", "b", reasoning_content="so"),
        ],
    }  # fmt: skip
    prompt, answer, _ = sft(row, with_template(tokenizer, REASONS), tmp_path)
    assert prompt.removeprefix("<s>") == (
        json.dumps(TOOL) + '<user>a<assistant>look{"at": "fox"}</s><tool>a fox<assistant>'
    )
    assert answer == "<think>so</think>b</s>"


def test_reasoning_of_earlier_turns_is_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    earlier = [user("a"), turn("assistant", "b", reasoning_content="so"), user("c"), assistant("d")]
    inside = [user("a"), assistant("<think>so</think>b"), user("c"), assistant("d")]
    for messages in (earlier, inside):
        prompt, answer, report = sft({"messages": messages}, with_template(tokenizer, REASONS), tmp_path)
        assert "so" not in prompt and answer == "d</s>"
        assert "1 earlier thoughts left out" in report


def test_reasoning_before_a_pair_is_counted_once(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    asked = [user("a"), assistant("<think>so</think>b"), user("c")]
    row = {"chosen": [*asked, assistant("d")], "rejected": [*asked, assistant("e")]}
    source = write_lines(tmp_path / "pairs.jsonl", [row])
    loaded = load_pairs(source, with_template(tokenizer, REASONS), limits())
    assert loaded.report.earlier_thoughts_left_out == 1


def test_an_opened_thought_is_never_opened_twice(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    opening = with_template(tokenizer, OPENS)
    row = {"messages": [user("a"), assistant("<think>\nso\n</think>\n\nb")]}
    for template in (with_template(tokenizer, OPENS_AND_KEEPS), opening):
        prompt, answer, _ = sft(row, template, tmp_path)
        assert prompt.endswith("<assistant><think>\n")
        assert answer == "so\n</think>\n\nb</s>"
    open_row = {"messages": [user("a"), assistant("b")]}
    with pytest.raises(
        DataError, match=r"opens a thought that the answer does not close.*data\.open_thought=keep"
    ):
        sft(open_row, opening, tmp_path)
    _, answer, report = sft(open_row, opening, tmp_path, open_thought="keep")
    assert answer == "b</s>" and "1 thoughts left open" in report


def test_a_system_column_is_the_system_turn(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    said = {"messages": [turn("system", "be kind"), user("a"), assistant("b")]}
    column = {"system": "be kind", "messages": [user("a"), assistant("b")]}
    assert sft(column, tokenizer, tmp_path) == sft(said, tokenizer, tmp_path)
    prompts = [
        load_prompts(write_lines(tmp_path / "p.jsonl", [row]), tokenizer, limits()).items[0].token_ids
        for row in ({"system": "be kind", "prompt": "a"}, {"prompt": [turn("system", "be kind"), user("a")]})
    ]
    assert prompts[0] == prompts[1]


def test_an_empty_system_turn_and_null_fields_are_no_mistake(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    row = {
        "system": None, "tools": None,
        "messages": [turn("system", ""), user("a"), turn("assistant", "b", tool_calls=None, reasoning_content=None)],
    }  # fmt: skip
    assert sft(row, with_template(tokenizer, REASONS), tmp_path)[1] == "b</s>"


def test_a_prompt_that_is_not_what_is_answered_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    pair = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    for prompt in ("the fox", [user("the fox")]):
        source = write_lines(tmp_path / "pairs.jsonl", [{"prompt": prompt, **pair}])
        with pytest.raises(
            DataError, match=r"pairs\.jsonl:1: column 'prompt' is .*the fox.*'chosen' answers"
        ):
            load_pairs(source, tokenizer, limits())
    for prompt in ("a", [user("a")]):
        source = write_lines(tmp_path / "pairs.jsonl", [{"prompt": prompt, **pair}])
        assert len(load_pairs(source, tokenizer, limits()).items) == 1


def test_earlier_turns_of_a_completion_belong_to_the_prompt(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    completion = [assistant("look"), turn("tool", "fox"), assistant("b")]
    rows = [
        {"prompt": "a", "completion": completion, "label": True},
        {"prompt": "else", "completion": "c", "label": False},
    ]
    source = write_lines(tmp_path / "kto.jsonl", rows)
    first = load_judged(source, with_template(tokenizer, REASONS), limits()).items[0]
    assert str(tokenizer.decode(first.prompt_ids)).removeprefix("<s>") == (
        "<user>a<assistant>look</s><tool>fox<assistant>"
    )
    assert str(tokenizer.decode(first.response_ids)) == "b</s>"
    rows[0]["completion"] = completion[:2]
    with pytest.raises(DataError, match=r"'completion' has the roles \['assistant', 'tool'\]"):
        load_judged(write_lines(tmp_path / "kto.jsonl", rows), tokenizer, limits())


def test_arguments_of_the_recipe_reach_the_template_and_others_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    dated = with_template(tokenizer, DATED)
    row = {"messages": [user("a"), assistant("b")]}
    moment = datetime(2025, 2, 3)
    assert "03 Feb 2025<user>" in sft(row, dated, tmp_path, moment=moment)[0]
    assert "03 Feb 2025!<user>" in sft(row, dated, tmp_path, moment=moment, arguments={"loud": True})[0]
    own = {**row, "chat_template_kwargs": {"loud": True}}
    assert "03 Feb 2025!<user>" in sft(own, dated, tmp_path, moment=moment)[0]
    with pytest.raises(DataError, match=r"data\.template: .* does not read quiet; it reads loud"):
        sft(row, dated, tmp_path, arguments={"quiet": True})


LONG = "the quick brown fox jumps over the lazy dog"
HIDDEN = {
    "a turn that the next one repeats": [
        turn("developer", LONG),
        user(f"{LONG}; the dog sleeps"),
        assistant("write a short answer"),
    ],
    "a turn that the one before repeats": [
        user(f"{LONG}; {LONG}"),
        turn("developer", LONG),
        user("naïve café"),
        assistant("write a short answer"),
    ],
    "a turn in the words of the template": [
        user(LONG),
        turn("developer", "<assistant><think>"),
        assistant(LONG),
    ],
    "a turn that the answer repeats": [
        user("write a short answer"),
        turn("developer", LONG),
        assistant(LONG),
    ],
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_long_turn_is_missed_though_its_text_stands_elsewhere(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    template = with_template(tokenizer, REASONS.replace("<think>", "<assistant><think>"))
    with pytest.raises(DataError, match=r"leaves out message \d \(developer\)"):
        sft({"messages": HIDDEN[name]}, template, tmp_path)
    kept = [message for message in HIDDEN[name] if message["role"] != "developer"]
    assert sft({"messages": kept}, template, tmp_path)[1].startswith(str(kept[-1]["content"]))
