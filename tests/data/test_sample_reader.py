"""What functions and services see of a response."""

import copy

from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

from rto_megatron.data.sample_reader import SampleReader
from rto_megatron.types import Rollout

TEXT = " the quick fox and the dog"


def test_tokens_keep_the_spaces_before_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Decoders of Llama 2 and Mistral drop the space that a text begins with, and so that of a token alone."""
    dropping = copy.deepcopy(tokenizer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    dropping.backend_tokenizer.decoder = decoders.Sequence(steps)
    ids = tuple(dropping.encode(TEXT, add_special_tokens=False))
    assert dropping.decode(ids) == TEXT.removeprefix(" ")
    rollout = Rollout("p", (1,), (*ids, dropping.eos_token_id), (0.0,) * (len(ids) + 1), "stop", 0)
    for one in (tokenizer, dropping):
        sample = SampleReader(one, {}).sample(rollout)
        assert "".join(sample.tokens) == f"{TEXT}</s>" and len(sample.tokens) == len(rollout.response_ids)
