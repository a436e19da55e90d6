"""A table of sample completions with their rewards, for people who watch a run."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

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
    rewards = experience.rewards
    sums_4B = [
        (grid_BR * experience.mask_BR).sum(dim=1).tolist()
        for grid_BR in (rewards.score_BR, rewards.dpo_BR, rewards.kl_BR, rewards.total_BR())
    ]
    for row, rollout in enumerate(experience.rollouts[:num_samples]):
        ended = "" if rollout.finish_reason == "stop" else " (cut)"
        table.add_row(
            Text(plain(decode(rollout.prompt_ids))[-_MAX_CHARACTERS:]),
            Text(plain(decode(rollout.response_ids))[:_MAX_CHARACTERS]),
            f"{len(rollout.response_ids)}{ended}",
            *(f"{sums_B[row]:+.3f}" for sums_B in sums_4B),
        )
    return table


def show(table: Table) -> None:
    """Print a table; off a terminal it is 140 columns wide, so that logs stay readable."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
