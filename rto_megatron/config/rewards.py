"""The section `rewards` of a recipe: what pays a response, one entry a source, combined by weight.

The score of a response is the sum of weight x (what a source gives, punished for length, normalised, then clipped). A
source that pays tokens adds to the reward of those tokens, beside the DPO reward and the KL penalty of the method.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from rto_megatron.config.addresses import without_localhost
from rto_megatron.section import Section

_NAME = re.compile(r"[a-z0-9_-]+")
_TARGET = re.compile(r".+:[A-Za-z_]\w*")


class SourceSection(Section):
    """What every source has.

    Example:
        {name: exact, weight: 0.5, clip: 1.0}
    """

    name: str = Field(description="under which it is logged, as reward/NAME/mean; default: the kind")
    weight: float = Field(default=1.0, allow_inf_nan=False, description="factor in the sum; 0: logged alone")
    clip: float | None = Field(
        default=None,
        gt=0,
        description="bound of the absolute value of what it gives, after `normalize`; null: none",
    )

    @field_validator("name")
    @classmethod
    def _refuse_odd_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                "a name is made of a-z, 0-9, _ and -, as it becomes part of the names of metrics"
            )
        return name


class ResponseSource(SourceSection):
    """A source that looks at more than the length of a response.

    Example:
        {name: exact, normalize: group, overlong_buffer_tokens: 256}
    """

    overlong_buffer_tokens: int | None = Field(
        default=None,
        ge=1,
        description="L_cache of DAPO's soft punishment of length, 0 to -1, which joins what it gives, before "
        "`normalize`; null: none",
    )
    normalize: Literal["group", "batch"] | None = Field(
        default=None,
        description="(score - mean) / (standard deviation + 1e-4), of the responses to the same prompt or of all "
        "responses of the step, or of all their tokens where it pays tokens; null: as given",
    )


class OutsideSource(ResponseSource):
    """A source outside the trainer's ranks.

    Example:
        {name: exact, timeout_s: 30}
    """

    timeout_s: float = Field(
        default=60,
        gt=0,
        description="limit of all responses of a replica in one step, retries included; then the run ends and names "
        "what was not scored",
    )


class PayingSource(OutsideSource):
    """A source that can pay tokens.

    Example:
        {name: exact, pays: tokens}
    """

    pays: Literal["response", "tokens", "spans"] = Field(
        default="response",
        description="response: one number for each; tokens: one number for every token of a response; spans: a list "
        "of [first, end, number], each paid on the last token of its stretch",
    )

    @model_validator(mode="after")
    def _refuse_normalized_spans(self) -> Self:
        if self.normalize is not None and self.pays == "spans":
            raise ValueError(
                f"normalize={self.normalize} is of one number for every response or token, and this source pays spans; "
                "remove it, or pay tokens"
            )
        return self


class ModelSource(ResponseSource):
    """The reward model that `models.reward` names, normalised with the mean and std of its config.json.

    Example:
        {kind: model, weight: 0.5}
    """

    kind: Literal["model"]
    name: str = "model"


class FunctionSource(PayingSource):
    """A Python function, called with one sample at a time in a process of its own.

    Example:
        {kind: function, name: short, function: "rules.py:short", pays: tokens}
    """

    kind: Literal["function"]
    name: str = "function"
    function: str = Field(
        description="file.py:name or package.module:name; it runs with the rights of whoever starts the run"
    )
    sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="of the file that defines it; null: that of the file as it is, which the saved configuration holds",
    )

    @field_validator("function")
    @classmethod
    def _refuse_other_targets(cls, function: str) -> str:
        if not _TARGET.fullmatch(function):
            raise ValueError("a function is written file.py:name or package.module:name")
        return function


class ServiceSource(PayingSource):
    """An HTTP service; docs/rewards.md has its protocol.

    Example:
        {kind: service, url: "http://10.0.0.2:8100/score", token_env: SCORER_TOKEN}
    """

    kind: Literal["service"]
    name: str = "service"
    url: Annotated[str, AfterValidator(without_localhost)] = Field(
        description="where requests are posted; of vLLM: http://host:port/pooling"
    )
    protocol: Literal["rewards", "vllm"] = Field(
        default="rewards",
        description="rewards: prompts and responses with their columns; vllm: the pooling route of a reward model",
    )
    batch: int = Field(default=32, ge=1, description="responses in one request")
    concurrency: int = Field(default=4, ge=1, description="requests of a replica under way at a time")
    retries: int = Field(default=3, ge=0, description="how often a request is sent again that got no answer")
    token_file: Path | None = Field(default=None, description="file with a bearer token; null: none")
    token_env: str | None = Field(
        default=None, min_length=1, description="environment variable with a bearer token; null: none"
    )

    @field_validator("url")
    @classmethod
    def _refuse_other_addresses(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("an address is written http://host:port/path")
        if "@" in url:
            raise ValueError(
                "the address holds a name or password before an @, which logs and the saved configuration would show; "
                "give a token by token_file or token_env"
            )
        return url

    @model_validator(mode="after")
    def _refuse_two_tokens(self) -> Self:
        if self.token_file is not None and self.token_env is not None:
            raise ValueError("token_file and token_env both give a token; remove one")
        return self

    @model_validator(mode="after")
    def _refuse_tokens_of_vllm(self) -> Self:
        if self.protocol == "vllm" and self.pays != "response":
            raise ValueError(
                f"protocol=vllm gives one number a response, and pays={self.pays}; remove `pays`"
            )
        return self


class MathVerifySource(OutsideSource):
    """1 where math-verify finds the response's answer equal to a column of the prompt's row, else 0.

    Example:
        {kind: math_verify, answer: gold}
    """

    kind: Literal["math_verify"]
    name: str = "math_verify"
    answer: str = Field(default="answer", min_length=1, description="the column with the right answer")


class ReasoningGymSource(OutsideSource):
    """What reasoning-gym gives the response, 0 to 1; prompts as `rto reasoning-gym` writes them.

    Example:
        {kind: reasoning_gym, answer_tag: answer}
    """

    kind: Literal["reasoning_gym"]
    name: str = "reasoning_gym"
    answer_tag: str | None = Field(
        default=None,
        pattern=r"^\w+$",
        description="the answer stands in <TAG>...</TAG>, in the last pair of them; null: it is the whole response",
    )


class OverlongSource(SourceSection):
    """DAPO's soft punishment of length: 0, then down to -1 over the last tokens before the length limit.

    Example:
        {kind: overlong, buffer_tokens: 256}
    """

    kind: Literal["overlong"]
    name: str = "overlong"
    buffer_tokens: int = Field(ge=1, description="L_cache, over which it falls from 0 to -1 (DAPO: 4096)")


Source = Annotated[
    ModelSource | FunctionSource | ServiceSource | MathVerifySource | ReasoningGymSource | OverlongSource,
    Field(discriminator="kind"),
]
KINDS: dict[str, type[SourceSection]] = {
    "model": ModelSource,
    "function": FunctionSource,
    "service": ServiceSource,
    "math_verify": MathVerifySource,
    "reasoning_gym": ReasoningGymSource,
    "overlong": OverlongSource,
}


def reads_columns(sources: tuple[Source, ...]) -> bool:
    """Whether a source sees the rows of the prompts, whose columns then belong to the data of the run."""
    return any(
        isinstance(one, OutsideSource) and not (isinstance(one, ServiceSource) and one.protocol == "vllm")
        for one in sources
    )
