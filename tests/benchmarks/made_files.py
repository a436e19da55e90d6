"""Small files in the layouts of AlpacaEval and Arena-Hard."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from typer.testing import CliRunner

from rto_megatron.cli.main import app

INSTRUCTIONS = [f"Say {word}." for word in ("one", "two", "three", "four", "five", "six")]
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "eval.json").read_text())


def rto(*arguments: object) -> str:
    """Runs a command in this process and returns what it printed; its errors come as they are."""
    done = CliRunner().invoke(
        app, [str(one) for one in arguments], catch_exceptions=False, env={"COLUMNS": "200"}
    )
    assert done.exit_code == 0, done.output
    return done.output


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def alpaca_outputs(path: Path, generator: str, instructions: Sequence[str] = INSTRUCTIONS) -> Path:
    """Each output names its generator and instruction."""
    rows = [
        {"instruction": one, "output": f"{generator} on {one}", "generator": generator}
        for one in instructions
    ]
    return write_json(path, rows)


def arena_questions(path: Path, version: str, count: int = 3) -> Path:
    if version == "v0.1":
        rows = [
            {"question_id": f"q{n}", "category": "arena-hard-v0.1", "turns": [{"content": f"Ask {n}?"}]}
            for n in range(count)
        ]
    else:
        rows = [
            {"uid": f"q{n}", "category": ("hard_prompt", "creative_writing")[n % 2], "prompt": f"Ask {n}?"}
            for n in range(count)
        ]
    return write_lines(path, rows)


def arena_answers(path: Path, model: str, version: str, count: int = 3) -> Path:
    if version == "v0.1":
        rows: list[dict[str, object]] = [
            {
                "question_id": f"q{n}",
                "model_id": model,
                "choices": [{"index": 0, "turns": [{"content": f"{model} {n}"}]}],
            }
            for n in range(count)
        ]
    else:
        rows = [
            {
                "uid": f"q{n}",
                "model": model,
                "messages": [
                    {"role": "user", "content": f"Ask {n}?"},
                    {"role": "assistant", "content": {"answer": f"{model} {n}"}},
                ],
            }
            for n in range(count)
        ]
    return write_lines(path, rows)


def arena(tmp_path: Path, version: str, count: int = 3) -> list[object]:
    """The command that judges `ours` against `base`, but for its endpoint; the files are made."""
    questions = arena_questions(tmp_path / "question.jsonl", version, count)
    ours = arena_answers(tmp_path / "model_answer/ours.jsonl", "ours", version, count)
    base = arena_answers(tmp_path / "model_answer/base.jsonl", "base", version, count)
    return [
        "judge",
        ours,
        "--baseline",
        base,
        "--questions",
        questions,
        "--judge",
        "org/gpt",
        "--out",
        tmp_path / "out",
    ]
