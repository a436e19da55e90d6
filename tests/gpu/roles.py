"""Models, experience and micro-batches of one rank, on whatever device the tests run."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from engine.fixed_rollouts import rollouts
from tiny_models import SEQUENCES, write_llama
from torch import Tensor

from rto_megatron.algorithms import dpo, reward_model, rto, sft
from rto_megatron.algorithms.reinforcement import PolicyOptimization
from rto_megatron.config.rollouts import SamplingConfig
from rto_megatron.config.training import OptimizerConfig, PrecisionConfig, TrainParallelConfig
from rto_megatron.data.packing import Layout, pair_microbatches, supervised_microbatches
from rto_megatron.engine.build_roles import build_frozen, build_trained
from rto_megatron.engine.megatron import FrozenModel, Microbatch, TrainedModel
from rto_megatron.engine.source import find_source
from rto_megatron.engine.weights import local_parameters
from rto_megatron.models.parameters import parameter_map
from rto_megatron.models.weight_map import merge
from rto_megatron.parallel.topology import Topology
from rto_megatron.trainer.opinions import Roles
from rto_megatron.trainer.reward_source import ModelReward
from rto_megatron.trainer.reward_sum import alone
from rto_megatron.trainer.scoring import close_rollouts, score
from rto_megatron.trainer.update import optimizer_minibatches
from rto_megatron.types import (
    Demonstration,
    EndOfSequence,
    Experience,
    LossOutput,
    PreferencePair,
    ScoredRollouts,
)

EOS = 2
END = EndOfSequence((EOS,), EOS)
MEAN, STD = -0.25, 1.5  # of the scalar heads' outputs
ADAM = OptimizerConfig(lr=1e-3)
# The last one is longer than a tile of any attention kernel.
TEXTS = [*SEQUENCES, ([(7 * i * i + 3 * i) % 93 + 3 for i in range(200)], 30)]


@dataclass(frozen=True)
class Role:
    """How the model of a role is drawn."""

    seed: int
    is_scalar: bool
    is_tied: bool = False


ROLES = {
    "policy": Role(7, False),
    "dpo": Role(8, False),
    "reference": Role(9, False, is_tied=True),
    "reward": Role(10, True),
    "critic": Role(11, True),
}


@dataclass(frozen=True)
class HfModel:
    """A float32 model of Hugging Face on the CPU, and the folder that holds it."""

    folder: Path
    module: torch.nn.Module
    is_scalar: bool


def write_model(folder: Path, role: Role) -> HfModel:
    """Draws a tiny model; scalar heads get a mean and a standard deviation in config.json."""
    module = write_llama(folder, role.seed, is_tied=role.is_tied, is_scalar=role.is_scalar)
    if role.is_scalar:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "mean": MEAN, "std": STD}))
    return HfModel(folder, module, role.is_scalar)


def frozen(place: Topology, model: HfModel, dtype: str = "fp32") -> FrozenModel:
    """The model without gradients, on the device."""
    source = find_source(model.folder, model.is_scalar, is_random=False, key="test")
    return build_frozen("frozen", source, model.is_scalar, PrecisionConfig(dtype=dtype), place)


def trained(
    place: Topology,
    model: HfModel,
    optimizer: OptimizerConfig = ADAM,
    dtype: str = "fp32",
    is_distributed: bool = False,
    recompute: bool = False,
) -> TrainedModel:
    """The model with an optimizer, on the device."""
    source = find_source(model.folder, model.is_scalar, is_random=False, key="test")
    precision = PrecisionConfig(dtype=dtype, recompute=recompute)
    name = "critic" if model.is_scalar else "policy"
    parallel = TrainParallelConfig(distributed_optimizer=is_distributed)
    return build_trained(name, source, model.is_scalar, precision, optimizer, place, 1, parallel)


def whole(model: TrainedModel, value: Callable[[torch.nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """A tensor per parameter by Hugging Face name, on the CPU; `value` reads it off Megatron's parameter."""
    local, named = local_parameters(model.module), {}
    for mapped in parameter_map(model.shape, model.has_scalar_head):
        if not mapped.is_copy:
            shard = value(local[mapped.megatron]).detach().view(local[mapped.megatron].shape)
            named.update(zip(mapped.hf, merge(mapped.layout, [shard]), strict=True))
    return {name: tensor.cpu().clone() for name, tensor in named.items()}


def gradient(parameter: torch.nn.Parameter) -> Tensor:
    """What Megatron accumulated and the optimizer reads."""
    return parameter.main_grad


def master(parameter: torch.nn.Parameter) -> Tensor:
    """The optimizer's float32 copy, which the distributed optimizer keeps flat."""
    return parameter.main_param


@dataclass(frozen=True)
class Prepared:
    """Roles that were never stepped, and what they said about the fixed rollouts."""

    roles: Roles
    scored: ScoredRollouts
    experience: Experience
    algorithm: PolicyOptimization


def prepare_update(place: Topology, models: dict[str, HfModel], layout: Layout) -> Prepared:
    """Forwards of all five models, then credit; the policy and critic have moved on since, so that clips bite."""
    roles = Roles(
        policy=trained(place, models["policy"]),
        average=None,
        critic=trained(place, models["critic"]),
        reference=frozen(place, models["reference"]),
        reward=alone(ModelReward(frozen(place, models["reward"]), layout, END, "penalise"), place),
        dpo=frozen(place, models["dpo"]),
        dpo_reference=None,
    )
    algorithm = rto.build(rto.Config(), lambda _: frozenset())
    how = SamplingConfig(min_response_tokens=0)
    scored = score(close_rollouts(rollouts(), END, "penalise"), roles, layout, END, "penalise", how)
    experience = algorithm.credit(scored, 0.01, place.dp_sum)
    moved = replace(
        experience,
        logp_old_BR=experience.logp_old_BR + _noise(experience.logp_old_BR, seed=1),
        values_BR=experience.values_BR + _noise(experience.values_BR, seed=2),
    )
    return Prepared(roles, scored, moved, algorithm)


def _noise(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.3 * torch.randn(like.shape, generator=generator)).to(like.device)


@dataclass(frozen=True)
class Task:
    """The micro-batches of one optimizer step and their loss."""

    role: str
    microbatches: list[Microbatch]
    loss: Callable[[Tensor, Microbatch], LossOutput]
    names: list[list[str]]


def task(name: str, prepared: Prepared, place: Topology, layout: Layout) -> Task:
    """One step of a stage: sft, dpo, reward_model, rto_policy or rto_value."""
    if name in ("rto_policy", "rto_value"):
        algorithm = prepared.algorithm
        (one,) = optimizer_minibatches(prepared.experience, algorithm.config, 14, 1, place, layout, seed=1)
        if name == "rto_policy":
            return Task("policy", one.microbatches, algorithm.policy_loss, one.names)
        return Task("critic", one.microbatches, algorithm.value_loss, one.names)
    if name == "sft":
        data = [Demonstration(str(i), tuple(ids[:p]), tuple(ids[p:])) for i, (ids, p) in enumerate(TEXTS)]
        tokens = sum(len(one.response_ids) for one in data)
        batches = supervised_microbatches(data, tokens, layout)
        return Task("policy", batches, sft.SFT(sft.Config()).loss, [["x"]] * len(batches))
    pairs = [_pair(index, ids, prompt_len) for index, (ids, prompt_len) in enumerate(TEXTS)]
    logp_ref_G2 = torch.tensor([[-4.0 * len(p.chosen_ids), -4.1 * len(p.rejected_ids)] for p in pairs])
    batches = pair_microbatches(pairs, logp_ref_G2.to(layout.device), len(pairs), layout)
    if name == "dpo":
        return Task("policy", batches, dpo.DPO(dpo.Config()).loss, [["x"]] * len(batches))
    assert name == "reward_model"
    loss = reward_model.RewardModel(reward_model.Config(margin=True)).loss
    return Task("critic", batches, loss, [["x"]] * len(batches))


def _pair(index: int, ids: list[int], prompt_len: int) -> PreferencePair:
    rejected = [*reversed(ids[prompt_len:]), 5, EOS]
    return PreferencePair(
        str(index), tuple(ids[:prompt_len]), tuple(ids[prompt_len:]), tuple(rejected), 0.5 * index
    )
