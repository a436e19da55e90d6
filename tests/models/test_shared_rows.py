"""Families with windows, soft caps and rotations of their own read shared prompts as transformers reads them apart."""

from pathlib import Path

from engine.layouts import frozen, topology
from ranks import run_ranks
from tiny_families import hugging_face_outputs, write_family
from tiny_models import SEQUENCES
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rto_megatron.data.packing import token_batch

NAMES = ("smollm3", "gemma2", "gemma3_text", "glm4", "phi3_longrope", "qwen3_moe")
PROMPT, OTHER = SEQUENCES[0][0][:12], SEQUENCES[2][0][:9]
SHARED = [
    (SEQUENCES[0][0], 12),
    (SEQUENCES[2][0], 9),
    ([*OTHER, 70, 5, 8], 9),
    ([*PROMPT, 33, 4, 90, 91, 2], 12),
    ([*PROMPT, 61], 12),
]


def _values(root: Path) -> dict[str, list[Tensor]]:
    place, found = topology("one"), {}
    batch = token_batch(SHARED, True, 1, place.device.torch_device, shares_prompts=True)
    assert batch.shared is not None
    for name in NAMES:
        (values_T,) = frozen(place, root / name, True).token_outputs([batch])
        ends = zip(batch.cu_seqlens, batch.last_positions, strict=False)
        found[name] = [values_T[start : last + 1].clone() for start, last in ends]
    return found


def test_values_of_sequences_that_share_prompts_equal_hugging_face(tmp_path: Path) -> None:
    want = {}
    for name in NAMES:
        write_family(tmp_path / name, name, True)
        model = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / name, attn_implementation="eager"
        )
        want[name] = hugging_face_outputs(model.eval(), SHARED, True)
    found = run_ranks(1, _values, tmp_path)[0]
    for name in NAMES:
        worst = max(float((a - b).abs().max()) for a, b in zip(found[name], want[name], strict=True))
        print(name, f"{worst:.1e}")
        assert worst < 1e-5
