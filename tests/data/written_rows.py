"""Small data files of these tests."""

import json
from collections.abc import Sequence
from pathlib import Path

from rto_megatron.data.limits import Limits

LIMITS = Limits(max_prompt_tokens=200, max_length=400, overlong="error")
EOS = 2


def user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, object]:
    return {"role": "assistant", "content": text}


def turns(prompt: str, answer: str) -> list[dict[str, object]]:
    return [user(prompt), assistant(answer)]


def demonstration(answer: str, prompt: str = "the fox") -> dict[str, object]:
    return {"messages": turns(prompt, answer)}


def pair(**columns: object) -> dict[str, object]:
    return {"chosen": turns("the fox", "the dog"), "rejected": turns("the fox", "a dog"), **columns}


def pair_row(prompt: str = "the fox", chosen: str = "the dog", rejected: str = "a dog") -> dict[str, object]:
    return {
        "prompt": prompt,
        "prompt_id": f"id of {prompt}",
        "chosen": turns(prompt, chosen),
        "rejected": turns(prompt, rejected),
    }


def write_lines(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
