"""The known reward of the synthetic task: a table over (class, previous token, token), kept as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rto_megatron.errors import DataError


@dataclass(frozen=True)
class TrueReward:
    """Per-token reward of a response, exact on token ids; transitions outside the table are worth 0.

    The class is the one topic token in the prompt, and the token before the first response token is the
    prompt's last. Every token but the end of the sequence also costs `token_cost`; a truncated response gets
    no reward for its end, and what follows an end-of-sequence token counts nothing.

    Example:
        TrueReward.load(path).returns(prompt_ids, response_ids)
    """

    class_of_token: Mapping[int, int]  # topic token id -> class
    entries: Mapping[tuple[int, int, int], float]  # (class, previous id, id) -> reward, scaled
    token_cost: float  # scaled
    eos_id: int
    source_mean: float  # return of the text source that wrote demonstrations and pairs
    source_sd: float
    scale: float  # factor that was applied to the table to get the source's spread of returns
    seed: int
    tokenizer_fingerprint: str

    def class_of(self, prompt_ids: Sequence[int]) -> int:
        """The class of a prompt.

        Raises:
            DataError: the prompt does not hold exactly one kind of topic token.
        """
        classes = {self.class_of_token[token] for token in prompt_ids if token in self.class_of_token}
        if len(classes) != 1:
            raise DataError(
                f"the true reward needs one topic in a prompt, found {len(classes)} in {list(prompt_ids)}; "
                f"topic ids are {sorted(self.class_of_token)}: use the prompts written with the table"
            )
        return classes.pop()

    def token_rewards(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[float]:
        """Reward of every response token, one entry per token."""
        topic = self.class_of(prompt_ids)
        rewards = []
        previous = prompt_ids[-1]
        for token in response_ids:
            cost = 0.0 if token == self.eos_id else self.token_cost
            rewards.append(self.entries.get((topic, previous, token), 0.0) - cost)
            previous = token
            if token == self.eos_id:
                break
        return rewards + [0.0] * (len(response_ids) - len(rewards))

    def returns(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> float:
        """Sum of the token rewards of one response."""
        return sum(self.token_rewards(prompt_ids, response_ids))

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        document = {
            "class_of_token": [[token, topic] for token, topic in self.class_of_token.items()],
            "entries": [[*key, value] for key, value in self.entries.items()],
            "token_cost": self.token_cost,
            "eos_id": self.eos_id,
            "source_mean": self.source_mean,
            "source_sd": self.source_sd,
            "scale": self.scale,
            "seed": self.seed,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
        }
        path.write_text(json.dumps(document) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "TrueReward":
        """Read a table that `save` wrote.

        Raises:
            DataError: no such file, or not a table.
        """
        if not path.is_file():
            raise DataError(f"true reward {path} does not exist; write the synthetic task first")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                class_of_token={int(token): int(topic) for token, topic in document["class_of_token"]},
                entries={(int(c), int(p), int(a)): float(value) for c, p, a, value in document["entries"]},
                token_cost=float(document["token_cost"]),
                eos_id=int(document["eos_id"]),
                source_mean=float(document["source_mean"]),
                source_sd=float(document["source_sd"]),
                scale=float(document["scale"]),
                seed=int(document["seed"]),
                tokenizer_fingerprint=str(document["tokenizer_fingerprint"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not a true-reward table ({type(error).__name__}: {error}); "
                "write the synthetic task again"
            ) from error
