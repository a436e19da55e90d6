#!/usr/bin/env python
"""One step of every method at every layout against the same step on one rank, on this machine's CPU.

Usage: .venv/bin/python tools/layout_matrix.py [--methods rto dpo] [--layouts tp2 own_critic] [--scratch FOLDER]

Each method is its quickstart recipe with random models, plain gradient steps and responses from a script, which are the
same at every layout; on the one rank every response is computed with a prompt of its own, elsewhere a prompt once where
that can be done. A layout is one world of forked ranks, which trains all methods; a role of its own layout that a
method has not is left out, and a layout that is refused for a method is said. A cell is how far the worst tensor of
policy and critic is from where one rank takes it, over what the step changed in it; what moved too little to compare is
marked. The last table names those tensors. Ends with 1 if any is further away than --tolerance.
"""

import argparse
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rto_megatron.platform.device import prepare

prepare()  # before anything of Megatron is imported

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

from rto_megatron.algorithms import ALGORITHMS  # noqa: E402
from rto_megatron.algorithms.method import OnlineMethod  # noqa: E402
from rto_megatron.config.checks import find_problems  # noqa: E402
from rto_megatron.config.facts import facts_of  # noqa: E402
from rto_megatron.config.load import load_recipe  # noqa: E402
from rto_megatron.config.plan import fewest_ranks  # noqa: E402
from rto_megatron.config.roles import roles_of  # noqa: E402
from rto_megatron.config.schema import TrainStage  # noqa: E402
from rto_megatron.config.training import RoleGridConfig  # noqa: E402
from rto_megatron.data.synthetic import write_synthetic_task  # noqa: E402
from rto_megatron.parallel.topology import Topology  # noqa: E402
from rto_megatron.proofs.step_parity import WorstTensor, train_and_export, worst_tensors  # noqa: E402

RECIPES = Path(__file__).parents[1] / "launchers" / "recipes" / "quickstart"
# Folders of the quickstart -> seed of the model that stands there, and whether it has a scalar head.
MODELS = {"sft": (1, False), "dpo": (2, False), "reward_model": (3, True)}
# Gradients differ in size by method, and a tensor that hardly moves shows nothing but the rounding of its weights.
LR = {"reward_model": 20.0, "dpo": 10.0, "rdpo": 10.0, "tdpo": 10.0, "simpo": 2.0, "kto": 20.0}
OTHER_LR, CRITIC_LR = 1.0, 0.25
type Cell = dict[str, WorstTensor]  # by model; empty where the run failed

NUM_ROWS = 64  # of each data file; a step reads 16
LEAST_MOVE = 1e-3  # of a tensor's norm: what fp32 rounds off the weights is 1e-5 of less


@dataclass(frozen=True)
class Column:
    """A layout of the matrix."""

    tensor: int = 1
    pipeline: int = 1
    replicas: int = 1
    sequence: bool = False
    roles: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    keys: tuple[str, ...] = ()  # further overrides


TOKENS, INTERLEAVED = "batch.tokens=96", ("parallel.virtual=2",)
ALONE = Column(keys=("batch.share_prompts=false",))  # what the others are held against
COLUMNS = {
    "one": Column(),
    "tp2": Column(tensor=2),
    "tp2_sp": Column(tensor=2, sequence=True),
    "pp2": Column(pipeline=2),
    "dp2": Column(replicas=2),
    "dp2_overlap": Column(replicas=2, keys=("parallel.overlap_grad_reduce=true",)),
    "tp2_pp2": Column(tensor=2, pipeline=2),
    "tp2_dp2": Column(tensor=2, replicas=2),
    "pp2_v2": Column(pipeline=2, keys=INTERLEAVED),
    "pp2_v2_tokens": Column(pipeline=2, keys=(*INTERLEAVED, TOKENS)),
    "tp2_pp2_v2_sp": Column(tensor=2, pipeline=2, sequence=True, keys=INTERLEAVED),
    "cp2_pp2_v2": Column(pipeline=2, keys=(*INTERLEAVED, "parallel.context=2")),
    "pp2_v2_dp2": Column(pipeline=2, replicas=2, keys=(*INTERLEAVED, "parallel.overlap_grad_reduce=true")),
    "cp2_gather": Column(keys=("parallel.context=2", "parallel.context_scheme=gather")),
    "pp2_uneven": Column(pipeline=2, keys=("parallel.stages=[3,1]",)),
    "tokens": Column(replicas=2, keys=(TOKENS,)),
    "critic_dp": Column(tensor=2, roles={"critic": {}, "reward": {}}),
    "frozen_tp": Column(roles={"reference": {"tensor": 2}, "dpo": {"pipeline": 2}}),
    "own_critic": Column(tensor=2, roles={"critic": {"ranks": "2-3"}, "reward": {"ranks": "2-3"}}),
    "own_frozen": Column(
        replicas=2, roles={"reference": {"ranks": "2"}, "reward": {"ranks": "2"}, "dpo": {"ranks": "2"}}
    ),
}


def write_inputs(root: Path) -> None:
    """Data, tokenizer and random models where the quickstart's recipes look for them."""
    write_synthetic_task(root / "task", seed=1, hidden_size=64)
    for data in (root / "task").glob("*.jsonl"):
        data.write_text("".join(data.read_text().splitlines(keepends=True)[:NUM_ROWS]))
    blank = root / "task" / "models" / "deep"
    for name, (seed, is_scalar) in MODELS.items():
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(blank, num_labels=1, initializer_range=0.08)
        model = (
            AutoModelForSequenceClassification.from_config(config)
            if is_scalar
            else AutoModelForCausalLM.from_config(config)
        ).float()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "norm" in parameter_name:  # one that is 1 everywhere could be left out unseen
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(root / name)
        for file in blank.iterdir():
            if not (root / name / file.name).exists():
                (root / name / file.name).write_bytes(file.read_bytes())


def configured(method: str, column: Column, root: Path, run_dir: Path) -> TrainStage:
    """The quickstart's recipe of a method, as one step at a layout."""
    lr = LR.get(method, OTHER_LR)
    keys = {"vars.root": root, "run.dir": run_dir, "run.steps": 1, "batch.train": 16, "batch.micro": 4}
    sections = {"optimizer": lr}
    algorithm = ALGORITHMS[method]
    if isinstance(algorithm, OnlineMethod):
        is_grouped = algorithm.config().samples_per_prompt > 1
        keys |= {"batch.rollout": 4 if is_grouped else 16, "sampling.max_response_tokens": 12}
        keys |= {"run.samples_every": "null", "rollout.logprob_gap_alarm": "null"}
        if is_grouped:  # two updates, so that ratios leave 1
            keys |= {"algorithm.samples_per_prompt": 4, "batch.train": 8}
        if algorithm.has_critic:
            sections["critic_optimizer"] = CRITIC_LR
    else:
        keys |= {"data.eval_samples": 8}
    if method == "sft":
        keys |= {"models.policy": root / "sft", "models.random_init": "false"}
    for section, rate in sections.items():
        keys |= {f"{section}.kind": "sgd", f"{section}.lr": rate, f"{section}.max_grad_norm": "null"}
        keys |= {f"{section}.warmup_fraction": 0}
    if TOKENS in column.keys:
        del keys["batch.micro"]
    given = [f"{key}={value}" for key, value in keys.items()]
    recipe = RECIPES / f"{method}.yaml"
    shape = [f"parallel.tensor={column.tensor}", f"parallel.pipeline={column.pipeline}"]
    shape.append(f"parallel.sequence={str(column.sequence).lower()}")
    config = load_recipe(recipe, [*given, *shape, *column.keys])
    training = facts_of(config).training
    assert training is not None
    has = {role.name for role in roles_of(training) if role.shares is None}
    roles = {name: RoleGridConfig.model_validate(grid) for name, grid in column.roles.items() if name in has}
    parallel = training.parallel.model_copy(update={"roles": roles})
    models = training.models
    if models.dpo is not None:
        models = models.model_copy(update={"allow_unverified_reference": True})
    return training.model_copy(update={"parallel": parallel, "models": models})


def train_rank(configs: Sequence[TrainStage]) -> None:
    """All methods of a layout, as one of its ranks."""
    device = prepare()
    for config in configs:
        place = Topology.init(device, config.parallel, config.run.seed)
        train_and_export(config, place)


def run_world(num_ranks: int, configs: Sequence[TrainStage], log: Path) -> bool:
    """Forks the ranks of a layout; whether all of them came to the end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    sys.stdout.flush()
    running = {_fork(rank, num_ranks, port, configs, log) for rank in range(num_ranks)}
    is_whole = True
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status and is_whole:
            is_whole = False
            for other in running:
                os.kill(other, signal.SIGKILL)  # they would wait for the one that is gone
    return is_whole


def _fork(rank: int, num_ranks: int, port: int, configs: Sequence[TrainStage], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    place = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ.update({key: str(value) for key, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 1
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            train_rank(configs)
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def is_tried(config: TrainStage, column: Column, say: Console) -> bool:
    """Not where the method has none of the roles, and so is where it was, or the layout is refused for it."""
    if column.roles and not config.parallel.roles:
        return False
    problems = find_problems(config, fewest_ranks(config.parallel, column.replicas), {})
    for problem in problems:
        say.print(f"refused for {config.stage}: {problem}", markup=False, highlight=False)
    return not problems


def matrix(
    methods: Sequence[str], layouts: Sequence[str], root: Path, say: Console
) -> dict[tuple[str, str], Cell]:
    """Method and layout -> what came of it; a world that failed has no cells."""
    say.print(f"one rank: {len(methods)} methods")
    alone = {method: configured(method, ALONE, root, root / "alone" / method) for method in methods}
    if not run_world(1, list(alone.values()), root / "alone.log"):
        sys.exit(f"the runs on one rank failed: {root / 'alone.log'}")
    cells: dict[tuple[str, str], Cell] = {}
    for layout in layouts:
        column, start = COLUMNS[layout], time.monotonic()
        configs = {one: configured(one, column, root, root / layout / one) for one in methods}
        configs = {one: config for one, config in configs.items() if is_tried(config, column, say)}
        num_ranks = max((fewest_ranks(one.parallel, column.replicas) for one in configs.values()), default=0)
        by_size: dict[int, list[TrainStage]] = {}
        for config in configs.values():
            by_size.setdefault(fewest_ranks(config.parallel, column.replicas), []).append(config)
        log = root / f"{layout}.log"
        is_whole = all(run_world(size, some, log) for size, some in by_size.items())
        say.print(f"{layout}: {len(configs)} methods on {num_ranks} ranks, {time.monotonic() - start:.0f} s")
        if not is_whole:
            say.print(f"[red]{layout} failed: {log}")
        for method, config in configs.items():
            one, other = alone[method].run.dir, config.run.dir
            is_there = (other / "hf").is_dir()
            cells[method, layout] = (
                worst_tensors({"policy": root / "sft", "critic": root / "reward_model"}, one, other)
                if is_there
                else {}
            )
    return cells


def tables(
    cells: Mapping[tuple[str, str], Cell], methods: Sequence[str], layouts: Sequence[str], tolerance: float
) -> tuple[list[Table], int]:
    """What is printed, and how many cells missed."""
    grid = Table("method", *layouts, title="worst tensor of policy / critic, over its change")
    worst = Table(
        "model", "layout", "method", "tensor", "apart", "least move", title="the furthest of each layout"
    )
    missed = 0
    for method in methods:
        row = []
        for layout in layouts:
            cell = cells.get((method, layout))
            if cell is None:
                row.append("")
                continue
            is_missed = not cell or any(one.apart > tolerance for one in cell.values())
            missed += is_missed
            text = " / ".join(_shown(one) for one in cell.values()) or "failed"
            row.append(f"[red]{text}[/red]" if is_missed else text)
        grid.add_row(method, *row)
    for layout in layouts:
        for role in ("policy", "critic"):
            of_role = {
                m: cell[role] for (m, where), cell in cells.items() if where == layout and role in cell
            }
            if of_role:
                method = max(of_role, key=lambda one: of_role[one].apart)
                found = of_role[method]
                worst.add_row(role, layout, method, found.name, f"{found.apart:.1e}", f"{found.moved:.1e}")
    return [grid, worst], missed


def _shown(one: WorstTensor) -> str:
    return f"{one.apart:.0e}" + ("?" if one.moved < LEAST_MOVE else "")


def main() -> None:
    """Runs the matrix and prints it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--layouts", nargs="+", choices=list(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--tolerance", type=float, default=2e-5, help="largest distance over the change")
    parser.add_argument(
        "--scratch", type=Path, help="keep the runs in this new folder; default: a temporary one"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    say = Console(width=max(120, 24 + 16 * len(given.layouts)))
    with tempfile.TemporaryDirectory(prefix="layout-matrix-") as temporary:
        root = given.scratch or Path(temporary)
        write_inputs(root)
        cells = matrix(given.methods, given.layouts, root, say)
        found, missed = tables(cells, given.methods, given.layouts, given.tolerance)
    for table in found:
        say.print(table)
    say.print(
        f"{len(cells) - missed} of {len(cells)} cells within {given.tolerance:g} of the change; ?: moved too little"
    )
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
