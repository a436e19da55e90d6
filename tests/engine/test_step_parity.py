"""One RTO update from fixed rollouts gives the one-rank gradients and weights at every layout, policy and critic."""

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from engine.fixed_rollouts import rollouts
from engine.layouts import LAYOUTS, frozen, topology, trained
from engine.whole_tensors import whole
from megatron.core.distributed import DistributedDataParallel
from ranks import run_ranks
from safetensors.torch import load_file
from stepping import take_step
from tiny_models import write_llama
from torch import Tensor

from rto_megatron.algorithms import rto
from rto_megatron.config.rollouts import SamplingConfig
from rto_megatron.config.training import OptimizerConfig
from rto_megatron.data.packing import Layout
from rto_megatron.trainer.opinions import Roles
from rto_megatron.trainer.reward_source import ModelReward
from rto_megatron.trainer.reward_sum import alone
from rto_megatron.trainer.scoring import close_rollouts, score
from rto_megatron.trainer.update import optimizer_minibatches
from rto_megatron.types import EndOfSequence

# The package binds the same name to a function.
finalize = import_module("megatron.core.distributed.finalize_model_grads")
SGD = OptimizerConfig(kind="sgd", lr=0.5, max_grad_norm=None)
ADAM = OptimizerConfig(kind="adam", lr=1e-3)
END = EndOfSequence((2,), 2)
FOLDERS = {
    "policy": (7, False),
    "dpo": (8, False),
    "reference": (9, False),
    "reward": (10, True),
    "critic": (11, True),
}


@dataclass(frozen=True)
class Case:
    """What differs between two runs that must agree."""

    layout: str = "one"
    packed: bool = True
    micro: int = 2
    is_tied: bool = False
    dtype: str = "fp32"
    is_distributed_optimizer: bool = False
    is_overlapped: bool = False
    optimizer: OptimizerConfig = SGD
    num_steps: int = 1
    disable: str = ""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Model folders with separate and with tied output weights."""
    made = {}
    for is_tied in (False, True):
        root = tmp_path_factory.mktemp(f"models_{is_tied}")
        for name, (seed, is_scalar) in FOLDERS.items():
            write_llama(root / name, seed, is_tied=is_tied, is_scalar=is_scalar)
        made[is_tied] = root
    return made


def _without(reduction: str) -> None:
    """Takes one gradient reduction away, as a broken build would."""
    if reduction == "data":
        DistributedDataParallel.finish_grad_sync = lambda self, *_, **__: None
        DistributedDataParallel.start_grad_sync = lambda self, *_, **__: None
    if reduction == "replicated":
        finalize._allreduce_non_tensor_model_parallel_grads = lambda *_, **__: None
    if reduction == "tied":
        finalize._allreduce_word_embedding_grads = lambda *_, **__: None


def _update(case: Case, root: Path) -> dict[str, dict[str, Tensor]]:
    """Runs the update; returns gradients of the first step and final weights of this rank's stage."""
    _without(case.disable)
    place = topology(case.layout)
    policy, critic = (
        trained(
            place,
            root / name,
            FOLDERS[name][1],
            case.optimizer,
            case.dtype,
            case.is_distributed_optimizer,
            case.is_overlapped,
        )
        for name in ("policy", "critic")
    )
    if case.disable == "value_head" and place.is_last_stage:
        critic.module.last.output_layer.weight.sequence_parallel = False
    reference, dpo, reward = (
        frozen(place, root / name, FOLDERS[name][1], case.dtype) for name in ("reference", "dpo", "reward")
    )
    layout = Layout(case.micro, case.packed, place.row_multiple, place.device.torch_device)
    source = alone(ModelReward(reward, layout, END, "penalise"), place)
    roles = Roles(policy, None, critic, reference, source, dpo, None)
    algorithm = rto.build(rto.Config(epochs=case.num_steps), lambda _: frozenset())
    own = close_rollouts(rollouts()[place.data_rank :: place.data_size], END, "penalise")
    scored = score(own, roles, layout, END, "penalise", SamplingConfig(min_response_tokens=0))
    experience = algorithm.credit(scored, 0.01, place.dp_sum)
    seen: dict[str, dict[str, Tensor]] = {}
    for one in optimizer_minibatches(experience, algorithm.config, 14, 1, place, layout, seed=1):
        for model, loss in ((critic, algorithm.value_loss), (policy, algorithm.policy_loss)):
            if not seen.get(f"{model.name}/gradient") and not case.is_distributed_optimizer:
                model.gradients(one.microbatches, loss, one.names)
                seen[f"{model.name}/gradient"] = whole(model, lambda p: p.main_grad)
            take_step(model, one.microbatches, loss, one.names, case.optimizer.lr)
    for model in (critic, policy):
        seen[f"{model.name}/weights"] = whole(model, lambda p: p)
    is_reporter = place.tensor_rank == 0 and place.data_rank == 0
    return seen if is_reporter else {}


def _merged(case: Case, folders: dict[bool, Path]) -> dict[str, dict[str, Tensor]]:
    merged: dict[str, dict[str, Tensor]] = {}
    for seen in run_ranks(LAYOUTS[case.layout][0], _update, case, folders[case.is_tied]):
        for key, tensors in seen.items():
            merged.setdefault(key, {}).update(tensors)
    return merged


_BASE: dict[tuple[object, ...], dict[str, dict[str, Tensor]]] = {}


def _base(case: Case, folders: dict[bool, Path]) -> dict[str, dict[str, Tensor]]:
    key = (case.is_tied, case.dtype, case.optimizer.kind, case.num_steps)
    if key not in _BASE:
        one = Case(is_tied=case.is_tied, dtype=case.dtype, optimizer=case.optimizer, num_steps=case.num_steps)
        _BASE[key] = _merged(one, folders)
    return _BASE[key]


def _errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    assert got.keys() == want.keys()
    return {name: float((got[name] - want[name]).norm() / want[name].norm()) for name in want}


def _initial(folders: dict[bool, Path], is_tied: bool, name: str) -> dict[str, Tensor]:
    return {k: v.float() for k, v in load_file(folders[is_tied] / name / "model.safetensors").items()}


def _report(case: Case, folders: dict[bool, Path]) -> dict[str, float]:
    """Largest relative L2 error per quantity against one rank: gradients, and the change of the weights."""
    got, want = _merged(case, folders), _base(case, folders)
    worst = {}
    for key in want:
        if key not in got:
            continue
        if key.endswith("weights"):
            start = _initial(folders, case.is_tied, key.split("/")[0])
            deltas = [{name: side[key][name] - start[name] for name in want[key]} for side in (got, want)]
            worst[key] = max(_errors(*deltas).values())
        else:
            worst[key] = max(_errors(got[key], want[key]).values())
    return worst


# Beside others that have the same dimensions and more.
SLOW = {Case("tp2_pp2"), Case("one", micro=8), Case("tp2_cp2_gather_sp")}
SAME = [
    Case("tp2"),
    Case("pp2"),
    Case("dp2"),
    Case("dp2", micro=1, is_overlapped=True),
    Case("tp2_sp"),
    Case("tp2_pp2"),
    Case("tp2_pp2_sp"),
    Case("pp2", is_tied=True),
    Case("tp2_pp2_sp", is_tied=True, micro=4),
    Case("one", packed=False),
    Case("one", micro=8),
    Case("tp2_sp", packed=False, micro=1),
    Case("cp2"),
    Case("cp2_gather", packed=False, micro=1),
    Case("tp2_cp2_gather_sp"),
    Case("tp2_cp2_sp", packed=False, micro=3),  # the border of the parts lies in a row
    Case("cp2_pp2", is_tied=True),
    Case("cp2_dp2", is_overlapped=True),
]
ADAM_LAYOUTS = ["tp2_sp", "pp2", "dp2", pytest.param("tp2_pp2", marks=pytest.mark.slow)]
# What to take away, where it matters, and the models that must then differ.
REDUCTIONS = [
    (Case("dp2", disable="data"), {"policy", "critic"}),
    (Case("tp2_sp", disable="replicated"), {"policy", "critic"}),
    (Case("pp2", is_tied=True, disable="tied"), {"policy"}),
    (Case("tp2_sp", disable="value_head"), {"critic"}),
    (Case("cp2", disable="data"), {"policy", "critic"}),  # context ranks are among those that reduce
]


def _id(case: Case) -> str:
    parts = [case.layout, "packed" if case.packed else "padded", f"micro{case.micro}", case.disable]
    marks = ("tied" if case.is_tied else "", "overlapped" if case.is_overlapped else "")
    return "-".join(part for part in (*parts, *marks) if part)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case in SLOW else (), id=_id(case)) for case in SAME],
)
def test_gradients_and_sgd_step_equal_one_rank(case: Case, folders: dict[bool, Path]) -> None:
    report = _report(case, folders)
    print(_id(case), {key: f"{error:.1e}" for key, error in report.items()})
    assert report.keys() == {f"{m}/{q}" for m in ("policy", "critic") for q in ("gradient", "weights")}
    assert max(report.values()) < 1e-5, report


@pytest.mark.parametrize(
    ("case", "broken"), REDUCTIONS, ids=lambda value: _id(value) if isinstance(value, Case) else ""
)
def test_a_missing_gradient_reduction_is_seen(
    case: Case, broken: set[str], folders: dict[bool, Path]
) -> None:
    report = _report(case, folders)
    print(_id(case), {key: f"{error:.1e}" for key, error in report.items()})
    for model in ("policy", "critic"):
        assert (report[f"{model}/gradient"] > 1e-3) == (model in broken), report


@pytest.mark.parametrize("layout", ADAM_LAYOUTS)
def test_three_adam_steps_stay_close_to_one_rank(layout: str, folders: dict[bool, Path]) -> None:
    report = _report(Case(layout, optimizer=ADAM, num_steps=3), folders)
    print(layout, {key: f"{error:.1e}" for key, error in report.items()})
    # Adam divides by the gradient's size: where that is rounding noise, so is the direction of the step.
    assert max(report["policy/weights"], report["critic/weights"]) < 2e-3, report


@pytest.mark.parametrize("is_overlapped", [False, True])
def test_bf16_distributed_optimizer_follows_one_rank(is_overlapped: bool, folders: dict[bool, Path]) -> None:
    """Relative to the move of the weights; bf16 keeps 8 bits, the optimizer's fp32 masters the rest."""
    case = Case("dp2", dtype="bf16", is_distributed_optimizer=True, optimizer=ADAM, num_steps=3)
    case = replace(case, is_overlapped=is_overlapped)
    got, want = _merged(case, folders), _base(case, folders)
    for name in ("policy", "critic"):
        start = _initial(folders, False, name)
        moved = _distance(want[f"{name}/weights"], start)
        apart = _distance(got[f"{name}/weights"], want[f"{name}/weights"])
        print(name, f"moved {moved:.3e}, apart {apart:.3e}")
        assert apart < 0.1 * moved


def _distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return float(torch.stack([(first[name] - second[name]).norm() for name in first]).norm())
