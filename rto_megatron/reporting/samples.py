"""A table of sample completions with their rewards, for people who watch a run."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rto_megatron.reporting.loggers import SampleText
from rto_megatron.reporting.progress import plain
from rto_megatron.types import Experience

Decode = Callable[[Sequence[int]], str]

_MAX_CHARACTERS = 400  # of a prompt (its end) or a response (its beginning)


def completions_table(experience: Experience, decode: Decode, num_samples: int, title: str) -> Table:
    """The first `num_samples` rollouts: prompt, response, tokens, and the reward terms summed over tokens.

    Args:
        experience: rollouts of this rank with their rewards.
        decode: token ids -> text.
        num_samples: rows.
        title: of the table, such as "rto step 12".
    """
    table = Table(title=title, show_lines=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("response", ratio=3, overflow="fold")
    for name in ("tokens", "score", "dpo", "kl", "reward"):
        table.add_column(name, justify="right", no_wrap=True)
    texts = sample_texts(experience, decode, num_samples)
    for text, rollout in zip(texts, experience.rollouts, strict=False):
        ended = "" if rollout.finish_reason == "stop" else " (cut)"
        table.add_row(
            Text(plain(text.prompt)[-_MAX_CHARACTERS:]),
            Text(plain(text.response)[:_MAX_CHARACTERS]),
            f"{len(rollout.response_ids)}{ended}",
            *(f"{number:+.3f}" for number in text.numbers.values()),
        )
    return table


def sample_texts(experience: Experience, decode: Decode, num_samples: int) -> list[SampleText]:
    """The first `num_samples` rollouts of this rank with their reward terms, summed over tokens."""
    rewards = experience.rewards
    terms = {
        "score": rewards.score_BR,
        "dpo": rewards.dpo_BR,
        "kl": rewards.kl_BR,
        "reward": rewards.total_BR(),
    }
    sums = {name: (grid_BR * experience.mask_BR).sum(dim=1).tolist() for name, grid_BR in terms.items()}
    return [
        SampleText(
            decode(rollout.prompt_ids),
            decode(rollout.response_ids),
            {name: sums_B[row] for name, sums_B in sums.items()},
        )
        for row, rollout in enumerate(experience.rollouts[:num_samples])
    ]


def show(table: Table) -> None:
    """Print a table; off a terminal it is 140 columns wide, so that logs stay readable."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
