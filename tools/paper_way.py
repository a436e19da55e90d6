"""A step of RTO as the paper's released code takes it, on Hugging Face's models: what tools/benchmark_rto.py measures.

Left-padded prompts are continued by `generate` with its key-value cache; policy, reference, reward model, DPO model and
critic read the padded sequences whole, with logits of every position; one pass of PPO over all of them trains policy
and critic. The DPO model's reference is the policy's, whose forward is shared. Several processes share the prompts and
add gradients.

Source: OpenRLHF 0.4.4 as of github.com/zkshan2002/RTO (trainer/ppo_utils/experience_maker.py, trainer/ppo_trainer.py).
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import batched, pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

_BETA_DPO, _BETA_KL, _DPO_CLIP, _CLIP, _LAM = 0.05, 0.01, 0.05, 0.2, 0.95
_PAD, _EOS = 0, 2


@dataclass(frozen=True)
class Sequences:
    """Left-padded prompts with right-padded responses, and what is known of them: [B, T] and [B, R]."""

    ids_BT: Tensor
    mask_BT: Tensor
    actions_BR: Tensor  # 1 on response tokens


@dataclass(frozen=True)
class Known:
    """What a step knows of its responses before it updates, [B, R]."""

    logp_BR: Tensor
    values_BR: Tensor
    advantages_BR: Tensor
    returns_BR: Tensor


class PaperWay:
    """Five models and two optimizers of one rank.

    Args:
        folders: role -> folder; policy, reference, reward, dpo, critic.
        prompts: token ids of this rank's prompts.
        micro: sequences of a forward.
    """

    def __init__(self, folders: dict[str, Path], prompts: list[list[int]], micro: int, tokens: int) -> None:
        self._prompts, self._micro, self._tokens = prompts, micro, tokens
        language = {
            role: AutoModelForCausalLM.from_pretrained(folders[role])
            for role in ("policy", "reference", "dpo")
        }
        scalar = {
            role: AutoModelForSequenceClassification.from_pretrained(folders[role], num_labels=1)
            for role in ("reward", "critic")
        }
        self._models: dict[str, nn.Module] = {**language, **scalar}
        self._optimizers = {
            role: torch.optim.AdamW(self._models[role].parameters(), lr=1e-6, fused=True)
            for role in ("policy", "critic")
        }

    def step(self) -> dict[str, float]:
        """Seconds by part, and the mean number of response tokens."""
        times = [time.monotonic()]
        with torch.no_grad():
            made = self._generated()
            times.append(time.monotonic())
            known = self._scored(made)
            times.append(time.monotonic())
        self._update(made, known)
        times.append(time.monotonic())
        sample, score, update = (end - start for start, end in pairwise(times))
        tokens = float(made.actions_BR.sum()) / len(made.ids_BT)
        return {
            "step": times[-1] - times[0],
            "sample": sample,
            "score": score,
            "update": update,
            "tokens": tokens,
        }

    def _generated(self) -> Sequences:
        width = max(map(len, self._prompts))
        ids_BP = torch.tensor([[_PAD] * (width - len(one)) + one for one in self._prompts])
        known_BP = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in self._prompts])
        ids_BT = self._models["policy"].generate(  # type: ignore[operator]  # transformers declares it on a mixin
            input_ids=ids_BP, attention_mask=known_BP, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=self._tokens, eos_token_id=_EOS, pad_token_id=_PAD,
        )  # fmt: skip
        response_BR = ids_BT[:, width:]
        is_end_BR = (response_BR == _EOS).long()
        actions_BR = (is_end_BR.cumsum(1) - is_end_BR == 0).long()
        return Sequences(ids_BT, torch.cat([known_BP, actions_BR], 1), actions_BR)

    def _parts(self, made: Sequences) -> Iterator[Tensor]:
        """Rows of each forward."""
        for rows in batched(range(len(made.ids_BT)), self._micro):
            yield torch.tensor(rows)

    def _forward(self, role: str, made: Sequences, rows: Tensor) -> Tensor:
        """Log-probs of the responses' tokens, or values before them, [rows, R]."""
        ids, mask, width = made.ids_BT[rows], made.mask_BT[rows], made.actions_BR.shape[1]
        places = (mask.cumsum(1) - 1).clamp(min=0)
        model = self._models[role]
        if role in ("critic", "reward"):
            hidden = model.get_submodule("model")(input_ids=ids, attention_mask=mask, position_ids=places)[0]
            values: Tensor = model.get_submodule("score")(hidden).squeeze(-1)
            return values[:, -width - 1 : -1] if role == "critic" else values
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        logp: Tensor = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return logp[:, -width:]

    def _scored(self, made: Sequences) -> Known:
        said = {
            role: torch.cat([self._forward(role, made, rows) for rows in self._parts(made)])
            for role in self._models
        }
        actions = made.actions_BR.float()
        last_B = made.actions_BR.sum(1, keepdim=True) - 1
        score_B = said["reward"].gather(1, made.ids_BT.shape[1] - made.actions_BR.shape[1] + last_B)
        dpo_BR = (_BETA_DPO * (said["dpo"] - said["reference"])).clamp(-_DPO_CLIP, _DPO_CLIP)
        rewards_BR = dpo_BR - _BETA_KL * (said["policy"] - said["reference"])
        rewards_BR = (rewards_BR * actions).scatter_add(1, last_B, score_B.clamp(-10, 10))
        values_BR = said["critic"] * actions
        advantages_BR, running_B = torch.zeros_like(values_BR), torch.zeros(len(values_BR))
        for place in reversed(range(values_BR.shape[1])):
            behind_B = (
                values_BR[:, place + 1] if place + 1 < values_BR.shape[1] else torch.zeros(len(values_BR))
            )
            running_B = rewards_BR[:, place] + behind_B - values_BR[:, place] + _LAM * running_B
            advantages_BR[:, place] = running_B
        returns_BR = advantages_BR + values_BR
        own = torch.stack(
            [(x * actions).sum() for x in (advantages_BR, advantages_BR**2, torch.ones_like(actions))]
        )
        dist.all_reduce(own)
        mean = own[0] / own[2]
        whitened_BR = (advantages_BR - mean) * (own[1] / own[2] - mean**2 + 1e-8).rsqrt()
        return Known(said["policy"], values_BR, whitened_BR, returns_BR)

    def _update(self, made: Sequences, known: Known) -> None:
        def policy_loss(logp: Tensor, rows: Tensor) -> Tensor:
            ratio = (logp - known.logp_BR[rows]).exp()
            gain = known.advantages_BR[rows]
            return -torch.min(ratio * gain, ratio.clamp(1 - _CLIP, 1 + _CLIP) * gain)

        def value_loss(values: Tensor, rows: Tensor) -> Tensor:
            old, wanted = known.values_BR[rows], known.returns_BR[rows]
            clipped = old + (values - old).clamp(-_CLIP, _CLIP)
            return 0.5 * torch.max((values - wanted) ** 2, (clipped - wanted) ** 2)

        losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"policy": policy_loss, "critic": value_loss}
        for role, loss in losses.items():
            for rows in self._parts(made):
                mask = made.actions_BR[rows].float()
                per_token = loss(self._forward(role, made, rows), rows)
                per_sequence = (per_token * mask).sum(1) / mask.sum(1)
                (per_sequence.sum() / (len(self._prompts) * dist.get_world_size())).backward()
            self._stepped(role)

    def _stepped(self, role: str) -> None:
        parameters = list(self._models[role].parameters())
        gradients = [one.grad for one in parameters if one.grad is not None]
        if dist.get_world_size() > 1:
            flat = torch.cat([one.flatten() for one in gradients])
            dist.all_reduce(flat)
            for one, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                one.copy_(total.view_as(one))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self._optimizers[role].step()
        self._optimizers[role].zero_grad()


def run(
    folders: dict[str, Path], prompts: Iterable[list[int]], steps: int, micro: int, tokens: int, out: Path
) -> None:
    """One rank; the first writes the seconds of all steps."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    way = PaperWay(folders, list(prompts)[rank::size], micro, tokens)
    found = []
    for _ in range(steps):
        dist.barrier()
        found.append(way.step())
    if rank == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()
