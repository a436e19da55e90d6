"""What a judge is asked: templates of messages, the embedded ones and files in the benchmarks' own formats.

A file is YAML with `system` and `user`, or as Arena-Hard's judge_config.yaml with `system_prompt` and
`prompt_template`; or a text of ChatML messages, as AlpacaEval's alpaca_eval_clf.txt. Where question and answers go is
said in any of their ways.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import yaml

from rto_megatron.benchmarks.questions import Benchmark
from rto_megatron.errors import RecipeError, refuse_if

type ChatMessage = dict[str, str]

_OWN: dict[Benchmark, str] = {
    "alpaca_eval": "alpaca_eval.yaml",
    "arena_hard_v0.1": "arena_hard.yaml",
    "arena_hard_v2.0": "arena_hard.yaml",
}
_PLACES = {
    "question": ("question", "question_1", "QUESTION", "instruction"),
    "answer_a": ("answer_a", "answer_1", "ANSWER_A", "output_1"),
    "answer_b": ("answer_b", "answer_2", "ANSWER_B", "output_2"),
}
_NAMES = {written: place for place, names in _PLACES.items() for written in names}
_HOLE = re.compile("{(" + "|".join(_NAMES) + ")}")
_CHATML = re.compile(r"<\|im_start\|>(\w+)[^\n]*\n(.*?)<\|im_end\|>", re.DOTALL)
_FOLLOW_UP = "Go on, and end with your verdict in the form that was asked for."


@dataclass(frozen=True)
class JudgeTemplate:
    """Messages with holes for a question and two answers.

    Example:
        JudgeTemplate("mine.yaml", (("user", "{question} {answer_a} {answer_b}"),), "Go on.").fill("2 + 2?", "4", "5")
    """

    source: str  # for the record of who judged by what
    messages: tuple[tuple[str, str], ...]  # role and text
    follow_up: str  # said to a judge that ended without a verdict

    def fill(self, question: str, first: str, second: str) -> list[ChatMessage]:
        """The messages for one comparison; braces inside of answers stay as they are."""
        values = {"question": question, "answer_a": first, "answer_b": second}
        return [
            {"role": role, "content": _HOLE.sub(lambda hole: values[_NAMES[hole[1]]], text)}
            for role, text in self.messages
        ]


def own_template(benchmark: Benchmark) -> JudgeTemplate:
    """The embedded one."""
    return read_template(Path(__file__).parent / "templates" / _OWN[benchmark], "rto-megatron's own")


def read_template(path: Path, name: str | None = None) -> JudgeTemplate:
    """Reads a file.

    Args:
        name: for the record; None: the file's, with a hash of what it says.

    Raises:
        RecipeError: it is in none of the formats, or has no place for the question or for one of the answers.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--template {path} cannot be read ({error})") from error
    if path.suffix in (".yaml", ".yml"):
        messages, follow_up = _of_yaml(path, text)
    else:
        messages, follow_up = tuple((role, body.strip()) for role, body in _CHATML.findall(text)), _FOLLOW_UP
        if not messages:
            raise RecipeError(
                f"--template {path}: no message between <|im_start|> and <|im_end|>, and no .yaml file"
            )
    said = "\n".join(body for _, body in messages)
    held = {_NAMES[hole] for hole in _HOLE.findall(said)}
    problems = [
        f"it has no {{{place}}}, in any of the ways {', '.join(names)}"
        for place, names in _PLACES.items()
        if place not in held
    ]
    refuse_if(problems, f"--template {path} cannot be filled", RecipeError)
    return JudgeTemplate(name or f"{path.name} {sha256(text.encode()).hexdigest()[:12]}", messages, follow_up)


def _of_yaml(path: Path, text: str) -> tuple[tuple[tuple[str, str], ...], str]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--template {path} is no YAML ({error})") from error
    if not isinstance(values, Mapping):
        raise RecipeError(f"--template {path}: expected the keys system and user")
    system = values.get("system", values.get("system_prompt"))
    user = values.get("user", values.get("prompt_template"))
    # Arena-Hard v0.1 has a list, of one prompt for each turn of a question.
    user = user[0] if isinstance(user, list) and len(user) == 1 else user
    if not isinstance(user, str) or not isinstance(system, str | None):
        raise RecipeError(
            f"--template {path}: expected text in user (or prompt_template) and system (or system_prompt)"
        )
    messages = (("system", system), ("user", user)) if system else (("user", user),)
    return messages, str(values.get("follow_up", _FOLLOW_UP))
