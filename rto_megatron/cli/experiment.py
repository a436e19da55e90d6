"""`rto sample-efficiency`: the experiment, in pieces that can be stopped and run side by side."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from rto_megatron.config.training import ParallelConfig
from rto_megatron.errors import RecipeError
from rto_megatron.experiments.sample_efficiency import DESIGN


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(sample_efficiency)


def sample_efficiency(
    root: Annotated[Path, typer.Argument(help="Folder of the experiment; finished runs in it stay.")],
    phase: Annotated[
        Literal["tune", "compare", "report"],
        typer.Option(help="Learning rates of PPO and RTO; then all arms; then the table and plots."),
    ],
    seeds: Annotated[
        str | None, typer.Option(help="Only these of the design's seeds, as in 0,2; for several processes.")
    ] = None,
    num_seeds: Annotated[
        int, typer.Option(min=1, max=len(DESIGN.seeds), help="The design's first seeds.")
    ] = len(DESIGN.seeds),
    recipes: Annotated[Path, typer.Option(help="Recipes of the stages.")] = Path(
        "launchers/recipes/sample_efficiency"
    ),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value for every training stage.")
    ] = None,
) -> None:
    """Compare how many episodes PPO, RTO and RTO's ablations need on the synthetic task with long responses."""
    from rto_megatron.experiments.sample_efficiency.lanes import HIDDEN_SIZE, Lane, smaller

    design = smaller(DESIGN, num_seeds)
    chosen = _chosen(seeds, design.seeds)
    root = root.absolute()
    if phase == "report":
        from rto_megatron.experiments.sample_efficiency.page import write_report

        typer.echo(write_report(root, design))
        return
    from rto_megatron.data.synthetic import write_models_alone
    from rto_megatron.generation.vllm.start.server import (
        ServerOptions,
        start_server,
        stop_server,
        wait_until_ready,
    )
    from rto_megatron.platform.device import prepare
    from rto_megatron.trainer.stages import ranks

    lane = root / "lanes" / "-".join(str(seed) for seed in chosen)
    options = ServerOptions(
        model=write_models_alone(lane / "task", HIDDEN_SIZE),
        token_file=lane / "token",
        log_file=lane / "server.log",
        dtype="fp32",
        max_model_len=128,
    )
    server = start_server(options)
    try:
        wait_until_ready(server, progress=typer.echo)
        with ranks(prepare(), ParallelConfig(), seed=0) as topology:
            runner = Lane(root, recipes, topology, server.address, options.token_file, tuple(overrides or ()))
            (runner.tune if phase == "tune" else runner.compare)(design, chosen)
    finally:
        stop_server(server)


def _chosen(seeds: str | None, known: tuple[int, ...]) -> tuple[int, ...]:
    if seeds is None:
        return known
    by_name = {str(seed): seed for seed in known}
    names = seeds.split(",")
    if not set(names) <= set(by_name):
        raise RecipeError(f"--seeds {seeds}: the design has the seeds {','.join(by_name)}")
    return tuple(by_name[name] for name in names)
