"""Starts what rates responses outside the ranks, as a source of the section `rewards` says."""

from rto_megatron.config.rewards import FunctionSource, MathVerifySource, ReasoningGymSource, ServiceSource
from rto_megatron.rewards.function_reward import Called, FunctionRater
from rto_megatron.rewards.sample import Rater
from rto_megatron.rewards.service import ServiceRater, read_token

type Outside = FunctionSource | ServiceSource | MathVerifySource | ReasoningGymSource


def rater_of(source: Outside) -> Rater:
    """Starts what rates responses outside the ranks.

    Raises:
        UserError: it cannot be started.
    """
    key = f"rewards.{source.name}"
    match source:
        case ServiceSource():
            read_token(source)  # one that is missing is told before the first step
            return ServiceRater(source)
        case FunctionSource():
            return FunctionRater(Called(key, source.function, source.pays, source.timeout_s))
        case MathVerifySource():
            verifier, options = "verify_math", source.model_dump(include={"answer"})
        case ReasoningGymSource():
            verifier, options = "verify_gym", source.model_dump(include={"answer_tag"})
    target = f"rto_megatron.rewards.{verifier}:score"
    return FunctionRater(Called(key, target, "response", source.timeout_s, options))
