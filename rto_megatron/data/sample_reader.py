"""Responses as token ids become the samples that functions and services rate."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from rto_megatron.data.token_text import TokenText
from rto_megatron.rewards.sample import Sample
from rto_megatron.types import Columns, Rollout


class SampleReader:
    """Makes samples of rollouts: texts by the policy's tokenizer, columns by the prompts' ids and tokens.

    Args:
        columns: id and tokens of a prompt -> what its row says.

    Example:
        SampleReader(tokenizer, {("p7", (1, 5)): {"answer": "4"}}).sample(rollout).columns["answer"]
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, columns: Mapping[tuple[str, tuple[int, ...]], Columns]
    ) -> None:
        self._tokenizer = tokenizer
        self._columns = columns
        anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
        self._text_of = TokenText(lambda ids: str(tokenizer.decode(list(ids))), anchor)

    def sample(self, rollout: Rollout) -> Sample:
        """The rollout as sources outside see it."""
        columns = self._columns.get((rollout.prompt_id, rollout.prompt_ids), {})
        return Sample(
            prompt_id=rollout.prompt_id,
            prompt=str(self._tokenizer.decode(list(rollout.prompt_ids))),
            response=str(self._tokenizer.decode(list(rollout.response_ids), skip_special_tokens=True)),
            prompt_ids=rollout.prompt_ids,
            response_ids=rollout.response_ids,
            tokens=tuple(map(self._text_of, rollout.response_ids)),
            finish_reason=rollout.finish_reason,
            columns=columns,  # type: ignore[arg-type]  # JSON, as the loader keeps it
        )
