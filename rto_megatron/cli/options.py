"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE", help="YAML file of the stage; see launchers/recipes.", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Dotted keys that replace the recipe's, as in optimizer.lr=1e-6 run.dir=runs/mine.",
        show_default=False,
    ),
]
