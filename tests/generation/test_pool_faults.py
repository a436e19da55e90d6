"""What the HTTP engine says about servers that are gone or answer nonsense."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from generation.canned import Answer, canned_servers, choice

from rto_megatron.errors import ModelFolderError, PoolError, RecipeError
from rto_megatron.generation.contract import NoServersLeft, Sampling, StaleWeights
from rto_megatron.generation.vllm.client.vllm_pool import VllmPool
from rto_megatron.generation.vllm.start.server import (
    ServerOptions,
    start_server,
    stop_server,
    wait_until_ready,
)
from rto_megatron.types import Prompt

SAMPLING = Sampling(max_tokens=3, eos_ids=(2,))
PROMPT = Prompt("prompt-0", (1, 5))


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Starts a server that generates the given choice; returns its address."""
    with canned_servers() as start:
        yield lambda generated: start(lambda seed: generated).address


Serve = Callable[[Answer], str]


def test_a_complete_response_becomes_a_rollout(serve: Serve) -> None:
    (rollout,) = VllmPool([serve(choice([7, 2], "stop"))], "t", 5, retries=0).generate([PROMPT], SAMPLING, 4)
    assert (rollout.response_ids, rollout.sampled_logprobs, rollout.finish_reason) == (
        (7, 2),
        (-1.5, -1.5),
        "stop",
    )
    assert (rollout.prompt_id, rollout.prompt_ids, rollout.weight_version) == ("prompt-0", (1, 5), 4)


@pytest.mark.parametrize("part", ["token_ids", "logprobs", "finish_reason", "weight_versions"])
def test_a_missing_part_of_a_response_is_an_error(serve: Serve, part: str) -> None:
    incomplete = choice([7, 8, 9])
    del incomplete[part]
    address = serve(incomplete)
    with pytest.raises(PoolError, match=rf"{address} sent a response without '{part}'"):
        VllmPool([address], "t", 5, retries=0).generate([PROMPT], SAMPLING, 4)


@pytest.mark.parametrize("part", ["token_ids", "logprobs", "weight_versions"])
def test_a_part_of_another_type_is_an_error(serve: Serve, part: str) -> None:
    address = serve(choice([7, 8, 9]) | {part: 7})
    with pytest.raises(PoolError, match=rf"{address} sent a response without a part of the right type"):
        VllmPool([address], "t", 5, retries=0).generate([PROMPT], SAMPLING, 4)


@pytest.mark.parametrize("scored", [[7], [7, 9, 8]])
def test_logprobs_of_other_tokens_are_an_error(serve: Serve, scored: list[int]) -> None:
    content = [{"token_id": token, "logprob": -1.0} for token in scored]
    other = choice([7, 8, 9]) | {"logprobs": {"content": content}}
    with pytest.raises(PoolError, match=rf"sent 3 tokens and log-probs of {len(scored)}"):
        VllmPool([serve(other)], "t", 5, retries=0).generate([PROMPT], SAMPLING, 4)


@pytest.mark.parametrize(("first", "then"), [("4", "5"), ("3", "4")])
def test_weights_that_changed_during_generation_are_refused(serve: Serve, first: str, then: str) -> None:
    mixed = choice([7, 8, 9])
    mixed["weight_versions"] = [
        {"version": first, "start": 0, "end": 1},
        {"version": then, "start": 1, "end": 3},
    ]
    with pytest.raises(StaleWeights, match=rf"weight versions \['{first}', '{then}'\], expected 4 alone"):
        VllmPool([serve(mixed)], "t", 5, retries=0).generate([PROMPT], SAMPLING, 4)


def test_ends_that_contradict_the_request_are_errors(serve: Serve) -> None:
    for generated, words in (
        (choice([7, 8], "stop"), "stopped prompt prompt-0 at token 8"),
        (choice([7, 8], "length"), "after 2 of 3 tokens; start the pool with a larger --max-model-len"),
        (choice([7, 8], "abort"), "ended prompt prompt-0 with reason 'abort'"),
    ):
        with pytest.raises(PoolError, match=words):
            VllmPool([serve(generated)], "t", 5, retries=0).generate([PROMPT], SAMPLING, 4)


def test_a_dead_port_is_named_with_what_to_do() -> None:
    with pytest.raises(NoServersLeft, match=r"cannot reach inference server http://127.0.0.1:9 .*rto pool"):
        VllmPool(["http://127.0.0.1:9"], "t", 5, retries=0).generate([PROMPT], SAMPLING, 4)


def test_a_pool_without_servers_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"rollout\.servers is empty"):
        VllmPool([], "t", 5)


def test_a_folder_without_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"has no config.json"):
        start_server(ServerOptions(tmp_path, tmp_path / "token", tmp_path / "log"))


@pytest.mark.slow
@pytest.mark.pool
def test_a_server_that_dies_shows_the_first_error_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["NoSuchModel"]}')
    server = start_server(ServerOptions(tmp_path, tmp_path / "token", tmp_path / "log"))
    try:
        with pytest.raises(PoolError, match=r"(?s)ended while starting; the first error in .*NoSuchModel"):
            wait_until_ready(server, timeout_s=120)
    finally:
        stop_server(server)
