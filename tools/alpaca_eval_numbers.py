"""Prints what the package alpaca-eval says of an annotations.json; run by its own environment, not by this project's.

Usage: python tools/alpaca_eval_numbers.py ANNOTATIONS [DF_GAMED]     (launchers/cross_check_alpaca_eval.sh)
"""

import json
import sys
from pathlib import Path

import pandas as pd
from alpaca_eval.metrics import glm_winrate, winrate


def main(annotations: str, gamed: str | None) -> None:
    """Plain numbers, and the length-controlled rate where a file of gamed baselines is given."""
    rows = pd.DataFrame(json.loads(Path(annotations).read_text()))
    numbers = dict(winrate.get_winrate(rows))
    if gamed is not None:
        # The package fetches this file from the hub.
        glm_winrate.hf_hub_download = lambda **wanted: gamed
        controlled = glm_winrate.get_length_controlled_winrate(rows, save_weights_dir=None)
        numbers["length_controlled_winrate"] = controlled["length_controlled_winrate"]
        numbers["lc_standard_error"] = float(rows["glm_preference"].sem() * 100)
    print(json.dumps({name: float(value) for name, value in numbers.items() if name != "mode"}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
