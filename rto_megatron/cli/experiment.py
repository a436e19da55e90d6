"""`rto sample-efficiency` and `rto language`: the experiments, in pieces that can be stopped and run side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rto_megatron.config.overrides import as_override
from rto_megatron.config.training import ParallelConfig
from rto_megatron.errors import RecipeError

if TYPE_CHECKING:
    from rto_megatron.experiments.design import Experiment
    from rto_megatron.experiments.lanes import MakeModels
    from rto_megatron.generation.vllm.start.server import ServerOptions

_Root = Annotated[Path, typer.Argument(help="Folder of the experiment; finished runs in it stay.")]
_Phase = Annotated[
    Literal["tune", "compare", "report"],
    typer.Option(help="Learning rates of PPO and RTO; then all arms; then the table and plots."),
]
_Seeds = Annotated[
    str | None, typer.Option(help="Only these of the design's seeds, as in 0,2; for several processes.")
]
_NumSeeds = Annotated[int | None, typer.Option(min=1, help="The design's first seeds; default: all.")]
_Factor = Annotated[
    float | None,
    typer.Option(
        help="One of the design's factors of the learning rate, chosen before: none other is tried."
    ),
]
_Set = Annotated[list[str] | None, typer.Option("--set", help="key=value for every training stage.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command()(sample_efficiency)
    app.command()(language)


def sample_efficiency(
    root: _Root,
    phase: _Phase,
    seeds: _Seeds = None,
    num_seeds: _NumSeeds = None,
    factor: _Factor = None,
    overrides: _Set = None,
) -> None:
    """Compare how many episodes PPO, RTO and RTO's ablations need on the synthetic task with long responses."""
    from rto_megatron.data.synthetic import write_models_alone
    from rto_megatron.experiments.sample_efficiency import EXPERIMENT
    from rto_megatron.experiments.sample_efficiency.seed_models import HIDDEN_SIZE, make_models
    from rto_megatron.generation.vllm.start.server import ServerOptions

    def pool(lane: Path) -> ServerOptions:
        model = write_models_alone(lane / "task", HIDDEN_SIZE)
        return ServerOptions(model, lane / "token", lane / "server.log", dtype="fp32", max_model_len=128)

    chosen = _Chosen(root, phase, seeds, num_seeds, factor, overrides)
    _experiment(EXPERIMENT, make_models, pool, chosen)


def language(
    root: _Root,
    phase: _Phase,
    model: Annotated[
        Path, typer.Option(help="Chat model to start from: a Hugging Face folder.", show_default=True)
    ] = Path("runs/smollm2"),
    seeds: _Seeds = None,
    num_seeds: _NumSeeds = None,
    factor: _Factor = None,
    overrides: _Set = None,
) -> None:
    """Compare PPO, RTO, a control and an oracle on a real language model, whose true reward is a program."""
    from rto_megatron.experiments.language.language_arms import EXPERIMENT, make_models
    from rto_megatron.generation.vllm.start.server import ServerOptions

    if phase != "report" and not (model / "config.json").is_file():
        raise RecipeError(
            f"--model {model}: holds no config.json; make it by bash launchers/real_model.sh {model}, or name a "
            "Hugging Face folder"
        )
    model = model.absolute()

    def pool(lane: Path) -> ServerOptions:
        return ServerOptions(model, lane / "token", lane / "server.log", max_model_len=256)

    chosen = _Chosen(root, phase, seeds, num_seeds, factor, overrides, (as_override("vars.model", model),))
    _experiment(EXPERIMENT, make_models, pool, chosen)


@dataclass(frozen=True)
class _Chosen:
    """What the command line says."""

    root: Path
    phase: str
    seeds: str | None
    num_seeds: int | None
    factor: float | None
    overrides: list[str] | None
    variables: tuple[str, ...] = ()


def _experiment(
    experiment: "Experiment",
    make_models: "MakeModels",
    pool: "Callable[[Path], ServerOptions]",
    chosen: _Chosen,
) -> None:
    """One phase, in this process with a server of its own; `pool` says how that starts, in the lane's folder."""
    from rto_megatron.experiments.lanes import Lane

    experiment = _smaller(experiment, chosen)
    seeds = _chosen_seeds(chosen.seeds, experiment.design.seeds)
    root = chosen.root.absolute()
    if chosen.phase == "report":
        from rto_megatron.experiments.page import write_report

        typer.echo(write_report(experiment, root))
        return
    from rto_megatron.generation.vllm.start.server import start_server, stop_server, wait_until_ready
    from rto_megatron.platform.device import prepare
    from rto_megatron.trainer.stages import ranks

    options = pool(root / "lanes" / "-".join(str(seed) for seed in seeds))
    server = start_server(options)
    try:
        wait_until_ready(server, progress=typer.echo)
        with ranks(prepare(), ParallelConfig(), seed=0) as topology:
            lane = Lane(
                experiment, make_models, root, topology, server.address, options.token_file,
                chosen.variables, tuple(chosen.overrides or ()),
            )  # fmt: skip
            (lane.tune if chosen.phase == "tune" else lane.compare)(seeds)
    finally:
        stop_server(server)


def _smaller(experiment: "Experiment", chosen: _Chosen) -> "Experiment":
    """The experiment on the first of its seeds, at a learning rate that was chosen before, where that is asked for."""
    from rto_megatron.experiments.design import on_first_seeds, tuned_before

    seeds, factors = experiment.design.seeds, experiment.design.factors
    if chosen.num_seeds is not None:
        if chosen.num_seeds > len(seeds):
            raise RecipeError(f"--num-seeds {chosen.num_seeds}: the design has {len(seeds)} seeds")
        experiment = on_first_seeds(experiment, chosen.num_seeds)
    if chosen.factor is not None:
        known = {f"{factor:.2g}": factor for factor in factors}  # a third is written as 0.33
        factor = known.get(f"{chosen.factor:.2g}")
        if factor is None:
            raise RecipeError(f"--factor {chosen.factor:g}: the design has the factors {', '.join(known)}")
        experiment = tuned_before(experiment, factor)
    return experiment


def _chosen_seeds(seeds: str | None, known: Sequence[int]) -> Sequence[int]:
    if seeds is None:
        return known
    by_name = {str(seed): seed for seed in known}
    names = seeds.split(",")
    if not set(names) <= set(by_name):
        raise RecipeError(f"--seeds {seeds}: the design has the seeds {','.join(by_name)}")
    return tuple(by_name[name] for name in names)
