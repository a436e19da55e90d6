"""Writes made-up judgments of 805 instructions, with both files of AlpacaEval's length control, to try scoring on.

Usage: python tools/make_judgments.py FOLDER
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np

NUM_INSTRUCTIONS = 805


def main(folder: Path) -> None:
    """annotations.json, reference.json and df_gamed.csv; the same ones every time."""
    chance = np.random.default_rng(7)
    difficulty = np.concatenate([[0.0], chance.normal(0.4, 0.8, NUM_INSTRUCTIONS - 1)])
    lengths = chance.integers(200, 3000, size=(NUM_INSTRUCTIONS, 2))
    gap = (lengths[:, 0] - lengths[:, 1]) / (lengths[:, 0] - lengths[:, 1]).std(ddof=1)
    chances = 1 / (1 + np.exp(-(0.7 * difficulty - 0.5 - 0.9 * np.tanh(gap))))
    preferences = 1 + np.round(chance.beta(4 * chances, 4 * (1 - chances)), 6)
    preferences[::100] = 1.5
    rows = [
        {
            "instruction": f"Instruction {place}.", "output_1": "b" * int(lengths[place, 0]),
            "generator_1": "gpt4_1106_preview",
            "output_2": "m" * int(lengths[place, 1]), "generator_2": "ours", "annotator": "made_up",
            "preference": float(preferences[place]),
        }
        for place in range(NUM_INSTRUCTIONS)
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "annotations.json").write_text(json.dumps(rows))
    (folder / "reference.json").write_text(json.dumps([{"instruction": row["instruction"]} for row in rows]))
    with (folder / "df_gamed.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["index", "model", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline"]
        )
        for model, sign in (("gpt4_1106_preview_concise", 1), ("gpt4_1106_preview_verbose", -1)):
            for place in range(NUM_INSTRUCTIONS):
                length = sign * abs(chance.normal(1.0, 0.4))
                won = 1 / (1 + np.exp(0.9 * np.tanh(length) + chance.normal(0, 0.5)))
                writer.writerow([place, model, won, length, difficulty[place], False])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
