"""The offline stages on one loop: SFT, reward model and DPO differ in their data, their loss and their head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path

import torch
from torch import Tensor

from rto_megatron.algorithms import ALGORITHMS
from rto_megatron.algorithms.losses import sequence_sums
from rto_megatron.algorithms.reward_model import reward_statistics
from rto_megatron.config import schema
from rto_megatron.data.batches import Batches
from rto_megatron.data.loader import Loaded, load_demonstrations, load_pairs
from rto_megatron.data.packing import Layout, pair_microbatches, supervised_microbatches
from rto_megatron.engine.megatron import FrozenModel, Microbatch, TrainedModel, ValueScale
from rto_megatron.engine.roles import build_frozen, build_trained
from rto_megatron.errors import UserError
from rto_megatron.parallel.topology import Topology
from rto_megatron.trainer.metrics import add
from rto_megatron.trainer.report.progress import say
from rto_megatron.trainer.run import Run, learning_rate, reduce_over_replicas
from rto_megatron.trainer.setup import Setup, prepare_stage, stage_hf_files, write_scale
from rto_megatron.types import Demonstration, LossOutput, Metrics, PreferencePair

type Example = Demonstration | PreferencePair
type OfflineStage = schema.SftStage | schema.RewardModelStage | schema.DpoStage


@dataclass(frozen=True)
class Task:
    """What one offline stage does with a global batch."""

    role: str  # of the trained model in checkpoints
    load: Callable[..., Loaded[Demonstration] | Loaded[PreferencePair]]
    size: Callable[[Sequence[Example]], int]  # response tokens or pairs: what a loss is divided by
    microbatches: Callable[
        [Sequence[Example], int], list[Microbatch]
    ]  # of a share, given the size of the whole
    loss: Callable[[Tensor, Microbatch], LossOutput]


def train_offline(config: OfflineStage, topology: Topology) -> None:
    """Trains SFT, a reward model or DPO to the end of the run, from the last checkpoint if there is one."""
    setup = prepare_stage(config, topology)
    is_reward = isinstance(config, schema.RewardModelStage)
    role = "reward" if is_reward else "policy"
    source = setup.sources["policy"]
    model = build_trained(
        role, source, is_reward, config.precision, config.optimizer, topology, config.run.seed,
        config.parallel.distributed_optimizer, is_head_fresh=is_reward, scale=ValueScale(),
    )  # fmt: skip
    reference = None
    if isinstance(config, schema.DpoStage):
        reference = build_frozen("reference", setup.sources["reference"], False, config.precision, topology)
    task = _task(config, role, setup, reference)
    data = _load(task, config.data.train, None, setup)
    held_out = _load(task, config.data.eval, config.data.eval_samples, setup) if config.data.eval else []
    if is_reward and not held_out:
        raise UserError(
            "data.eval is not set; a reward model keeps the mean and std of its scores on held-out pairs"
        )
    batches = Batches(data, config.batch.train, config.run.seed, topology.data_rank, topology.data_size)
    hf_files = stage_hf_files(source, config.run.dir, role, topology)
    run = Run(
        config, topology, {role: model}, {role: hf_files}, config.run.steps or batches.batches_per_epoch
    )
    if run.state:
        batches.restore(run.state["data"])
    for step in run.steps():
        examples = batches.next_batch()
        lr = learning_rate(config.optimizer, step, run.num_steps)
        names = [[e.id for e in group] for group in batched(examples, config.batch.micro)]
        own = torch.tensor(float(task.size(examples)), device=topology.device.torch_device)
        microbatches = task.microbatches(examples, int(topology.dp_sum(own)))
        run.record(model.step(microbatches, task.loss, names, lr))
        evaluation: dict[str, float] = {}
        if held_out and (
            run.is_due(config.run.eval_every, step + 1) or (is_reward and run.is_saved(step + 1))
        ):
            evaluation = evaluate(model, task, held_out, topology)
            say("eval  " + "  ".join(f"{k} {v:.4g}" for k, v in evaluation.items()), topology.is_lead)
        if is_reward and run.is_saved(step + 1):
            _store_scale(evaluation, len(held_out), hf_files, topology)
        run.log({"lr": lr, **{f"eval/{k}": v for k, v in evaluation.items()}})
        run.finish({"data": batches.state()})
    run.close(role)


def evaluate(
    model: TrainedModel, task: Task, examples: Sequence[Example], topology: Topology
) -> dict[str, float]:
    """Means of the loss's metrics over held-out examples, without gradients; all ranks must call it.

    Args:
        examples: all of them; a replica takes its share, which is empty when there are fewer than replicas.
    """
    total: Metrics = {}
    own = examples[topology.data_rank :: topology.data_size]
    if own:
        microbatches = task.microbatches(own, task.size(examples))
        outputs = model.token_outputs([m.batch for m in microbatches])
        with torch.no_grad():
            for output, microbatch in zip(outputs, microbatches, strict=True):
                total = add(total, task.loss(output, microbatch).metrics)
    return reduce_over_replicas(total, topology)


def _store_scale(means: dict[str, float], num_pairs: int, hf_files: Path, topology: Topology) -> None:
    count = 2.0 * num_pairs
    mean, std = reward_statistics(count, count * means["mean_reward"], count * means["mean_squared_reward"])
    if topology.is_lead:
        write_scale(hf_files, mean, std)
    topology.barrier()


def _load(task: Task, name: str, max_rows: int | None, setup: Setup) -> list[Example]:
    loaded = task.load(name, setup.tokenizer, setup.limits, max_rows)
    say(loaded.report.summary(), setup.topology.is_lead)
    return list(loaded.items)


def _task(config: OfflineStage, role: str, setup: Setup, reference: FrozenModel | None) -> Task:
    algorithm = ALGORITHMS[config.stage](config.algorithm)
    layout = setup.layout

    def num_targets(examples: Sequence[Demonstration]) -> int:
        return sum(len(e.response_ids) for e in examples)

    def supervised(examples: Sequence[Demonstration], num_target_tokens: int) -> list[Microbatch]:
        return supervised_microbatches(examples, num_target_tokens, layout)

    def pairs(examples: Sequence[PreferencePair], num_pairs: int) -> list[Microbatch]:
        logp_ref_G2 = torch.zeros(len(examples), 2, device=layout.device)
        if reference is not None:
            logp_ref_G2 = reference_logprobs(reference, examples, layout)
        return pair_microbatches(examples, logp_ref_G2, num_pairs, layout)

    if isinstance(config, schema.SftStage):
        return Task(role, load_demonstrations, num_targets, supervised, algorithm.loss)
    return Task(role, load_pairs, len, pairs, algorithm.loss)


def reference_logprobs(reference: FrozenModel, pairs: Sequence[PreferencePair], layout: Layout) -> Tensor:
    """Summed log-probs of both answers under the reference, [G, 2]."""
    zeros_G2 = torch.zeros(len(pairs), 2, device=layout.device)
    microbatches = pair_microbatches(pairs, zeros_G2, len(pairs), layout)
    outputs = reference.token_outputs([m.batch for m in microbatches])
    sums = [
        sequence_sums(o, m.mask_T, m.batch).view(2, -1).T for o, m in zip(outputs, microbatches, strict=True)
    ]
    return torch.cat(sums)
