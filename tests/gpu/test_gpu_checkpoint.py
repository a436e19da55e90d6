"""On one GPU: a resumed run equals an undisturbed one bit for bit, and an export is what transformers loads."""

from pathlib import Path

import pytest
import torch
from gpu import oracle
from gpu.roles import ADAM, TEXTS, HfModel, Prepared, Task, task, trained, whole
from stepping import take_step
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rto_megatron.data.packing import Layout, token_batch
from rto_megatron.engine.checkpoint import begin_save, load_state
from rto_megatron.engine.export import export_hf
from rto_megatron.engine.megatron import TrainedModel
from rto_megatron.parallel.topology import Topology

pytestmark = pytest.mark.gpu
NUM_STEPS = 2  # before the checkpoint, and again after it
LR = 1e-3


def _pair(
    place: Topology, models: dict[str, HfModel], dtype: str, is_distributed: bool
) -> dict[str, TrainedModel]:
    roles = ("policy", "critic")
    return {role: trained(place, models[role], ADAM, dtype, is_distributed) for role in roles}


def _train(pair: dict[str, TrainedModel], tasks: list[Task], num_steps: int) -> list[tuple[float, float]]:
    """The gradient norms, which see the last bits of a step before Adam hides them."""
    norms = []
    for _ in range(num_steps):
        for step in tasks:
            model = pair[step.role]
            metrics = take_step(model, step.microbatches, step.loss, step.names, LR)
            norms.append(metrics[f"{model.name}/grad_norm"])
    return norms


def _state(pair: dict[str, TrainedModel]) -> dict[str, Tensor]:
    """Weights, float32 masters and everything that Adam keeps, copied to the CPU."""
    state = {}
    for role, model in pair.items():
        state.update({f"{role}/{name}": t for name, t in whole(model, lambda p: p).items()})
        for number, chained in enumerate(model.optimizer.chained_optimizers):
            adam = chained.optimizer
            parameters = [p for group in adam.param_groups for p in group["params"]]
            for index, parameter in enumerate(parameters):
                key = f"{role}/adam{number}/{index}"
                state[f"{key}/param"] = parameter
                state.update(
                    {f"{key}/{name}": torch.as_tensor(v) for name, v in adam.state[parameter].items()}
                )
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


@pytest.mark.parametrize("is_distributed", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_undisturbed_one(
    dtype: str,
    is_distributed: bool,
    tmp_path: Path,
    prepared: Prepared,
    place: Topology,
    layout: Layout,
    models: dict[str, HfModel],
    is_deterministic: None,
) -> None:
    tasks = [task(name, prepared, place, layout) for name in ("rto_value", "rto_policy")]
    undisturbed = _pair(place, models, dtype, is_distributed)
    wanted_norms = _train(undisturbed, tasks, 2 * NUM_STEPS)[len(tasks) * NUM_STEPS :]

    stopped = _pair(place, models, dtype, is_distributed)
    _train(stopped, tasks, NUM_STEPS)
    folders = {role: models[role].folder for role in stopped}
    path = begin_save(tmp_path, NUM_STEPS, stopped, folders, {}, keep=1).finish()
    saved = _state(stopped)

    # Other weights, and an Adam that has already taken a step: nothing of them may survive the load.
    resumed = _pair(
        place, {**models, "policy": models["dpo"], "critic": models["reward"]}, dtype, is_distributed
    )
    _train(resumed, tasks, 1)
    for role, model in resumed.items():
        load_state(path / role, model)
    _assert_same(_state(resumed), saved)
    norms = _train(resumed, tasks, NUM_STEPS)
    _assert_same(_state(resumed), _state(undisturbed))
    assert norms == wanted_norms
    steps = {float(t) for name, t in _state(resumed).items() if name.endswith("/step")}
    assert steps <= {2.0 * NUM_STEPS}, steps


def _assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["rto_policy", "rto_value"])
def test_an_export_loads_in_transformers(
    stage: str,
    dtype: str,
    tmp_path: Path,
    prepared: Prepared,
    place: Topology,
    layout: Layout,
    models: dict[str, HfModel],
) -> None:
    step = task(stage, prepared, place, layout)
    source = models[step.role]
    model = trained(place, source, ADAM, dtype)
    take_step(model, step.microbatches, step.loss, step.names, LR)
    export_hf(model, source.folder, tmp_path / "hf")

    kind = AutoModelForSequenceClassification if source.is_scalar else AutoModelForCausalLM
    loaded, report = kind.from_pretrained(
        tmp_path / "hf", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    _assert_same({n: p.detach() for n, p in loaded.named_parameters()}, whole(model, lambda p: p))
    if dtype == "bf16":
        return
    batch = token_batch([(ids, 1) for ids, _ in TEXTS], True, 1, place.device.torch_device)
    (outputs_T,) = model.token_outputs([batch])
    exported = HfModel(tmp_path / "hf", loaded.eval(), source.is_scalar)
    with torch.no_grad():
        for start, last, (ids, _) in zip(batch.cu_seqlens, batch.last_positions, TEXTS, strict=False):
            ours = outputs_T[start : last + source.is_scalar].cpu()
            torch.testing.assert_close(ours, oracle.sequence_outputs(exported, ids), atol=1e-4, rtol=0)
