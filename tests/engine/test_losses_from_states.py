"""Losses on log-probs, entropies and divergences that never see logits give the gradients of a loss on all logits."""

from pathlib import Path

import pytest
import torch
from engine.fixed_rollouts import rollouts
from engine.layouts import LAYOUTS, frozen, topology, trained
from engine.whole_tensors import whole
from ranks import run_ranks
from tiny_models import write_llama
from torch import Tensor

from rto_megatron.algorithms import dpo, tdpo
from rto_megatron.config.training import OptimizerConfig
from rto_megatron.data.packing import Layout, pair_microbatches, response_mask, rollout_batches
from rto_megatron.data.packing import scatter_to_positions as at_positions
from rto_megatron.engine.divergence import divergence_from, divergence_microbatches
from rto_megatron.engine.megatron import ENTROPIES, TOKENS
from rto_megatron.types import Ban, Distribution, LossOutput, PreferencePair, SupervisedMicrobatch, TokenBatch

VOCAB_SIZE, BANNED = 97, (2, 95)
PAIRS = [
    PreferencePair(str(n), chosen.prompt_ids, chosen.response_ids, rejected.response_ids, 1.0)
    for n, (chosen, rejected) in enumerate(zip(rollouts()[::2], rollouts()[1::2], strict=True))
]
DRAWN = Distribution(0.7, Ban(BANNED, 5))
DPO, TDPO = dpo.DPO(dpo.Config(beta=0.5)), tdpo.TDPO(tdpo.Config(beta=0.5))
KINDS = ("dpo", "tdpo", "entropy")


def _layout(multiple_of: int = 1, is_shared: bool = False) -> Layout:
    """Padded rows, or packed ones in which prompts stand once."""
    return Layout(2, is_shared, multiple_of, torch.device("cpu"), shares_prompts=is_shared)


def _drawn(layout: Layout) -> list[SupervisedMicrobatch]:
    """Micro-batches of responses with a weight for every token."""
    cut, made = rollout_batches(rollouts(), layout, DRAWN), []
    for batch, numbers in zip(cut.batches, cut.groups, strict=True):
        some = [rollouts()[number] for number in numbers]
        mask_BR = response_mask(some, layout.device)
        weights_BR = mask_BR * torch.arange(1, mask_BR.shape[1] + 1) / 100
        lengths = ([len(r.prompt_ids) for r in some], [len(r.response_ids) for r in some])
        made.append(SupervisedMicrobatch(batch, at_positions(weights_BR, batch, *lengths)))
    return made


def _entropy_loss(outputs_2T: Tensor, micro: SupervisedMicrobatch) -> LossOutput:
    """Not linear in log-probs, so that gradients depend on what was read."""
    ratio_T = (outputs_2T[0] / 4).exp()
    return LossOutput((micro.weight_T * (0.3 * outputs_2T[1] - ratio_T)).sum())


def _of_rank(layout_name: str, root: Path, is_shared: bool) -> dict[str, dict[str, Tensor]]:
    """Gradients of each kind of loss, whole."""
    place, found = topology(layout_name), {}
    optimizer = OptimizerConfig(kind="sgd", lr=0.5, max_grad_norm=None)
    policy, reference = (
        trained(place, root / "policy", False, optimizer),
        frozen(place, root / "reference", False),
    )
    layout = _layout(place.row_multiple, is_shared)
    for kind in KINDS:
        if kind == "dpo":
            steps = pair_microbatches(PAIRS, torch.zeros(len(PAIRS), 2), len(PAIRS), layout)
            loss, reading = DPO.loss, TOKENS
        elif kind == "tdpo":
            steps = divergence_microbatches(PAIRS, len(PAIRS), reference, layout)
            loss, reading = TDPO.loss, divergence_from(reference)
        else:
            steps, loss, reading = _drawn(layout), _entropy_loss, ENTROPIES
        policy.gradients(steps, loss, [["x"]] * len(steps), reading)
        found[kind] = whole(policy, lambda p: p.main_grad)
    return found if place.tensor_rank == 0 else {}


def _logp(model: torch.nn.Module, batch: TokenBatch) -> Tensor:
    """Log-softmax of all logits, less what is banned: [T, V]."""
    logits_TV = model(batch.tokens_T.view(batch.num_rows, -1)).logits.flatten(0, 1) / batch.temperature
    if batch.banned is not None:
        is_out_TV = torch.zeros_like(logits_TV, dtype=torch.bool)
        is_out_TV[:, list(batch.banned.ids)] = batch.banned.is_banned_T[:, None]
        logits_TV = logits_TV.masked_fill(is_out_TV, -1e9)
    return logits_TV.log_softmax(-1)


def _plain(kind: str, policy: torch.nn.Module, reference: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients by autograd through all logits of transformers' model."""
    policy.zero_grad()
    layout = _layout()
    pairs = pair_microbatches(PAIRS, torch.zeros(len(PAIRS), 2), len(PAIRS), layout)
    for micro in _drawn(layout) if kind == "entropy" else pairs:
        logp_TV, at = _logp(policy, micro.batch), micro.batch.targets_T[:, None]
        logp_T = logp_TV.gather(1, at)[:, 0]
        if kind == "dpo":
            loss = DPO.loss(logp_T, micro)
        elif kind == "tdpo":
            ref_TV = _logp(reference, micro.batch).detach()
            kl_T = (ref_TV.exp() * (ref_TV - logp_TV)).sum(-1)
            loss = TDPO.loss(torch.stack([logp_T, ref_TV.gather(1, at)[:, 0], kl_T]), micro)
        else:
            entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
            loss = _entropy_loss(torch.stack([logp_T, entropy_T]), micro)
        loss.loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("is_tied", [False, True], ids=["apart", "tied"])
def test_gradients_are_those_of_all_logits(is_tied: bool, tmp_path: Path) -> None:
    policy = write_llama(tmp_path / "policy", 7, VOCAB_SIZE, is_tied)
    reference = write_llama(tmp_path / "reference", 8, VOCAB_SIZE, is_tied)
    want = {kind: _plain(kind, policy, reference) for kind in KINDS}
    for layout in ("one",) if is_tied else ("one", "tp2", "tp2_sp"):
        is_shared = layout == "tp2_sp" or (layout == "one" and not is_tied)
        found = run_ranks(LAYOUTS[layout][0], _of_rank, layout, tmp_path, is_shared)[0]
        for kind in KINDS:
            assert found[kind].keys() == want[kind].keys()
            apart = {
                name: float((found[kind][name] - grad).norm() / grad.norm())
                for name, grad in want[kind].items()
            }
            print(
                f"{layout} {kind}: {max(apart.values()):.1e} of the gradient of {max(apart, key=apart.get)}"
            )
            assert max(apart.values()) < 1e-5
