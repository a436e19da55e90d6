"""TRL's own loss functions as oracles, called unbound with the few attributes that they read.

TRL's trainers want a model, a tokenizer, a data set and an accelerator. Their losses only want the log-probs that
the model returns: a function stands in for it, and one process for the accelerator.
"""

import os
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # the import below warns otherwise

from trl import import_utils
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

_ALONE = SimpleNamespace(
    device=torch.device("cpu"),
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
    num_processes=1,
    sync_gradients=False,
)


def _trainer(**attributes: object) -> SimpleNamespace:
    return SimpleNamespace(
        accelerator=_ALONE,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def _outputs(logp_ST: Tensor) -> SimpleNamespace:
    return SimpleNamespace(
        log_probs=logp_ST,
        entropy=torch.zeros_like(logp_ST),
        mean_logits=torch.zeros_like(logp_ST),
        is_top1=torch.zeros_like(logp_ST, dtype=torch.bool),
    )


def _one_token_each(logp_S: Tensor) -> dict[str, Tensor]:
    """Sequences of a prompt token and a response token, whose log-prob is then the answer's."""
    ids_S2 = torch.ones(len(logp_S), 2, dtype=torch.int64)
    mask_S2 = torch.tensor([[0, 1]]).expand(len(logp_S), -1)
    return {"input_ids": ids_S2, "attention_mask": torch.ones_like(ids_S2), "completion_mask": mask_S2}


def trl_dpo(logp_S: Tensor, logp_ref_S: Tensor, loss: str, beta: float) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of `DPOTrainer._compute_loss` for answers of one token, the chosen half first."""
    trainer = _trainer(
        loss_types=[loss],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
    )
    chosen, rejected = logp_ref_S.chunk(2)
    inputs = {**_one_token_each(logp_S), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss_mean = DPOTrainer._compute_loss(
        trainer, lambda **_: _outputs(logp_S[:, None]), inputs, return_outputs=False
    )
    return loss_mean, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def trl_cpo(
    logp_S: Tensor, loss: str, beta: float, label_smoothing: float = 0.0, gamma: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, chosen and rejected rewards [P] of `CPOTrainer.cpo_loss`, the chosen half of `logp_S` first."""
    trainer = _trainer(
        loss_type=loss, beta=beta, label_smoothing=label_smoothing, simpo_gamma=gamma, alpha=0.0
    )
    return CPOTrainer.cpo_loss(trainer, *logp_S.chunk(2))


def trl_kto(
    logp_S: Tensor,
    logp_ref_S: Tensor,
    unrelated_logp_S: Tensor,
    unrelated_logp_ref_S: Tensor,
    is_desirable_S: Tensor,
    beta: float,
    weights: tuple[float, float],
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of `KTOTrainer._compute_loss`, its estimate of the KL included; answers have one token."""
    trainer = _trainer(
        loss_type="kto",
        calculate_KL=True,
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    trainer._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, trainer)
    unrelated = {f"KL_{name}": x for name, x in _one_token_each(unrelated_logp_S).items()}
    inputs = {
        **_one_token_each(logp_S),
        **unrelated,
        "label": is_desirable_S,
        "ref_logps": logp_ref_S,
        "ref_KL_logps": unrelated_logp_ref_S,
    }

    def model(input_ids: Tensor, **_: object) -> SimpleNamespace:
        is_unrelated = input_ids is unrelated["KL_input_ids"]
        return _outputs((unrelated_logp_S if is_unrelated else logp_S)[:, None])

    loss_mean = KTOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    return loss_mean, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def _grpo_trainer() -> type:
    """TRL's trainer without vLLM: its import takes long and starts threads, and other tests fork this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_utils, "is_vllm_available", lambda min_version=None: False)
        from trl.trainer.grpo_trainer import GRPOTrainer
    return GRPOTrainer


def trl_rloo(logp_BR: Tensor, logp_old_BR: Tensor, advantages_B: Tensor, mask_BR: Tensor) -> Tensor:
    """The loss of `RLOOTrainer._compute_loss`: the ratio of whole responses, clipped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_utils, "is_vllm_available", lambda min_version=None: False)
        from trl.trainer.rloo_trainer import RLOOTrainer
    trainer = _trainer(
        epsilon_low=0.2,
        epsilon_high=0.2,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp_BR, torch.zeros_like(logp_BR), None),
    )
    ids_BR = torch.ones(mask_BR.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids_BR[:, :1],
        "prompt_mask": ids_BR[:, :1],
        "completion_ids": ids_BR,
        "completion_mask": mask_BR.long(),
        "advantages": advantages_B,
        "old_logps": logp_old_BR.sum(1),
    }
    return RLOOTrainer._compute_loss(trainer, None, inputs)


def trl_grpo(
    logp_BR: Tensor,
    logp_old_BR: Tensor,
    logp_ref_BR: Tensor,
    advantages_B: Tensor,
    mask_BR: Tensor,
    beta: float,
    clip_eps: float,
    loss_type: str = "grpo",
    epsilon_high: float | None = None,
    level: str = "token",
    delta: float | None = None,
    longest: int = 0,
    entropy_coef: float = 0.0,
    entropies_BR: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of `GRPOTrainer._compute_loss`.

    Args:
        delta: TRL's two-sided clip; above 1 + epsilon_high it is the dual clip.
        longest: `max_completion_length`, which loss_type "dr_grpo" divides by.
    """
    trainer = _trainer(
        loss_type=loss_type,
        beta=beta,
        epsilon_low=clip_eps,
        epsilon_high=clip_eps if epsilon_high is None else epsilon_high,
        importance_sampling_level=level,
        max_completion_length=longest,
        entropy_coef=entropy_coef,
        use_adaptive_entropy=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=entropy_coef != 0,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=delta, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            logp_BR,
            torch.zeros_like(logp_BR) if entropies_BR is None else entropies_BR,
            None,
        ),
    )
    ids_BR = torch.ones(mask_BR.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids_BR[:, :1],
        "prompt_mask": ids_BR[:, :1],
        "completion_ids": ids_BR,
        "completion_mask": mask_BR.long(),
        "advantages": advantages_B,
        "old_per_token_logps": logp_old_BR,
        "ref_per_token_logps": logp_ref_BR,
        "num_items_in_batch": mask_BR.sum(),
    }
    loss = _grpo_trainer()._compute_loss(trainer, None, inputs)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}
