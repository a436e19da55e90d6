"""Where nothing fits: by how much, and the three cheapest ways out of those that a search finds."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from rto_megatron.config.load import load_recipe
from rto_megatron.errors import RecipeError
from rto_megatron.planning.candidates import Candidate
from rto_megatron.planning.gpus import KNOWN_GPUS, Gpu
from rto_megatron.planning.judgement import judged
from rto_megatron.planning.memory import trained_bytes
from rto_megatron.planning.ways_out import Find, refuse_nothing_fits
from rto_megatron.planning.whole_step import longest_lengths, time_step

GIB = 2**30
DPO = Path(__file__).parents[2] / "launchers/recipes/llama3_8b/dpo.yaml"
A100 = KNOWN_GPUS["a100"]


def layout_of(num_bytes: int, *keys: str) -> Candidate:
    plan, known = judged(load_recipe(DPO, ["parallel.tensor=1", "parallel.pipeline=1", *keys]), 8, [], "")
    shapes = {name: one.shape for name, one in known.items()}
    time = time_step(plan, shapes, A100, 0, longest_lengths(plan))
    return Candidate({}, plan, known, 0, 1, num_bytes, time)


def whole(total: int, least_gpus: int = 1) -> Find:
    """A recipe that is cut evenly, on at least so many GPUs, and takes half with smaller micro-batches."""

    def find(gpus: int, gpu: Gpu, changes: Sequence[str]) -> list[Candidate]:
        size = total // gpus // (2 if changes else 1)
        return [layout_of(size)] if gpus >= least_gpus else []

    return find


def told(find: Find, gpus: int, trained: int, *keys: str) -> str:
    found = find(gpus, A100, ())
    with pytest.raises(RecipeError) as refused:
        refuse_nothing_fits([layout_of(one.num_bytes, *keys) for one in found], find, gpus, A100, trained)
    return str(refused.value)


def test_keys_come_first_then_more_gpus_then_fewer_of_larger_ones() -> None:
    said = told(whole(140 * GIB), 1, 100 * GIB, "batch.tokens=16384")
    assert "the smallest takes 140.0 GiB, 61.0 GiB too much" in said
    # Of an H200 139.4 GiB are usable, so one does not do, and two are no fewer than two A100.
    assert said.endswith("Ways out: set batch.tokens=2048; take 2 GPUs; take 1 b200")


def test_there_are_three_of_them_where_larger_gpus_do_with_fewer() -> None:
    # Of an A100 79 GiB are usable, of an H20 94.6, of an H200 139.4.
    said = told(whole(270 * GIB), 1, 100 * GIB)
    assert said.endswith("Ways out: take 4 GPUs; take 2 h200; take 2 b200")


def test_what_is_trained_says_what_is_missing_where_no_layout_is_sound() -> None:
    said = told(whole(700 * GIB, least_gpus=16), 4, 400 * GIB)
    assert (
        "what the recipe trains takes 400.0 GiB with its gradients and optimizers, 84.0 GiB more than" in said
    )
    assert said.endswith("Ways out: take 16 GPUs")


def test_micro_batches_by_number_may_be_smaller_too() -> None:
    said = told(whole(140 * GIB), 1, 100 * GIB, "batch.micro=4")
    assert "Ways out: set batch.micro=1; take 2 GPUs" in said


def test_what_nothing_helps_is_told() -> None:
    assert told(whole(10**15), 1, 10**14).endswith("nothing that was tried helps: take a smaller model")


def test_trained_models_take_18_bytes_a_parameter() -> None:
    known = layout_of(0).known
    assert trained_bytes(load_recipe(DPO), known) == pytest.approx(8.03e9 * 18, rel=0.001)
