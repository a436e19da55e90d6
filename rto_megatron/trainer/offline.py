"""The offline stages on one loop: SFT, reward model and preference methods differ in their data, loss and head."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import batched, chain
from pathlib import Path
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from rto_megatron.algorithms import ALGORITHMS, kto
from rto_megatron.algorithms.method import Method, OfflineMethod
from rto_megatron.algorithms.reward_model import reward_statistics
from rto_megatron.config import schema
from rto_megatron.config.facts import facts_of
from rto_megatron.config.inputs import ExampleDataConfig
from rto_megatron.config.learning_rate import learning_rate
from rto_megatron.config.source_names import Sources
from rto_megatron.data.budget import budget_fill
from rto_megatron.data.cut import Layout
from rto_megatron.data.grouping import own_share
from rto_megatron.data.load_report import Loaded
from rto_megatron.data.packing import (
    judged_microbatches,
    pair_microbatches,
    response_sums,
    sequence_batches,
    supervised_microbatches,
)
from rto_megatron.data.prepared import PreparedData
from rto_megatron.data.vocabulary import vocabulary_of
from rto_megatron.engine.absent import FrozenRole, RoleModel, TrainedRole
from rto_megatron.engine.build_roles import place_frozen, place_trained
from rto_megatron.engine.divergence import divergence_from, divergence_microbatches
from rto_megatron.engine.exchange import add
from rto_megatron.engine.megatron import TOKENS, FrozenModel, Loss, Microbatch
from rto_megatron.engine.offload import HostMemory, host_memory
from rto_megatron.engine.readings import Reading
from rto_megatron.lifecycle.start_up import begin_part
from rto_megatron.parallel.dealing import shared_out
from rto_megatron.parallel.topology import Topology
from rto_megatron.reporting.metrics import with_margin
from rto_megatron.reporting.progress import say
from rto_megatron.trainer.feed import feed, go_on
from rto_megatron.trainer.guard import ModelUpdate, NotFiniteError
from rto_megatron.trainer.model_files import give_own_padding
from rto_megatron.trainer.parts import planned_parts
from rto_megatron.trainer.reference import note_reference
from rto_megatron.trainer.resume import LoopState
from rto_megatron.trainer.role_shares import packed_for
from rto_megatron.trainer.run import Run, reduce_over_replicas
from rto_megatron.trainer.setup import Setup, note_in_config, prepare_stage, stage_hf_files
from rto_megatron.types import (
    Demonstration,
    DivergenceMicrobatch,
    Example,
    JudgedMicrobatch,
    JudgedResponse,
    LossOutput,
    Metrics,
    PairMicrobatch,
    PreferencePair,
    SupervisedMicrobatch,
)

_EVALUATED_AT_A_TIME = 16  # micro-batches

_Answer = tuple[tuple[int, ...], tuple[int, ...]]  # ids of the prompt and of the response
# (prepared data, sources, rows to read or None for all)
type Load[E: Example] = Callable[[PreparedData, Sources, int | None], Loaded[E]]


@dataclass(frozen=True)
class Task[E: Example, M: Microbatch]:
    """What one offline stage does with a global batch of examples E, as micro-batches M.

    Example:
        microbatches = task.microbatches(examples, step)
    """

    load: Load[E]
    size: Callable[[Sequence[E]], int]  # response tokens, pairs or answers: what a loss is divided by
    microbatches: Callable[[Sequence[E], int], list[M]]  # of a share, given the size of the whole
    loss: Callable[[Tensor, M], LossOutput]
    reading: Reading[M]  # what the loss sees of the model
    groups: Callable[[Sequence[E]], list[list[int]]]  # numbers of a share's examples in each micro-batch
    is_coupled: bool  # the loss of an example needs the whole batch, on every replica


@dataclass(frozen=True)
class Trainee:
    """The model in training and what it is compared with.

    Example:
        Trainee("policy", model, reference=None, memory=HostMemory())
    """

    role: str
    model: TrainedRole
    reference: FrozenRole | None  # None where the method has none
    memory: HostMemory  # what of both waits there


class UsesTask(Protocol):
    """Does something with the task of a stage, whatever its examples and micro-batches are.

    Example:
        with_task(config, setup, trainee, use)
    """

    def __call__[E: Example, M: Microbatch](self, task: Task[E, M]) -> None:
        """Called once."""
        ...


def train_offline(config: schema.OfflineStage, topology: Topology) -> None:
    """Trains SFT, a reward model or a preference method to the end of the run, from the last checkpoint if any."""
    setup = prepare_stage(config, topology)
    trainee = build_trainee(config, setup)
    with_task(config, setup, trainee, _Trained(config, setup, trainee))


def with_task(config: schema.OfflineStage, setup: Setup, trainee: Trainee, use: UsesTask) -> None:
    """Hands over what the stage does with its examples."""
    method, layout = ALGORITHMS[config.stage], setup.layout
    if _reads_demonstrations(method):
        use(demonstration_task(method.build(config.algorithm).loss, layout))
    elif _reads_judgements(method):
        use(judgement_task(method.build(config.algorithm).loss, layout, trainee))
    elif _reads_pairs(method):
        load = partial(PreparedData.pairs, has_margins=facts_of(config).reads_margins)
        loss = method.build(config.algorithm).loss
        if method.outputs == "divergence":
            use(divergence_task(load, loss, layout, trainee))
        else:
            use(pair_task(load, loss, layout, trainee))


def _reads_demonstrations(method: Method) -> TypeGuard[OfflineMethod[SupervisedMicrobatch]]:
    return isinstance(method, OfflineMethod) and method.examples == "demonstrations"


def _reads_pairs(method: Method) -> TypeGuard[OfflineMethod[PairMicrobatch]]:
    return isinstance(method, OfflineMethod) and method.examples == "pairs"


def _reads_judgements(method: Method) -> TypeGuard[OfflineMethod[JudgedMicrobatch]]:
    return isinstance(method, OfflineMethod) and method.examples == "judgements"


def build_trainee(config: schema.OfflineStage, setup: Setup) -> Trainee:
    """The model in training and its reference, where it has one; all ranks must call it."""
    begin_part("models")
    is_reward, sources = facts_of(config).is_reward_model, setup.sources
    role = "reward" if is_reward else "policy"
    model = place_trained(
        config, role, sources["policy"], is_reward, config.optimizer, setup.topology, is_head_fresh=is_reward
    )
    reference = None
    if "reference" in sources:
        of_reference = setup.topology.of("reference")
        reference = place_frozen("reference", sources["reference"], False, config.precision, of_reference)
    models: dict[str, RoleModel] = (
        {role: model} if reference is None else {role: model, "reference": reference}
    )
    memory = host_memory(config.offload, models, lambda text: say(text, setup.topology.is_lead))
    return Trainee(role, model, reference, memory)


@dataclass(frozen=True)
class _Trained:
    config: schema.OfflineStage
    setup: Setup
    trainee: Trainee

    def __call__[E: Example, M: Microbatch](self, task: Task[E, M]) -> None:
        _train(self.config, self.setup, self.trainee, task)


def _train[E: Example, M: Microbatch](
    config: schema.OfflineStage, setup: Setup, trainee: Trainee, task: Task[E, M]
) -> None:
    topology, role, model = setup.topology, trainee.role, trainee.model
    is_reward = facts_of(config).is_reward_model
    begin_part("data")
    data = task.load(setup.prepared, config.data.train, None)
    setup.admit(data)
    batches = feed(data, config.batch.train, config.run.seed, topology, setup.cost)
    held_out = _held_out(task, config.data, setup)
    hf_files = stage_hf_files(setup.sources["policy"], config.run.dir, role, topology, setup.eos)
    if is_reward:
        used_ids = vocabulary_of(data.items) | vocabulary_of(held_out)
        give_own_padding(hf_files, used_ids, topology)
    if trainee.reference is not None:
        note_reference(hf_files, trainee.reference)
    run = Run(
        config, topology, {role: model}, {role: hf_files}, config.run.steps or batches.batches_per_epoch,
        trainee.memory,
    )  # fmt: skip
    guard = planned_parts().guard(run, config.run.max_skipped_updates, topology)
    if run.state is not None:
        go_on(batches, run.state.data, "data.train", topology)
    for step in run.steps():
        examples = batches.next_batch()
        lr = learning_rate(config.optimizer, step, run.num_steps)
        names = [[examples[number].id for number in group] for group in task.groups(examples)]
        own = torch.tensor(float(task.size(examples)), device=topology.device.torch_device)
        trainee.memory.enter("score")
        microbatches = task.microbatches(examples, int(topology.dp_sum(own)))
        run.record(budget_fill([micro.batch for micro in microbatches], setup.layout))
        with guard.skipping():
            trainee.memory.enter("update")
            guard.step([ModelUpdate(model, microbatches, task.loss, names, lr, task.reading)])
        evaluation: dict[str, float] = {}
        if held_out and (
            run.is_due(config.run.eval_every, step + 1) or (is_reward and run.is_saved(step + 1))
        ):
            trainee.memory.enter("score")
            evaluation = evaluate(model, task, held_out, topology, setup.cost)
            say("eval  " + "  ".join(f"{k} {v:.4g}" for k, v in evaluation.items()), topology.is_lead)
        if is_reward and run.is_saved(step + 1):
            _store_scale(evaluation, len(held_out), hf_files, topology)
        run.record(trainee.memory.measured())
        run.log({"lr": lr, **{f"eval/{k}": v for k, v in evaluation.items()}})
        run.finish(LoopState(batches.state()))
    run.close(role)


def evaluate[E: Example, M: Microbatch](
    model: TrainedRole,
    task: Task[E, M],
    examples: Sequence[E],
    topology: Topology,
    cost: Callable[[E], float] | None,
) -> dict[str, float]:
    """Means of the loss's metrics over held-out examples, without gradients; all ranks must call it.

    Args:
        examples: all of them; a replica takes its share, which is empty when there are fewer than replicas.
        cost: of an example, by which replicas share them; None: all the same.
    """
    total: Metrics = {}
    own = own_share(examples, topology.data_rank, topology.data_size, cost)
    # What the reference says of all held-out examples may not fit in memory.
    some = (
        [own]
        if task.is_coupled
        else [
            [own[number] for number in chain.from_iterable(groups)]
            for groups in batched(task.groups(own), _EVALUATED_AT_A_TIME)
        ]
    )
    # Every replica may be needed: for a loss of the whole batch, or by a reference of another layout.
    most = max(topology.gather(len(some), int))
    for group in [*some, *([[]] * (most - len(some)))]:
        microbatches = task.microbatches(group, task.size(examples))
        is_called = microbatches or model.topology.is_exchanging
        outputs = model.outputs(microbatches, task.reading) if is_called else []
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


def _held_out[E: Example, M: Microbatch](
    task: Task[E, M], data: ExampleDataConfig, setup: Setup
) -> Sequence[E]:
    if not data.eval:
        return ()
    loaded = task.load(setup.prepared, data.eval, data.eval_samples)
    setup.admit(loaded)
    return loaded.items


def demonstration_task(
    loss: Loss[SupervisedMicrobatch], layout: Layout
) -> Task[Demonstration, SupervisedMicrobatch]:
    """The data, the loss and the outputs of supervised learning, put together."""
    build = partial(supervised_microbatches, layout=layout)
    return Task(
        PreparedData.demonstrations, _num_targets, build, loss, TOKENS, layout.groups_of, is_coupled=False
    )


def judgement_task(
    loss: Loss[JudgedMicrobatch], layout: Layout, trainee: Trainee
) -> Task[JudgedResponse, JudgedMicrobatch]:
    """The task of answers with verdicts."""
    assert trainee.reference is not None
    build = partial(_judged, trainee.model, trainee.reference, layout)
    return Task(PreparedData.judged, len, build, loss, TOKENS, layout.groups_of, is_coupled=True)


def pair_task(
    load: Load[PreferencePair], loss: Loss[PairMicrobatch], layout: Layout, trainee: Trainee
) -> Task[PreferencePair, PairMicrobatch]:
    """The task of pairs and a loss on log-probs or values."""
    build = partial(_pairs, trainee.reference, layout)
    return Task(load, len, build, loss, TOKENS, layout.groups_of, is_coupled=False)


def divergence_task(
    load: Load[PreferencePair], loss: Loss[PairMicrobatch], layout: Layout, trainee: Trainee
) -> Task[PreferencePair, DivergenceMicrobatch]:
    """The task of pairs and a loss on whole distributions."""
    assert isinstance(trainee.reference, FrozenModel), "checked: its reference has the policy's layout"
    build = partial(divergence_microbatches, reference=trainee.reference, layout=layout)
    reading = divergence_from(trainee.reference)
    return Task(load, len, build, loss, reading, layout.groups_of, is_coupled=False)


def _num_targets(examples: Sequence[Demonstration]) -> int:
    return sum(example.num_learnt for example in examples)


def _pairs(
    reference: FrozenRole | None, layout: Layout, pairs: Sequence[PreferencePair], num_pairs: int
) -> list[PairMicrobatch]:
    logp_ref_G2 = torch.zeros(len(pairs), 2, device=layout.device)
    if reference is not None:
        logp_ref_G2 = _pair_logprobs(reference, pairs, layout)
    return pair_microbatches(pairs, logp_ref_G2, num_pairs, layout)


def _judged(
    model: TrainedRole,
    reference: FrozenRole,
    layout: Layout,
    answers: Sequence[JudgedResponse],
    num_answers: int,
) -> list[JudgedMicrobatch]:
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


def _pair_logprobs(model: RoleModel, pairs: Sequence[PreferencePair], layout: Layout) -> Tensor:
    """As `response_logprobs`, of the chosen and of the rejected answer: [number of pairs, 2]."""
    if not layout.shares_prompts:
        answers = [(p.prompt_ids, ids) for p in pairs for ids in (p.chosen_ids, p.rejected_ids)]
        return response_logprobs(model, answers, layout).view(-1, 2)
    share = shared_out(list(pairs), list[PreferencePair], model.topology)
    if not share.items and not model.topology.is_exchanging:
        return torch.zeros(0, 2, device=layout.device)
    answers = [(p.prompt_ids, ids) for p in share.items for ids in (p.chosen_ids, p.rejected_ids)]
    return share.back(_summed(model, answers, layout.for_pairs).view(-1, 2))


def response_logprobs(model: RoleModel, answers: Sequence[_Answer], layout: Layout) -> Tensor:
    """Summed log-probs of each (prompt ids, response ids), [number of answers], nats, without gradients.

    With a layout of the model's own all ranks must call it.
    """
    share = shared_out(list(answers), list[_Answer], model.topology)
    if not share.items and not model.topology.is_exchanging:
        return torch.zeros(0, device=layout.device)
    return share.back(_summed(model, share.items, layout))


def _summed(model: RoleModel, answers: Sequence[_Answer], layout: Layout) -> Tensor:
    sequences = [(prompt_ids + response_ids, len(prompt_ids)) for prompt_ids, response_ids in answers]
    cut = sequence_batches(sequences, packed_for(model.topology, layout))
    return response_sums(model.token_outputs(cut.batches), cut, sequences)
