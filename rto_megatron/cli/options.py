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
Interface = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="Network interface on which to listen, as in ib0; see `ip -br address`."
    ),
]
Assume = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ROLE=SHAPE",
        help="Shape of a model that is not here, as in policy=llama-3-8b; else its name is believed.",
    ),
]
GpuKind = Annotated[
    str | None,
    typer.Option(
        help="The GPU whose memory is judged, as in h100, or by GiB:TFLOP/s:GB/s, as in 96:148:4000."
    ),
]
