"""Where a reward model's score is read, beside the token that transformers itself reads it at."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import write_llama
from tiny_tokenizers import change_json
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rto_megatron.data.score_place import read_elsewhere
from rto_megatron.data.tokenizer import CHAT_TEMPLATE, load_plain_tokenizer, train_tokenizer

EOS, EOS_ID, PAD_ID = "</s>", 2, 3
TAIL = CHAT_TEMPLATE.replace("{{ eos_token }}", "{{ eos_token + ' fox' }}")
TURNS = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue dog"}]


def _model(folder: Path, template: str | None, padding: int | None) -> Path:
    train_tokenizer(["red fox blue dog"] * 3, folder, vocab_size=60, byte_fallback=False)
    write_llama(folder, is_scalar=True)
    change_json(folder / "tokenizer_config.json", chat_template=template)
    change_json(folder / "config.json", pad_token_id=padding)
    return folder


@torch.no_grad()
def _read_by_transformers(folder: Path) -> int:
    """Which token of a rendered exchange, counted from its last end-of-sequence token on."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(tokenizer.apply_chat_template(TURNS, tokenize=False), add_special_tokens=False)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokens = torch.tensor([ids])
    values_T = model.score(model.model(tokens).last_hidden_state)[0, :, 0]
    place = int((values_T - model(tokens).logits[0, 0]).abs().argmin())
    return place - max(i for i, token in enumerate(ids) if token == EOS_ID)


@pytest.mark.parametrize(
    ("template", "padding", "said", "place"),
    [
        (CHAT_TEMPLATE, PAD_ID, None, 0),
        (CHAT_TEMPLATE, None, None, 0),
        (CHAT_TEMPLATE, EOS_ID, f"one token before the end-of-sequence token {EOS!r}", -1),
        (TAIL, PAD_ID, "fox', which the chat template writes behind the end-of-sequence", 1),
        (TAIL, EOS_ID, "fox', which the chat template writes behind the end-of-sequence", 1),
    ],
)
def test_it_is_where_transformers_reads_it(
    tmp_path: Path, template: str, padding: int | None, said: str | None, place: int
) -> None:
    folder = _model(tmp_path, template, padding)
    where = read_elsewhere(folder, load_plain_tokenizer(folder))
    assert where is None if said is None else where is not None and said in where
    assert _read_by_transformers(folder) == place


@pytest.mark.parametrize(
    "template", [None, "{{ raise_exception('no') }}", CHAT_TEMPLATE.replace("eos_token", "''")]
)
def test_without_a_template_that_writes_the_end_padding_alone_decides(
    tmp_path: Path, template: str | None
) -> None:
    folder = _model(tmp_path, template, PAD_ID)
    tokenizer = load_plain_tokenizer(folder)
    assert read_elsewhere(folder, tokenizer) is None
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "pad_token_id": EOS_ID}))
    assert "one token before" in str(read_elsewhere(folder, tokenizer))
