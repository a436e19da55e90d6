"""Knows the arguments that a recipe may give to the chat template."""

from typing import Annotated

from pydantic import AfterValidator, JsonValue

# What transformers' apply_chat_template and its renderer take for themselves, and what comes from the rows or the run.
RESERVED = (
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "conversations", "max_length",
    "messages", "padding", "raise_exception", "return_assistant_tokens_mask", "return_dict", "return_tensors",
    "strftime_now", "tokenize", "tokenizer_kwargs", "tools", "truncation",
)  # fmt: skip


def _refuse_reserved(arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if taken := [name for name in arguments if name in RESERVED]:
        raise ValueError(
            f"{', '.join(taken)} cannot be set here: turns and tools come from the data, and the template from the "
            "tokenizer's folder; give arguments that the template itself reads, such as enable_thinking"
        )
    return arguments


TemplateArguments = Annotated[dict[str, JsonValue], AfterValidator(_refuse_reserved)]
