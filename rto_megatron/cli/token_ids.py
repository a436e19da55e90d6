"""Whether the models that are on this machine have a row for every id that a stage would read."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rto_megatron.cli.shapes import FoundShape
    from rto_megatron.config.schema import Stage


def token_warnings(config: "Stage", shapes: "Mapping[str, FoundShape]") -> list[str]:
    """Tokens without a row that nothing writes but a text that spells one; nothing where the policy is not here.

    Args:
        shapes: role -> what is known of its model.

    Raises:
        UserError: a model lacks ids that every run of the stage reads, or may sample.
    """
    from rto_megatron.config.checks import refuse, samples_from_pool
    from rto_megatron.data.tokenizer import has_tokenizer, load_plain_tokenizer
    from rto_megatron.data.vocabulary import smallest_embedding, spare_tokens, vocabulary_problems
    from rto_megatron.models.checks import check_sampled_ids

    here = {f"models.{role}": found for role, found in shapes.items() if found.folder is not None}
    policy = here.get("models.policy")
    if policy is None or policy.folder is None:
        return []
    sizes = {where: found.shape.vocab_size for where, found in here.items()}
    sampled = check_sampled_ids(sizes, "models.policy") if samples_from_pool(config) else []
    if not has_tokenizer(policy.folder):
        refuse(sampled)
        return []
    tokenizer, embedding = load_plain_tokenizer(policy.folder), smallest_embedding(sizes)
    refuse([*sampled, *vocabulary_problems(tokenizer, embedding)])
    spare = spare_tokens(tokenizer, embedding)
    return [] if spare is None else [spare]
