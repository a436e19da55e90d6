"""Plain text: every token but the first is predicted, and nothing says that a text is over."""

from pathlib import Path

import pytest
from data.written_rows import EOS, LIMITS, write_lines
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from rto_megatron.data.loader import (
    load_texts,
)
from rto_megatron.data.tokenizer import load_tokenizer
from rto_megatron.errors import DataError


@pytest.fixture
def bos_tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer like Llama's: every text begins with the beginning-of-sequence token."""
    tokenizer = load_tokenizer(tokenizer_folder)
    start = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start[0]} $A", special_tokens=[start]
    )
    return tokenizer


def test_every_token_of_a_text_but_the_first_is_predicted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "t.jsonl", [{"text": "the quick brown fox"}])
    (text,) = load_texts(source, tokenizer, LIMITS).items
    assert [*text.prompt_ids, *text.response_ids] == tokenizer.encode("the quick brown fox")
    assert len(text.prompt_ids) == 1
    assert EOS not in text.response_ids  # nothing says that a text is over


def test_a_start_token_is_kept_where_the_tokenizer_has_one(
    bos_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"text": "the quick brown fox"}, {"text": "a", "id": "short"}, {"text": "<s>the fox"}]
    first, second, third = load_texts(write_lines(tmp_path / "t.jsonl", rows), bos_tokenizer, LIMITS).items
    for text in (first, second, third):
        assert text.prompt_ids == (bos_tokenizer.bos_token_id,)
        assert bos_tokenizer.bos_token_id not in text.response_ids
    assert bos_tokenizer.decode(first.response_ids) == "the quick brown fox"
    assert (second.id, len(second.response_ids)) == ("short", 1)


def test_a_text_without_a_token_to_predict_is_dropped(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"text": "a"}, {"text": "the fox sleeps"}]
    loaded = load_texts(write_lines(tmp_path / "t.jsonl", rows), tokenizer, LIMITS)
    (text,) = loaded.items
    assert tokenizer.decode([*text.prompt_ids, *text.response_ids]) == "the fox sleeps"
    assert (loaded.report.rows, loaded.report.kept) == (2, 1)


@pytest.mark.parametrize("row", [{"text": "  "}, {"text": 3}])
def test_a_text_that_is_none_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row: dict[str, object]
) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl:1: column 'text' is .* expected text that is not empty"):
        load_texts(write_lines(tmp_path / "t.jsonl", [row]), tokenizer, LIMITS)
    with pytest.raises(DataError, match=r"expected one of \['text'\] for texts"):
        load_texts(write_lines(tmp_path / "t.jsonl", [{"prompt": "a"}]), tokenizer, LIMITS)
