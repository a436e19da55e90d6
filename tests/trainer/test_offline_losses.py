"""First steps of stages on data, from files to the gradient, against slow loops over Hugging Face's log-probs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.nn.functional import logsigmoid
from trainer.tiny_runs import configure, train, write_rows
from transformers import LlamaForCausalLM

from rto_megatron.data.limits import Limits
from rto_megatron.data.loader import load_demonstrations, load_judged, load_pairs
from rto_megatron.data.tokenizer import load_tokenizer
from rto_megatron.reporting.metrics import read_metrics

BETA = 0.5
LIMITS = Limits(max_prompt_tokens=100, max_length=200, overlong="error")
type Ids = tuple[int, ...]


class Models:
    """Policy and reference as Hugging Face computes them."""

    def __init__(self, files: Path, policy: str = "policy", reference: str = "reference") -> None:
        self.policy, self._reference = (
            LlamaForCausalLM.from_pretrained(files / "models" / name, attn_implementation="eager")
            for name in (policy, reference)
        )

    def distributions(self, prompt: Ids, answer: Ids) -> tuple[Tensor, Tensor]:
        """log pi and log pi_ref of every token at each position of an answer."""
        ids = torch.tensor([[*prompt, *answer]])
        own, other = (
            model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for model in (self.policy, self._reference)
        )
        return own, other.detach()

    def log_ratio(self, prompt: Ids, answer: Ids) -> Tensor:
        """log(pi / pi_ref) of an answer."""
        own, other = self.distributions(prompt, answer)
        return (own - other).gather(1, torch.tensor(answer)[:, None]).sum()

    def divergence(self, prompt: Ids, answer: Ids) -> Tensor:
        """The sum over an answer's positions of KL(pi_ref || pi)."""
        own, other = self.distributions(prompt, answer)
        return (other.exp() * (other - own)).sum()


def _step(
    stage: str, files: Path, run_dir: Path, loss: Tensor, models: Models, num: int, **keys: object
) -> dict[str, float]:
    """Metrics of a step on all `num` examples, which has this loss and its gradient."""
    keys = {"run__steps": 1, "run__save_every": None, "batch__train": num, **keys}
    assert run_ranks(1, train, configure(stage, files, run_dir, **keys)) == [None]
    (entry,) = read_metrics(run_dir)
    gradients = torch.autograd.grad(loss, list(models.policy.parameters()))
    norm = torch.cat([one.flatten() for one in gradients]).norm()
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert entry["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    return entry


@pytest.mark.parametrize("stage", ["dpo", "tdpo"])
def test_pairs(stage: str, files: Path, tmp_path: Path) -> None:
    models = Models(files)
    pairs = load_pairs(str(files / "pairs.jsonl"), load_tokenizer(files / "tokenizer"), LIMITS).items
    total = torch.tensor(0.0)
    for pair in pairs:
        chosen, rejected = (pair.prompt_ids, pair.chosen_ids), (pair.prompt_ids, pair.rejected_ids)
        apart = models.log_ratio(*chosen) - models.log_ratio(*rejected)
        if stage == "tdpo":  # eq. 18, with the paper's alpha
            apart = apart - 0.2 * (models.divergence(*rejected) - models.divergence(*chosen).detach())
        total = total - logsigmoid(BETA * apart)
    _step(stage, files, tmp_path, total / len(pairs), models, len(pairs), algorithm__beta=BETA)


def test_verdicts(files: Path, tmp_path: Path) -> None:
    models = Models(files, "reference", "policy")  # so that the baseline is above 0, which is its least
    answers = load_judged(str(files / "pairs.jsonl"), load_tokenizer(files / "tokenizer"), LIMITS).items
    unrelated = [models.log_ratio(one.prompt_ids, one.unrelated_ids).item() for one in answers]
    baseline = sum(unrelated) / len(answers)
    assert baseline > 0
    total = torch.tensor(0.0)
    for one in answers:
        gain = BETA * (models.log_ratio(one.prompt_ids, one.response_ids) - baseline)
        total = total + (torch.sigmoid(-gain) if one.is_desirable else 1.5 * torch.sigmoid(gain))
    keys = {
        "algorithm__beta": BETA,
        "algorithm__undesirable_weight": 1.5,
        "models__policy": files / "models/reference",
        "models__reference": files / "models/policy",
    }
    entry = _step("kto", files, tmp_path, total / len(answers), models, len(answers), **keys)
    assert entry["kl"] == pytest.approx(baseline, rel=1e-4)


def test_demonstrations_of_which_every_turn_is_learnt(files: Path, tmp_path: Path) -> None:
    talks = [
        [("user", "red fox"), ("assistant", "dog"), ("user", "cat sun"), ("assistant", "moon star rain")],
        [("user", "snow"), ("assistant", "wind red")],
    ]
    rows = [{"messages": [{"role": r, "content": said} for r, said in talk]} for talk in talks]
    write_rows(tmp_path / "talks.jsonl", rows)
    models, total, count = Models(files), torch.tensor(0.0), 0
    limits = replace(LIMITS, loss_on="all")
    source = str(tmp_path / "talks.jsonl")
    for one in load_demonstrations(source, load_tokenizer(files / "tokenizer"), limits).items:
        own, _ = models.distributions(one.prompt_ids, one.response_ids)
        for place, token in enumerate(one.response_ids):
            if not any(first <= place < end for first, end in one.skipped):
                total, count = total - own[place, token], count + 1
    keys = {"data__train": source, "data__loss_on": "all"}
    _step("sft", files, tmp_path / "run", total / count, models, len(rows), **keys)
