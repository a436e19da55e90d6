"""The recipe's sources of rewards: libraries of verifiers, services that listen, tokens. No function of them is run."""

import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from rto_megatron.config.reward_code import missing_packages, running_code
from rto_megatron.config.rewards import ServiceSource, Source
from rto_megatron.diagnosis.finding import Finding
from rto_megatron.errors import UserError
from rto_megatron.rewards.service import read_token

_ANSWER_WITHIN_S = 5.0


def check_rewards(sources: Sequence[Source]) -> list[Finding]:
    """What each source needs is there; nothing where a reward model is the only one."""
    why, fix = "the stage would end with this message", "do as it says"
    problems = [Finding("rewards", "problem", text, why, fix) for text in missing_packages(tuple(sources))]
    found = [_of_service(source) for source in sources if isinstance(source, ServiceSource)]
    functions = [Finding("rewards", "ok", line) for line in running_code(tuple(sources))]
    return [*problems, *found, *functions]


def _of_service(source: ServiceSource) -> Finding:
    key, address = f"rewards.{source.name}", urlsplit(source.url)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        read_token(source)
        with socket.create_connection((address.hostname or "", port), _ANSWER_WITHIN_S):
            return Finding("rewards", "ok", f"{key}: somebody listens at {source.url}")
    except UserError as error:
        return Finding(
            "rewards", "problem", str(error), "the stage would end with this message", "do as it says"
        )
    except OSError as error:
        found = f"{key}: nobody listens at {source.url} ({error})"
        why = "the run ends at its first step if the service is not there by then"
        return Finding("rewards", "warning", found, why, "start it, or mend the address")
