"""What a model folder may not bring along: code, and a path that vLLM reads as a pattern."""

import glob
import json
from pathlib import Path

_WITH_CODE = ("config.json", "tokenizer_config.json")


def code_problems(folder: Path) -> list[str]:
    """The files of a Hugging Face folder that name code to be run on loading, one sentence each."""
    return [
        f"{folder / name} names code that comes with the model (auto_map), which is never run here: remove the key "
        "from a copy, or `rto convert` the model, which leaves it out"
        for name in _WITH_CODE
        if (folder / name).is_file() and _has_auto_map((folder / name).read_bytes())
    ]


def pattern_problems(folder: Path) -> list[str]:
    """Why vLLM would find no weights in a folder, one sentence or none: it looks for them with a glob pattern."""
    if not glob.has_magic(str(folder)):
        return []
    return [
        f"vLLM reads [, * and ? in {folder} as a pattern and finds no weights there: name a link to the folder whose "
        "path has none of them (ln -s), or leave --load-weights out, as a trainer pushes its weights"
    ]


def _has_auto_map(content: bytes) -> bool:
    try:
        values = json.loads(content)
    except ValueError:  # whoever reads the file says so
        return False
    return isinstance(values, dict) and "auto_map" in values
