"""The picture of responses whose tokens are coloured by what they earned, drawn from kept rollouts."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib import image

TOOL = Path(__file__).parents[2] / "tools/credit_picture.py"


def _kept(folder: Path) -> None:
    (folder / "rollouts").mkdir(parents=True)
    table = pa.table(
        {
            "prompt_id": ["p1", "p2"], "prompt": ["Write about $5", "Describe tea"],
            "pieces": [["red"] * 40, ["blue", "\n", "$x$"]], "score": [0.5, -0.5], "reward": [2.0, 1.0],
            "finish_reason": ["length", "length"], "source/rules": [0.25, 0.75],
            "token/dpo_logratio": [[-3.0] * 40, [3.0, 0.0, 3.0]],
        }
    )  # fmt: skip
    pq.write_table(table, folder / "rollouts" / "step_00000001_replica_00000.parquet")


def test_tokens_below_zero_are_red_and_above_blue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _kept(tmp_path)

    def painted(*more: str) -> tuple[int, int]:
        """Pixels of the responses, not of the bar beside them, that are clearly red and clearly blue."""
        out = tmp_path / "credit.png"
        monkeypatch.setattr(sys, "argv", [str(TOOL), str(tmp_path), "--out", str(out), *more])
        runpy.run_path(str(TOOL), run_name="__main__")
        pixels = image.imread(out)
        pixels = pixels[:, : int(pixels.shape[1] * 0.88)]
        red, blue = pixels[..., 0], pixels[..., 2]
        return int((red > blue + 0.2).sum()), int((blue > red + 0.2).sum())

    red, blue = painted()
    assert red > 5 * blue > 0
    red, blue = painted("--prompt", "p2")
    assert red == 0 < blue


def test_what_the_program_saw_is_marked_below_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _kept(tmp_path)
    rules = [{"kind": "with", "word": "blue"}, {"kind": "words", "least": 0, "most": 1}]
    lines = [json.dumps({"prompt_id": name, "rules": rules}) for name in ("p1", "p2")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    out = tmp_path / "credit.png"

    def greens_and_blacks(*more: str) -> tuple[int, int]:
        """Longest runs of such pixels in a line of the picture."""
        arguments = [str(TOOL), str(tmp_path), "--prompt", "p2", "--out", str(out), *more]
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(TOOL), run_name="__main__")
        pixels = image.imread(out)[..., :3]
        pixels = pixels[:, : int(pixels.shape[1] * 0.88)]
        green = (pixels[..., 1] > 0.4) & (pixels[..., [0, 2]] < 0.1).all(-1)
        return longest(green), longest((pixels < 0.1).all(-1))

    def longest(marked: np.ndarray) -> int:
        return max(
            len(run) for row in marked for run in "".join("x" if one else " " for one in row).split(" ")
        )

    plain_green, plain_black = greens_and_blacks()
    green, black = greens_and_blacks("--rules", str(tmp_path / "prompts.jsonl"))
    assert plain_green == 0 and green > 20  # below "blue", which the prompt asked for
    assert plain_black < 12 and black > 20  # below "$x$", the second word
