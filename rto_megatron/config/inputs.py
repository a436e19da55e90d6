"""Sections of a recipe about what a stage reads: models and data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from rto_megatron.config.source_names import HeldOutSources, Sources
from rto_megatron.config.template_arguments import TemplateArguments
from rto_megatron.section import Section


class ModelsConfig(Section):
    """A Hugging Face folder, or a run folder or checkpoint of an earlier stage, per role.

    Example:
        models: {policy: runs/sft, reward: runs/reward, dpo: runs/dpo}
    """

    policy: Path
    reference: Path | None = Field(default=None, description="null: the policy's starting point")
    critic: Path | None = Field(
        default=None,
        description="null: starts from the reward model, or, without one, from the policy with a head that is drawn",
    )
    reward: Path | None = None
    dpo: Path | None = None
    dpo_reference: Path | None = Field(
        default=None, description="what the DPO model was trained against; null: the reference"
    )
    allow_unverified_reference: bool = Field(
        default=False,
        description="accept a DPO model that does not say which reference it was trained against, as released ones",
    )
    moe_aux_loss_coef: float = Field(
        default=0.0,
        ge=0,
        description="weight of the load-balancing loss of trained mixture-of-experts models (OpenRLHF: aux_loss_coef)",
    )
    random_init: bool = Field(
        default=False,
        description="SFT only: `policy` holds config.json and a tokenizer; weights come from run.seed",
    )


class DataConfig(Section):
    """Data are local files, folders or patterns of files, hub data sets as `owner/name:split` or
    `owner/name:config:split`, and lists of those.

    Example:
        data: {max_prompt_tokens: 512, overlong: drop}
    """

    max_prompt_tokens: int = Field(default=1024, ge=1)
    overlong: Literal["error", "drop", "truncate_left"] = Field(
        default="drop", description="what happens to a prompt over the limit; drops are counted and logged"
    )
    bad_rows: Literal["error", "drop"] = Field(
        default="error",
        description="error: rows that cannot be used end the run, and all are named; drop: it goes on without them, "
        "counted and logged",
    )
    layout: (
        Literal[
            "prompt", "context_messages",
            "messages", "response", "completion", "alpaca", "sharegpt",
            "conversations", "answers", "texts", "transcripts", "instruction", "question",
            "label",
        ]
        | None
    ) = Field(
        default=None, description="which columns are read of rows that are in several layouts (docs/data.md)"
    )  # fmt: skip
    cache: Path | None = Field(
        default=None,
        description="folder of tokenized data that runs and ranks of a machine share; null: data_cache beside run.dir",
    )
    template: TemplateArguments = Field(
        default={},
        description="arguments that the tokenizer's chat template reads, as for apply_chat_template "
        "(enable_thinking: false)",
    )


class ExampleDataConfig(DataConfig):
    """Prompts with answers.

    Example:
        data: {train: pairs.jsonl, eval: held_out.jsonl, max_length: 1024}
    """

    train: Sources
    eval: HeldOutSources | None = None
    eval_samples: int | None = Field(default=None, ge=1, description="rows of `eval` to use; null: all")
    max_length: int = Field(default=2048, ge=2, description="prompt and answer, in tokens")
    open_thought: Literal["error", "keep"] = Field(
        default="error",
        description="what happens to an answer that does not close the thought that the generation prompt opens",
    )
    allow_non_prefix: bool = Field(
        default=False,
        description="take chat templates that render a prompt otherwise than the beginning of its conversation: the "
        "rendered prompt and the bare answer are joined",
    )


class DemonstrationDataConfig(ExampleDataConfig):
    """Conversations that are learnt from.

    Example:
        data: {train: chat.jsonl, loss_on: all}
    """

    loss_on: Literal["last", "all"] = Field(
        default="last",
        description="which of the assistant's turns are learnt: the last one, or all but those of weight 0",
    )
    empty_thoughts: Literal["learn", "skip"] = Field(
        default="learn",
        description="what happens to a thought without text, as templates of reasoning models write before answers "
        "without one; skip: no loss on it",
    )

    def unread(self) -> Mapping[str, str]:
        """`allow_non_prefix`, where turns are not joined."""
        why = "with loss_on=all, whose turns are learnt where they stand in the conversation; remove one of them"
        return {**super().unread(), **({"allow_non_prefix": why} if self.loss_on == "all" else {})}


class PromptDataConfig(DataConfig):
    """Prompts that the policy answers.

    Example:
        data: {train: prompts.jsonl, max_prompt_tokens: 512}
    """

    train: Sources
    pretrain: Sources | None = Field(
        default=None,
        description="texts for a language-model loss beside the policy's (`algorithm.ptx_coef`); null: none",
    )
    true_reward: Path | None = Field(
        default=None, description="the synthetic task's table: logs the true return of what was sampled"
    )
    eval: HeldOutSources | None = Field(default=None, description="held-out prompts; null: none")
    eval_samples: int | None = Field(default=None, ge=1, description="rows of `eval` to use; null: all")


class EvaluateDataConfig(DataConfig):
    """Prompts that no stage trains on.

    Example:
        data: {eval: prompts.jsonl, eval_samples: 256}
    """

    eval: HeldOutSources = Field(description="held-out prompts")
    eval_samples: int | None = Field(default=None, ge=1, description="rows of `eval` to use; null: all")
