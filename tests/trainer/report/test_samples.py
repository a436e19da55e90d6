"""The table of completions shows rewards by term and never lets a text control the terminal."""

import torch
from rich.console import Console

from rto_megatron.reporting.samples import completions_table
from rto_megatron.types import WHOLE, Experience, Rollout, TokenRewards


def test_rewards_are_summed_over_tokens_by_term() -> None:
    rollout = Rollout("a", (1, 2), (3, 4), (-0.1, -0.2), "length", 0)
    zeros_BR = torch.zeros(1, 3)
    rewards = TokenRewards(
        score_BR=torch.tensor([[0.0, 2.0, 9.0]]),  # the third position is padding
        dpo_BR=torch.tensor([[0.25, 0.5, 9.0]]),
        kl_BR=torch.tensor([[-0.5, 0.0, 9.0]]),
        num_clipped=torch.tensor(0.0),
    )
    mask_BR = torch.tensor([[1.0, 1.0, 0.0]])
    experience = Experience((rollout,), mask_BR, *[zeros_BR] * 6, WHOLE, rewards)
    table = completions_table(experience, lambda ids: f"[red]{list(ids)}", num_samples=3, title="step 1")
    console = Console(width=140, record=True, file=None)
    with console.capture() as captured:
        console.print(table)
    shown = captured.get()
    for part in ("[red][1, 2]", "[red][3, 4]", "2 (cut)", "+2.000", "+0.750", "-0.500", "+2.250"):
        assert part in shown, shown
