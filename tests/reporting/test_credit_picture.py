"""The picture of responses whose tokens are coloured by what they earned, drawn from kept rollouts."""

import runpy
import sys
from pathlib import Path

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
            "source/rules": [0.25, 0.75], "token/dpo_logratio": [[-3.0] * 40, [3.0, 0.0, 3.0]],
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
