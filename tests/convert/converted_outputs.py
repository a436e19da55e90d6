"""Outputs on both sides of a conversion, and how far apart they may be."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rto_megatron.convert.conversion import Proofs, convert_to_hf, silent
from rto_megatron.convert.conversion_options import Options
from rto_megatron.convert.megatron_source import open_megatron

TOKENS_BS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
OPTIONS = Options(None, 20_000, None)
TOLERANCE = 1e-4
VOCAB_SIZE = 97


def distance(found: Tensor | None, expected: Tensor) -> float:
    """Largest difference over the real vocabulary; 0 on ranks that hold no output. NaN anywhere is infinitely far."""
    if found is None:
        return 0.0
    difference = (found.float()[..., : expected.shape[-1]] - expected).abs().max()
    return float(difference.nan_to_num(float("inf"))) + (
        0.0 if bool(found.isfinite().all()) else float("inf")
    )


def require_near(differences: list[dict[str, float]]) -> None:
    worst = {name: max(of_rank[name] for of_rank in differences) for name in differences[0]}
    print({name: f"{difference:.1e}" for name, difference in worst.items()})
    assert worst
    assert {name: d for name, d in worst.items() if not d < TOLERANCE} == {}


def converted_distance(
    tree: Path, hf_files: Path | None, expected: dict[str, Tensor], name: str, target: Path
) -> float:
    """How far the logits of what a Megatron tree becomes are from those that its own model had."""
    source = open_megatron(tree, hf_files, None)
    convert_to_hf(source, target, OPTIONS, Proofs(digest=True, logits=None), silent, dry_run=False)
    model = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager", dtype=torch.float32)
    assert model.config.vocab_size == VOCAB_SIZE
    with torch.no_grad():
        return distance(expected[name], model(TOKENS_BS).logits)
