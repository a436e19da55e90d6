"""What a phase does without waits in host memory: the device's memory is free, and no bit of a run changes."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from engine.layouts import frozen, topology, trained
from ranks import run_ranks
from tiny_models import write_llama
from torch import Tensor
from trainer.test_options import exported, same
from trainer.tiny_runs import configure, train

from rto_megatron.algorithms.sft import SFT, Config
from rto_megatron.config.checks import find_problems
from rto_megatron.config.training import OptimizerConfig
from rto_megatron.data.cut import Layout
from rto_megatron.data.packing import supervised_microbatches
from rto_megatron.engine.checkpoint import begin_save
from rto_megatron.engine.megatron import Model, TrainedModel
from rto_megatron.engine.offload import ParkedPart, host_memory
from rto_megatron.engine.optimizer import state_tensors
from rto_megatron.engine.presence import ParkedError
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.types import Demonstration

CLOCKS = ("time", "memory")
ONLINE = ("reference", "reward", "dpo", "gradients", "optimizer", "policy_ema")


def _assert_same_numbers(first: Path, second: Path) -> None:
    assert same(exported(first / "hf"), exported(second / "hf"))
    logs = [
        [{k: v for k, v in entry.items() if not k.startswith(CLOCKS)} for entry in read_metrics(run)]
        for run in (first, second)
    ]
    assert logs[0] == logs[1]


def test_an_online_run_is_bit_equal_with_what_it_can_spare_in_host_memory(
    files: Path, tmp_path: Path
) -> None:
    keys = {
        "run__steps": 2,
        "run__eval_every": 1,
        "data__eval": str(files / "prompts.jsonl"),
        "data__eval_samples": 4,
        "algorithm": {"ema_beta": 0.9, "samples_per_prompt": 2},
        "batch": {"train": 8, "rollout": 8, "tokens": 60},
    }
    for name, offload in (("here", ()), ("away", ONLINE)):
        config = configure("rto", files, tmp_path / name, "tp2", offload=offload, **keys)
        assert run_ranks(2, train, config) == [None] * 2
    _assert_same_numbers(tmp_path / "here", tmp_path / "away")
    for entry in read_metrics(tmp_path / "away"):
        assert entry["memory/parked_gib"] > 0
    assert "memory/parked_gib" not in read_metrics(tmp_path / "here")[0]


def test_an_offline_run_in_bf16_over_replicas_is_bit_equal(files: Path, tmp_path: Path) -> None:
    keys = {
        "precision__dtype": "bf16",
        "run__steps": 3,
        "run__save_every": 2,
        "parallel": {"distributed_optimizer": True},
    }
    for name, offload in (("here", ()), ("away", ("reference", "gradients", "optimizer"))):
        config = configure(
            "dpo", files, tmp_path / name, offload=offload, data__eval=str(files / "pairs.jsonl"), **keys
        )
        assert run_ranks(2, train, config) == [None] * 2
    _assert_same_numbers(tmp_path / "here", tmp_path / "away")


def test_a_storage_of_several_pieces_comes_back_whole() -> None:
    numbers = torch.arange(9 << 20, dtype=torch.int32)  # 36 MiB: 32, and the rest
    kept = numbers.clone()
    part = ParkedPart(lambda: [numbers])
    part.park()
    assert part.num_bytes == kept.nbytes and not numbers.untyped_storage().nbytes()
    part.unpark()
    assert torch.equal(numbers, kept)


@dataclass(frozen=True)
class Seen:
    """Of one rank."""

    sizes: dict[str, int]  # bytes that each part frees
    num_parameters: int
    is_empty: dict[str, bool]
    is_restored: bool
    refused: dict[str, bool]  # uses of what is parked


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def _raises(use) -> bool:
    try:
        use()
    except ParkedError:
        return True
    return False


def _park(root: Path, dtype: str) -> Seen:
    place = topology("one")
    policy = trained(place, root / "policy", False, OptimizerConfig(lr=1e-3), dtype)
    reference = frozen(place, root / "reference", False, dtype)
    layout = Layout(1, True, 1, place.device.torch_device)
    microbatches = supervised_microbatches([Demonstration("a", (1, 5), (6, 7))], 2, layout)
    policy.gradients(microbatches, SFT(Config()).loss, [["a"]])
    policy.apply(1e-3)
    models: dict[str, Model] = {"policy": policy, "reference": reference}
    memory = host_memory(["policy", "reference", "gradients", "optimizer"], models, lambda text: None)
    before = [t.clone() for t in _everything(policy, reference)]
    memory.enter("sample")
    parts = {
        "policy": list(policy.module.parameters()),
        "reference": list(reference.module.parameters()),
        "gradients": policy.gradient_buffers(),
        "optimizer": state_tensors(policy.optimizer),
    }
    is_empty = {name: _bytes(tensors) == 0 for name, tensors in parts.items()}
    sizes = {name: part.num_bytes for name, part in memory._parts.items()}
    batches = [m.batch for m in microbatches]
    refused = {
        "forward": _raises(lambda: policy.token_outputs(batches)),
        "reference": _raises(lambda: reference.token_outputs(batches)),
        "save": _raises(lambda: begin_save(root / "run", 1, {"policy": policy}, {}, {}, 1)),
    }
    memory.enter("push")  # the policy's weights alone
    refused["gradients"] = _raises(lambda: policy.gradients(microbatches, SFT(Config()).loss, [["a"]]))
    refused["apply"] = _raises(lambda: policy.apply(1e-3))
    policy.token_outputs(batches)
    memory.enter("update")
    memory.enter("score")
    reference.token_outputs(batches)
    memory.enter("update")
    reference_is_away = _raises(lambda: reference.token_outputs(batches))
    memory.enter("score")
    for part in memory._parts.values():
        part.unpark()
    after = _everything(policy, reference)
    is_restored = reference_is_away and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    count = sum(p.numel() for p in policy.module.parameters())
    return Seen(sizes, count, is_empty, is_restored, refused)


def _everything(policy: TrainedModel, reference: Model) -> list[Tensor]:
    return [*policy.module.parameters(), *reference.module.parameters(), *state_tensors(policy.optimizer)]


@pytest.mark.parametrize(("dtype", "weight", "state"), [("fp32", 4, 8), ("bf16", 2, 12)])
def test_storages_are_freed_and_restored_bit_for_bit(
    dtype: str, weight: int, state: int, tmp_path: Path
) -> None:
    for seed, role in enumerate(("policy", "reference")):
        write_llama(tmp_path / role, seed)
    (seen,) = run_ranks(1, _park, tmp_path, dtype)
    assert all(seen.is_empty.values()), seen.is_empty
    assert seen.is_restored
    assert all(seen.refused.values()), seen.refused
    # Weights, and per parameter an fp32 gradient, two moments, and in bf16 an fp32 master. Megatron pads its buffers.
    count = seen.num_parameters
    assert seen.sizes["policy"] == seen.sizes["reference"] == weight * count
    assert 4 * count <= seen.sizes["gradients"] <= 4 * count + 4096
    assert seen.sizes["optimizer"] == state * count


@pytest.mark.parametrize(
    ("stage", "offload", "problem"),
    [
        ("rto", ("critic",), "offload names critic, which is trained while it would be away"),
        (
            "grpo",
            ("dpo",),
            "offload names dpo, which stage grpo does not load; this stage has gradients, optimizer",
        ),
        ("rto", ("dpo_reference",), "it shares the weights of reference: name that"),
        ("rto", ("policy_ema",), "offload names policy_ema, which stage rto does not load"),
        ("dpo", ("reference", "reference"), "offload names reference twice"),
        ("dpo", ("policy",), "offload names policy, which is trained"),
        ("tdpo", ("reference",), "whose distribution stage tdpo reads while it trains"),
        ("sft", ("optimizer",), "stage sft has no other model that could use their memory"),
    ],
)
def test_what_cannot_be_spared_is_refused(
    stage: str, offload: tuple[str, ...], problem: str, files: Path, tmp_path: Path
) -> None:
    config = configure(stage, files, tmp_path, offload=offload)
    problems = find_problems(config, 1, {})
    assert [one for one in problems if problem in one], problems


def test_a_pool_on_the_trainers_gpus_leaves_nothing_that_may_not_wait(files: Path, tmp_path: Path) -> None:
    offload = ("policy", "critic", "reference", "reward", "dpo", "gradients", "optimizer")
    rollout = {"colocated": True, "gpu_memory_fraction": 0.4}
    assert find_problems(configure("rto", files, tmp_path, offload=offload, rollout=rollout), 1, {}) == []
