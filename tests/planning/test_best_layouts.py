"""Which of the layouts that fit are simulated first, and so shown."""

from dataclasses import replace
from pathlib import Path

from rto_megatron.config.load import load_recipe
from rto_megatron.planning.candidates import Candidate
from rto_megatron.planning.gpus import KNOWN_GPUS
from rto_megatron.planning.judgement import judged
from rto_megatron.planning.reasons import best
from rto_megatron.planning.whole_step import longest_lengths, time_step

SFT = Path(__file__).parents[2] / "launchers/recipes/llama3_8b/sft.yaml"


def test_the_fastest_of_each_way_to_sample_come_before_the_next_fastest() -> None:
    plan, known = judged(load_recipe(SFT), 8, [], "")
    shapes = {name: one.shape for name, one in known.items()}
    time = time_step(plan, shapes, KNOWN_GPUS["h100"], 0, longest_lengths(plan))
    together, apart, ahead = ("rollout.colocated=true",), (), ("rollout.ahead=1",)
    ways = [(together, ()), (together, ()), (together, ()), (apart, ahead), (apart, ())]
    layouts = [
        Candidate(
            {"sampling": way, "ahead": how}, plan, known, 0, 1, 1, replace(time, seconds=float(seconds))
        )
        for seconds, (way, how) in enumerate(ways, 1)
    ]
    assert [one.seconds for one in best(layouts, 4)] == [1, 4, 5, 2]
    # Of those that take equally long there is one.
    assert [one.seconds for one in best([layouts[0], *layouts[:2]], 4)] == [1, 2]
