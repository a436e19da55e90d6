#!/usr/bin/env python
"""The checks of launchers/acceptance.sh that are not commands of their own, each started by it under torchrun.

Usage: acceptance.py prepare ROOT                models and data of a tiny task
       acceptance.py collectives ROOT            what the ranks send is what arrives, and how fast
       acceptance.py step ROOT LAYOUT...         one RTO step at each layout, as in tp2_pp2, against that of `one`,
                                                 which a single rank makes first
       acceptance.py kernels ROOT                this package's layers against TransformerEngine's
       acceptance.py figures RUN                 the figures of a run's pool

A check prints its figures in a last line, ends with status 1 where it fails, and with 77 where it cannot be made.
"""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from rto_megatron.config.load import load_recipe
from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.config.training import OptimizerConfig, ParallelConfig, PrecisionConfig, TrainParallelConfig
from rto_megatron.platform.device import prepare as prepare_device
from rto_megatron.platform.kernels import is_installed

_SKIPPED = 77
_RECIPE = Path(__file__).parents[1] / "launchers" / "recipes" / "quickstart" / "rto.yaml"
_SCALAR_ROLES = ("reward", "critic")
_ROLES = ("policy", "reference", "dpo", *_SCALAR_ROLES)
# Another order of the sums: 1e-6 in float32. A missing reduction or a wrong shard changes a step by a tenth and more.
_LARGEST_DIFFERENCE = 1e-3
_LARGEST_KERNEL_DIFFERENCES = {"logits": 0.05, "gradients": 0.1}  # bfloat16 keeps 8 bits


def prepare(root: Path) -> None:
    """Writes the tiny task, and a model with random weights for every role; the same at every call."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from rto_megatron.data.synthetic import Sizes, write_synthetic_task

    write_synthetic_task(root / "task", seed=42, sizes=Sizes(64, 16, 64, 16, 128, 16))
    config = AutoConfig.from_pretrained(root / "task" / "models" / "policy")
    for seed, role in enumerate(_ROLES):
        torch.manual_seed(seed)
        config.num_labels = 1
        model = (
            AutoModelForSequenceClassification.from_config(config)
            if role in _SCALAR_ROLES
            else AutoModelForCausalLM.from_config(config)
        )
        folder = root / "models" / role
        shutil.copytree(root / "task" / "tokenizer", folder, dirs_exist_ok=True)
        model.float().save_pretrained(folder)
    (root / "overrides").write_text("\n".join(_overrides(root)) + "\n")


def _overrides(root: Path) -> list[str]:
    """What makes the quickstart's recipe one of this task: small batches, and steps that show in the weights."""
    models = [f"models.{role}={root / 'models' / role}" for role in _ROLES]
    return [
        f"vars.root={root}",
        *models,
        "models.allow_unverified_reference=true",
        "run.samples_every=null",
        *("batch.train=16", "batch.micro=4", "batch.rollout=16"),
        *("optimizer.kind=sgd", "optimizer.lr=0.5", "optimizer.warmup_fraction=0"),
        *("critic_optimizer.kind=sgd", "critic_optimizer.lr=0.1", "critic_optimizer.warmup_fraction=0"),
    ]


def collectives(root: Path) -> None:
    """Every collective that training uses, on numbers whose outcome is known, on this rank's device."""
    device = prepare_device()
    dist.init_process_group(device.backend)
    rank, world = dist.get_rank(), dist.get_world_size()
    own = torch.full((world * 4,), float(rank + 1), device=device.torch_device)
    total = float(world * (world + 1) // 2)

    summed = own.clone()
    dist.all_reduce(summed)
    _require(bool((summed == total).all()), "all_reduce")
    gathered = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(gathered, own)
    _require(all(bool((part == place + 1).all()) for place, part in enumerate(gathered)), "all_gather")
    scattered = torch.empty(4, device=device.torch_device)
    dist.reduce_scatter_tensor(scattered, own)
    _require(bool((scattered == total).all()), "reduce_scatter")
    told = own.clone()
    dist.broadcast(told, world - 1)
    _require(bool((told == world).all()), "broadcast")
    received = torch.empty_like(own)
    ring = [
        dist.P2POp(dist.isend, own, (rank + 1) % world),
        dist.P2POp(dist.irecv, received, (rank - 1) % world),
    ]
    for request in dist.batch_isend_irecv(ring):
        request.wait()
    _require(bool((received == (rank - 1) % world + 1).all()), "send and receive")

    size = (256 if device.is_cuda else 16) * 1024**2
    buffer = torch.zeros(size // 4, device=device.torch_device)
    seconds = min(_seconds(lambda: dist.all_reduce(buffer), device.is_cuda) for _ in range(5))
    if rank == 0:
        moved = 2 * (world - 1) / world * size / 1e9
        print(f"figures: {world} ranks, {device.backend}, all_reduce {moved / seconds:.2f} GB/s on the wire")
    dist.destroy_process_group()


def _require(holds: bool, name: str) -> None:
    if not holds:
        print(f"error: {name} brought rank {dist.get_rank()} something else than was sent")
        sys.exit(1)


def _seconds(call: Callable[[], object], is_cuda: bool) -> float:
    started = time.monotonic()
    call()
    if is_cuda:
        torch.cuda.synchronize()
    return time.monotonic() - started


def step(root: Path, layouts: list[str]) -> None:
    """One RTO step from scripted responses at each layout: five models scored, policy and critic updated; compared."""
    device = prepare_device()
    from rto_megatron.parallel.topology import Topology
    from rto_megatron.proofs.resumed_runs import ScriptedPool, ScriptedPush
    from rto_megatron.trainer.connected_pool import ConnectedPool
    from rto_megatron.trainer.online import train_online

    for layout in layouts:
        sizes = {part[:2]: int(part[2:]) for part in layout.split("_") if part[2:].isdigit()}
        tensor, pipeline, sequence = sizes.get("tp", 1), sizes.get("pp", 1), "sp" in layout.split("_")
        keys = [f"run.dir={root / 'step' / layout}", "run.steps=1", f"parallel.tensor={tensor}"]
        keys += [f"parallel.pipeline={pipeline}", f"parallel.sequence={str(sequence).lower()}"]
        # The script's own probabilities are not the policy's.
        config = load_recipe(_RECIPE, [*_overrides(root), *keys, "rollout.logprob_gap_alarm=null"])
        assert isinstance(config, ReinforcementStage)
        # One process group for all: a second one would meet what the first left in the store.
        topology = Topology.init(device, config.parallel, config.run.seed)
        pool = ScriptedPool(vocab_size=64) if topology.is_replica_lead else None
        train_online(config, topology, ConnectedPool(pool, ScriptedPush(pool)))
    is_lead = dist.get_rank() == 0
    dist.destroy_process_group()
    if is_lead and layouts != ["one"]:
        compare(root)


def compare(root: Path) -> None:
    """Weights relative to their move, and every number that the step logged."""
    from rto_megatron.reporting.metrics import read_metrics

    start = _weights(root / "models" / "policy")
    runs = {path.name: path for path in sorted((root / "step").iterdir())}
    weights = {name: _weights(path / "hf") for name, path in runs.items()}
    (want,) = read_metrics(runs["one"])
    move = _distance(weights["one"], start)
    assert move > 0, "the step moved nothing"
    differences = {}
    for name in runs.keys() - {"one"}:
        (got,) = read_metrics(runs[name])
        logged = [
            _apart(got[key], want[key]) for key in want if not key.startswith(("time", "sync/", "step"))
        ]
        # torch's max keeps a NaN, which Python's may drop.
        differences[name] = float(
            torch.tensor([_distance(weights[name], weights["one"]) / move, *logged]).max()
        )
    worst = ", ".join(f"{name} {value:.1e}" for name, value in sorted(differences.items()))
    if not differences or not all(value <= _LARGEST_DIFFERENCE for value in differences.values()):
        print(f"error: a step differs from one rank's by more than {_LARGEST_DIFFERENCE:g}: {worst}")
        sys.exit(1)
    print(f"figures: largest relative difference from one rank: {worst}")


def _weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a Hugging Face folder, whose pipeline stages have a file each."""
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def _distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return float(torch.stack([(first[name] - second[name]).norm() for name in first]).norm())


def _apart(got: float, want: float) -> float:
    # Means of advantages and of the first ratio are zero up to rounding: relative to them nothing is small.
    return abs(got - want) / max(abs(want), 0.1)


def kernels(root: Path) -> None:
    """Logits, gradients and a checkpoint of the policy, with TransformerEngine's layers and with torch's."""
    if not torch.cuda.is_available():
        _skip("no GPU")
    if not is_installed():
        _skip("TransformerEngine is not installed; bash launchers/install_gpu.sh")
    bf16 = PrecisionConfig(dtype="bf16", kernels="transformer_engine")
    device = prepare_device(bf16)
    from rto_megatron.algorithms.sft import SFT, Config
    from rto_megatron.data.cut import Layout
    from rto_megatron.data.packing import supervised_microbatches
    from rto_megatron.engine.build_roles import build_trained
    from rto_megatron.engine.checkpoint import begin_save, load_state
    from rto_megatron.engine.megatron import FrozenModel
    from rto_megatron.engine.source import find_source
    from rto_megatron.engine.weights import local_parameters
    from rto_megatron.trainer.stages import ranks
    from rto_megatron.types import Demonstration

    folder, adam = root / "models" / "policy", OptimizerConfig(lr=1e-3)
    texts = [
        Demonstration("a", tuple(range(3, 30)), tuple(range(30, 60))),
        Demonstration("b", (9,), (10, 11, 12)),
    ]
    with ranks(device, ParallelConfig(), seed=1) as topology:
        source = find_source(folder, False, is_random=False, key="models.policy")
        theirs, ours = (
            build_trained("policy", source, False, bf16, adam, place, 1, TrainParallelConfig())
            for place in (topology, replace(topology, device=replace(device, kernels="torch")))
        )
        micro = supervised_microbatches(texts, 33, Layout(2, True, 1, device.torch_device))
        frozen = [
            FrozenModel("policy", one.shape, False, one.scale, one.module, one.topology)
            for one in (theirs, ours)
        ]
        logits = [torch.cat(one.raw_outputs([m.batch for m in micro])) for one in frozen]
        for one in (theirs, ours):
            one.gradients(micro, SFT(Config()).loss, [["a", "b"]])
        named = [local_parameters(one.module) for one in (theirs, ours)]
        gradients = [
            torch.cat([vars(part[name])["main_grad"].flatten() for name in named[1]]) for part in named
        ]
        ours.apply(lr=1e-3)
        shutil.rmtree(root / "kernels", ignore_errors=True)
        begin_save(root / "kernels", 1, {"policy": ours}, {"policy": folder}, {}, keep=1).finish()
        load_state(root / "kernels" / "checkpoints" / "step_000001" / "policy", theirs)
        unlike = [name for name, one in named[1].items() if not torch.equal(one, named[0][name])]
    found = {"logits": _relative(*logits), "gradients": _relative(*gradients)}
    shown = ", ".join(f"{name} by {value:.1e} of their norm" for name, value in found.items())
    if unlike or not all(found[name] <= limit for name, limit in _LARGEST_KERNEL_DIFFERENCES.items()):
        print(
            f"error: in bf16 TransformerEngine's layers differ: {shown}; loaded otherwise: {unlike or 'nothing'}"
        )
        sys.exit(1)
    print(f"figures: bf16 {shown}; torch's checkpoint loaded")


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def _skip(reason: str) -> NoReturn:
    print(f"figures: {reason}")
    sys.exit(_SKIPPED)


def figures(run_dir: Path) -> None:
    """What a run says of its pool: the push, and how far its log-probs are from the trainer's."""
    from rto_megatron.reporting.metrics import read_metrics

    last = read_metrics(run_dir)[-1]
    push = sum(last[f"sync/{phase}_s"] for phase in ("pause", "prepare", "commit", "canary"))
    step = last["time/step_s"]
    print(
        f"figures: {last['sync/bytes'] / 1e6:.1f} MB pushed and proved in {push:.2f} s, log-probs at most "
        f"{last['pool/logprob_gap_max']:.1e} nats apart, step {step:.1f} s"
    )


def main() -> None:
    """Runs the named check."""
    name, root, *rest = sys.argv[1:] or [""] * 2
    checks = {f.__name__: f for f in (prepare, collectives, kernels, figures)}
    if name == "step":
        step(Path(root), rest)
    elif name in checks and not rest:
        checks[name](Path(root))
    else:
        print(__doc__)
        sys.exit(2)


if __name__ == "__main__":
    main()
