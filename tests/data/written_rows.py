"""Small data files of these tests."""

import json
from collections.abc import Sequence
from pathlib import Path


def turns(prompt: str, answer: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def demonstration(answer: str, prompt: str = "the fox") -> dict[str, object]:
    return {"messages": turns(prompt, answer)}


def pair(**columns: object) -> dict[str, object]:
    return {"chosen": turns("the fox", "the dog"), "rejected": turns("the fox", "a dog"), **columns}


def write_lines(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
