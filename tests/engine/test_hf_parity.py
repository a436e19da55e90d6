"""Log-probs, values and scores of the Megatron models equal Hugging Face's at every layout."""

from pathlib import Path

import pytest
import torch
from engine.layouts import LAYOUTS, frozen, topology
from ranks import run_ranks
from tiny_models import SEQUENCES, write_llama

from rto_megatron.data.packing import token_batch

TOLERANCE = 1e-5
CUT_ROWS = ("cp2", "cp2_gather", "cp2_pp2", "tp2_cp2_gather_sp", "cp4", "cp4_gather")
OUTPUTS_AT = ("one", "tp2", "pp2", "tp2_sp", "tp2_pp2", "tp2_pp2_sp", *CUT_ROWS)


def _outputs(layout: str, folder: Path, is_scalar: bool, packed: bool) -> list[list[float]]:
    place = topology(layout)
    model = frozen(place, folder, is_scalar)
    batches = [
        token_batch([(ids, 1) for ids, _ in group], packed, place.row_multiple, place.device.torch_device)
        for group in (SEQUENCES[:3], SEQUENCES[3:])
    ]
    outputs = model.token_outputs(batches)
    rows = []
    for batch, output in zip(batches, outputs, strict=True):
        for start, last in zip(batch.cu_seqlens, batch.last_positions, strict=False):
            end = last + 1 if is_scalar else last
            rows.append(output[start:end].tolist())
    return rows


@torch.no_grad()
def _expected(model: torch.nn.Module, is_scalar: bool) -> list[list[float]]:
    rows = []
    for ids, _ in SEQUENCES:
        tokens = torch.tensor([ids])
        if is_scalar:
            hidden = model.model(tokens).last_hidden_state
            rows.append(model.score(hidden)[0, :, 0].tolist())
        else:
            logprobs = model(tokens).logits[0].log_softmax(-1)
            rows.append(logprobs[:-1].gather(1, tokens[0, 1:, None])[:, 0].tolist())
    return rows


@pytest.mark.parametrize("layout", OUTPUTS_AT)
@pytest.mark.parametrize("is_scalar", [False, True], ids=["logprobs", "values"])
def test_outputs_equal_hugging_face(tmp_path: Path, layout: str, is_scalar: bool) -> None:
    expected = _expected(write_llama(tmp_path, is_scalar=is_scalar), is_scalar)
    for packed in (True, False):
        for rows in run_ranks(LAYOUTS[layout][0], _outputs, layout, tmp_path, is_scalar, packed):
            for row, want in zip(rows, expected, strict=True):
                torch.testing.assert_close(torch.tensor(row), torch.tensor(want), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("layout", "vocab_size", "is_tied"), [("tp2", 97, False), ("tp2_pp2", 97, True), ("one", 97, True)]
)
def test_padded_and_tied_vocabularies_equal_hugging_face(
    tmp_path: Path, layout: str, vocab_size: int, is_tied: bool
) -> None:
    expected = _expected(write_llama(tmp_path, vocab_size=vocab_size, is_tied=is_tied), is_scalar=False)
    for rows in run_ranks(LAYOUTS[layout][0], _outputs, layout, tmp_path, False, True):
        for row, want in zip(rows, expected, strict=True):
            torch.testing.assert_close(torch.tensor(row), torch.tensor(want), atol=TOLERANCE, rtol=0)
