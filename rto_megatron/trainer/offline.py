"""The offline stages on one loop: SFT, reward model and preference methods differ in their data, loss and head."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import batched, chain
from pathlib import Path

import torch
from torch import Tensor

from rto_megatron.algorithms import ALGORITHMS, kto
from rto_megatron.algorithms.method import OfflineMethod
from rto_megatron.algorithms.reward_model import reads_margins, reward_statistics
from rto_megatron.config import schema
from rto_megatron.config.learning_rate import learning_rate
from rto_megatron.data.encoder import Loaded
from rto_megatron.data.loader import load_demonstrations, load_judged, load_pairs
from rto_megatron.data.packing import (
    Layout,
    judged_microbatches,
    pair_microbatches,
    response_sums,
    sequence_batches,
    supervised_microbatches,
)
from rto_megatron.data.vocabulary import token_ids
from rto_megatron.engine.build_roles import build_frozen, build_trained
from rto_megatron.engine.divergence import divergence_from, divergence_microbatches
from rto_megatron.engine.megatron import (
    TOKENS,
    FrozenModel,
    Microbatch,
    Model,
    Reading,
    TrainedModel,
    ValueScale,
)
from rto_megatron.errors import UserError
from rto_megatron.parallel.topology import Topology
from rto_megatron.reporting.metrics import add, with_margin
from rto_megatron.reporting.progress import say
from rto_megatron.trainer.feed import feed, go_on
from rto_megatron.trainer.guard import ModelUpdate, NotFiniteError
from rto_megatron.trainer.model_files import give_own_padding
from rto_megatron.trainer.parts import planned_parts
from rto_megatron.trainer.reference import note_reference
from rto_megatron.trainer.run import Run, reduce_over_replicas
from rto_megatron.trainer.setup import Setup, note_in_config, prepare_stage, stage_hf_files
from rto_megatron.types import Demonstration, JudgedResponse, LossOutput, Metrics, PreferencePair

type Example = Demonstration | PreferencePair | JudgedResponse


@dataclass(frozen=True)
class Task:
    """What one offline stage does with a global batch."""

    load: Callable[..., Loaded[Example]]
    size: Callable[[Sequence[Example]], int]  # response tokens, pairs or answers: what a loss is divided by
    microbatches: Callable[
        [Sequence[Example], int], list[Microbatch]
    ]  # of a share, given the size of the whole
    loss: Callable[[Tensor, Microbatch], LossOutput]
    reading: Reading  # what the loss sees of the model
    num_evaluated: (
        int | None
    )  # examples of an evaluation whose micro-batches exist at a time; None: all, coupled


def train_offline(config: schema.OfflineStage, topology: Topology) -> None:
    """Trains SFT, a reward model or a preference method to the end of the run, from the last checkpoint if any."""
    setup = prepare_stage(config, topology)
    is_reward = isinstance(config, schema.RewardModelStage)
    role = "reward" if is_reward else "policy"
    source = setup.sources["policy"]
    model = build_trained(
        role, source, is_reward, config.precision, config.optimizer, topology, config.run.seed,
        config.parallel.distributed_optimizer, is_head_fresh=is_reward, scale=ValueScale(),
        moe_aux_loss_coef=config.models.moe_aux_loss_coef,
    )  # fmt: skip
    reference = None
    if "reference" in setup.sources:
        reference = build_frozen("reference", setup.sources["reference"], False, config.precision, topology)
    task = build_task(config, setup.layout, model, reference)
    data = task.load(config.data.train, setup.tokenizer, setup.limits, None, setup.eos)
    setup.admit(data)
    batches = feed(data, config.batch.train, config.run.seed, topology)
    held_out = _held_out(task, config.data, setup)
    if is_reward and not held_out:
        raise UserError(
            "data.eval is not set; a reward model keeps the mean and std of its scores on held-out pairs"
        )
    hf_files = stage_hf_files(source, config.run.dir, role, topology, setup.eos)
    if is_reward:
        known = chain(data.items, held_out)
        give_own_padding(hf_files, frozenset(chain.from_iterable(map(token_ids, known))), topology)
    if reference is not None:
        note_reference(hf_files, reference)
    run = Run(
        config, topology, {role: model}, {role: hf_files}, config.run.steps or batches.batches_per_epoch
    )
    guard = planned_parts().guard(run, config.run.max_skipped_updates, topology)
    if run.state:
        go_on(batches, run.state["data"], "data.train", topology)
    for step in run.steps():
        examples = batches.next_batch()
        lr = learning_rate(config.optimizer, step, run.num_steps)
        names = [[e.id for e in group] for group in batched(examples, config.batch.micro)]
        own = torch.tensor(float(task.size(examples)), device=topology.device.torch_device)
        microbatches = task.microbatches(examples, int(topology.dp_sum(own)))
        with guard.skipping():
            guard.step([ModelUpdate(model, microbatches, task.loss, names, lr, task.reading)])
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
    groups = [own] if task.num_evaluated is None else batched(own, task.num_evaluated)
    for group in groups:
        microbatches = task.microbatches(group, task.size(examples))  # a coupled one needs every replica
        outputs = model.outputs(microbatches, task.reading) if microbatches else []
        with torch.no_grad():
            for output, microbatch in zip(outputs, microbatches, strict=True):
                total = add(total, task.loss(output, microbatch).metrics)
    return with_margin(reduce_over_replicas(total, topology))


def _store_scale(means: dict[str, float], num_pairs: int, hf_files: Path, topology: Topology) -> None:
    count = 2.0 * num_pairs
    mean, std = reward_statistics(count, count * means["mean_reward"], count * means["mean_squared_reward"])
    if not (math.isfinite(mean) and math.isfinite(std)):
        raise NotFiniteError(
            f"the reward model scores the held-out pairs with mean {mean} and std {std}, expected finite numbers; no "
            "checkpoint of this step is kept: lower the learning rate, or look at data.eval"
        )
    if topology.is_lead:
        note_in_config(hf_files, mean=mean, std=std)
    topology.barrier()


def _held_out(task: Task, data: schema.ExampleDataConfig, setup: Setup) -> Sequence[Example]:
    if not data.eval:
        return ()
    loaded = task.load(data.eval, setup.tokenizer, setup.limits, data.eval_samples, setup.eos)
    setup.admit(loaded)
    return loaded.items


def build_task(
    config: schema.OfflineStage, layout: Layout, model: TrainedModel, reference: FrozenModel | None
) -> Task:
    """The data, the loss and the outputs of a registered method, put together.

    Args:
        reference: None where the method has none.
    """
    method = ALGORITHMS[config.stage]
    assert isinstance(method, OfflineMethod)
    loss = method.build(config.algorithm).loss
    load_rated = partial(load_pairs, has_margins=reads_margins(config.algorithm))
    some = 16 * layout.micro  # what the reference says of all held-out examples may not fit in memory
    if method.examples == "demonstrations":
        return Task(
            load_demonstrations,
            _num_targets,
            partial(supervised_microbatches, layout=layout),
            loss,
            TOKENS,
            some,
        )
    if method.examples == "judgements":
        assert reference is not None
        return Task(load_judged, len, partial(_judged, model, reference, layout), loss, TOKENS, None)
    if method.outputs == "divergence":
        assert reference is not None
        build = partial(divergence_microbatches, reference=reference, layout=layout)
        return Task(load_rated, len, build, loss, divergence_from(reference), some)
    return Task(load_rated, len, partial(_pairs, reference, layout), loss, TOKENS, some)


def _num_targets(examples: Sequence[Demonstration]) -> int:
    return sum(len(e.response_ids) for e in examples)


def _pairs(
    reference: FrozenModel | None, layout: Layout, pairs: Sequence[PreferencePair], num_pairs: int
) -> list[Microbatch]:
    logp_ref_G2 = torch.zeros(len(pairs), 2, device=layout.device)
    if reference is not None:
        answers = [(p.prompt_ids, ids) for p in pairs for ids in (p.chosen_ids, p.rejected_ids)]
        logp_ref_G2 = response_logprobs(reference, answers, layout).view(-1, 2)
    return pair_microbatches(pairs, logp_ref_G2, num_pairs, layout)


def _judged(
    model: TrainedModel,
    reference: FrozenModel,
    layout: Layout,
    answers: Sequence[JudgedResponse],
    num_answers: int,
) -> list[Microbatch]:
    """KTO's baseline needs a forward of policy and reference on unrelated answers, before the step.

    All ranks must call it, also those of a replica without answers: the baseline is of the global batch.
    """
    unrelated = [(a.prompt_ids, a.unrelated_ids) for a in answers]
    gap_G = response_logprobs(model, unrelated, layout) - response_logprobs(reference, unrelated, layout)
    total = float(model.topology.dp_sum(gap_G.sum()))
    baseline = torch.tensor(kto.kl_baseline(total, num_answers), device=layout.device)
    own = [(a.prompt_ids, a.response_ids) for a in answers]
    logp_ref_G = response_logprobs(reference, own, layout)
    return judged_microbatches(answers, logp_ref_G, baseline, num_answers, layout)


def response_logprobs(
    model: Model, answers: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], layout: Layout
) -> Tensor:
    """Summed log-probs of each (prompt ids, response ids), [number of answers], nats, without gradients."""
    if not answers:
        return torch.zeros(0, device=layout.device)
    sequences = [(prompt_ids + response_ids, len(prompt_ids)) for prompt_ids, response_ids in answers]
    batches = sequence_batches(sequences, layout)
    return response_sums(model.token_outputs(batches), batches, sequences)
