"""The section of a recipe that says how many sequences go together."""

from typing import Self

from pydantic import Field, model_validator

from rto_megatron.section import Section


class BatchConfig(Section):
    """Batch arithmetic; all counts but `tokens` are sequences (pairs for reward model and DPO).

    A forward takes so many sequences, or as many as have so many tokens: one of `micro` and `tokens` is set. Where a
    recipe says neither, `micro` is 1.

    Example:
        batch: {tokens: 16384, packed: true}
    """

    micro: int | None = Field(default=None, ge=1, description="sequences or pairs per forward on one rank")
    tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens per forward on one rank, padding of rows included; excludes batch.micro",
    )
    packed: bool = Field(
        default=True, description="pack a micro-batch without padding; false: right-padded rows"
    )
    share_prompts: bool = Field(
        default=True,
        description="compute a prompt once for all its responses in a packed micro-batch, where that can be done",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_by_one(cls, found: object) -> object:
        if not isinstance(found, dict) or found.get("tokens") is not None or found.get("micro") is not None:
            return found
        return {**found, "micro": 1}

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.micro is not None and self.tokens is not None:
            raise ValueError(
                f"batch.micro={self.micro} and batch.tokens={self.tokens} exclude each other: a forward takes so many "
                "sequences, or as many as have so many tokens; remove one"
            )
        return self


class TrainBatchConfig(BatchConfig):
    """The batches of a stage with an optimizer.

    Example:
        batch: {train: 64, micro: 4}
    """

    train: int = Field(default=128, ge=1, description="global batch of one optimizer step")


class PreferenceBatchConfig(TrainBatchConfig):
    """The paper's preference methods have a batch of their own.

    Example:
        batch: {train: 32, micro: 2}
    """

    train: int = Field(default=256, ge=1, description="global batch of one optimizer step: pairs, or answers")


class RolloutBatchConfig(TrainBatchConfig):
    """The batches of a stage that samples.

    Example:
        batch: {rollout: 128, train: 32, micro: 4}
    """

    rollout: int = Field(default=1024, ge=1, description="prompts per rollout step, all ranks")
