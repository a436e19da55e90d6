"""Rewards over HTTP: what is sent, what may come back, and what happens while the service is down, slow or wrong."""

import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from rewards.services import Request, service
from rewards.test_function_reward import sample

from rto_megatron.config.rewards import ServiceSource
from rto_megatron.errors import UserError
from rto_megatron.rewards.service import RewardServiceLost, ServiceRater

SAMPLES = [sample(number, num_tokens=number + 1) for number in range(5)]


def rate(url: str, **keys: object) -> list[object]:
    return list(ServiceRater(ServiceSource(kind="service", url=url, **keys)).rate(SAMPLES))


def lengths(request: Request) -> dict[str, list[int]]:
    samples = request["samples"]
    assert isinstance(samples, list)
    return {"rewards": [len(one["response_ids"]) for one in samples]}


def test_batches_come_back_in_order_with_the_token_and_every_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("from-a-file\n")
    monkeypatch.setenv("SCORER", "from-the-environment")
    with service(lengths) as (url, heard):
        assert rate(url, batch=2, concurrency=3, token_file=tmp_path / "token") == [1, 2, 3, 4, 5]
        assert sorted(len(request["samples"]) for _, request in heard) == [1, 2, 2]
        assert {header for header, _ in heard} == {"Bearer from-a-file"}
        assert rate(url, token_env="SCORER") == [1, 2, 3, 4, 5]
        header, request = heard[-1]
    assert header == "Bearer from-the-environment"
    assert request["pays"] == "response"
    assert request["samples"][2] == {
        "prompt_id": "p2", "prompt": "say", "response": "so", "prompt_ids": [1, 2], "response_ids": [0, 1, 2],
        "tokens": ["a"] * 3, "finish_reason": "stop", "columns": {"value": "yes"},
    }  # fmt: skip


def test_vllm_is_asked_for_the_raw_score_of_the_ids_and_may_answer_in_any_order() -> None:
    def pooled(request: Request) -> object:
        ids = request["input"]
        assert isinstance(ids, list)
        assert request["task"] == "classify" and request["use_activation"] is False
        return {"data": [{"index": at, "data": [sum(one) / 8]} for at, one in reversed(list(enumerate(ids)))]}

    with service(pooled) as (url, _):
        # Each sample's prompt is 1, 2 and its response 0 .. n - 1.
        assert rate(url, protocol="vllm") == [3 / 8, 4 / 8, 6 / 8, 9 / 8, 13 / 8]


def test_a_request_that_fails_is_sent_again_and_no_more_than_may_be_are_under_way() -> None:
    lock, failures, active, most = threading.Lock(), [503, 429, 500], [0], [0]
    both = threading.Barrier(2, timeout=5)

    def respond(request: Request) -> object:
        with lock:
            if failures:
                return failures.pop()
            active[0] += 1
            most[0] = max(most[0], active[0])
        if len(lengths(request)["rewards"]) > 1:
            both.wait()  # passes only while two requests are under way
        time.sleep(0.02)
        with lock:
            active[0] -= 1
        return lengths(request)

    with service(respond) as (url, heard):
        assert rate(url, batch=1, concurrency=2, retries=3) == [1, 2, 3, 4, 5]
        assert len(heard) == 5 + 3 and most[0] <= 2
        assert rate(url, batch=3, concurrency=2) == [1, 2, 3, 4, 5]


def test_pauses_before_a_request_is_sent_again_grow() -> None:
    """Half a second, then twice as long each time."""
    failures, asked = [503, 503], list[float]()

    def respond(request: Request) -> object:
        asked.append(time.monotonic())
        return failures.pop() if failures else lengths(request)

    with service(respond) as (url, _):
        assert rate(url, retries=2) == [1, 2, 3, 4, 5]
    first, second = (later - earlier for earlier, later in pairwise(asked))
    assert first >= 0.49 and second >= 0.99


def test_a_service_that_is_down_or_slow_is_named_within_the_limit_and_may_come_back() -> None:
    with service(lambda request: None) as (url, _), pytest.raises(RewardServiceLost) as late:
        rate(url, timeout_s=0.5, batch=4)
    assert "rewards.service" in str(late.value) and "did not score 5 samples: p0, p1, p2" in str(late.value)
    assert "within 0.5 s: no answer came; nothing is trained on" in str(late.value)
    assert late.value.reason == "INFRA_NO_REWARD"  # `rto launch` starts again where this is why a run ended
    with pytest.raises(RewardServiceLost, match="1 requests: ClientConnectorError"):
        rate(url, retries=0)
    with (
        service(lambda request: 500) as (url, heard),
        pytest.raises(RewardServiceLost, match="it answered 500"),
    ):
        rate(url, retries=1)
    assert len(heard) == 2


@pytest.mark.parametrize(
    ("answer", "keys", "expected"),
    [
        (401, {}, "refused a request with status 401"),
        ({"rewards": [1]}, {}, "ValueError: 1 rewards for 5 samples"),
        ({"reward": []}, {}, "KeyError"),
        ([1, 2], {}, "TypeError"),
        ({"rewards": [1, 2, "x", 4, 5]}, {}, "answered 'x' for p2, expected one number"),
        (
            {"rewards": [1] * 5},
            {"pays": "tokens"},
            "answered 1 for p0, expected a list of one number for each of the 1",
        ),
        (
            {"data": [{"index": 0, "data": [0.1, 0.2]}]},
            {"protocol": "vllm"},
            "serve a reward model with one label",
        ),
        ({}, {"token_env": "NOT_SET"}, "rewards.service.token_env: the environment has no NOT_SET"),
        ({}, {"token_file": "/nowhere"}, "rewards.service.token_file: /nowhere cannot be read"),
    ],
)
def test_wrong_answers_are_refused_with_key_and_sample(
    answer: object, keys: dict[str, object], expected: str
) -> None:
    with service(lambda request: answer) as (url, heard), pytest.raises(UserError) as caught:
        rate(url, **keys)
    assert expected in str(caught.value) and "rewards.service" in str(caught.value)
    assert not isinstance(caught.value, RewardServiceLost) and len(heard) <= 1
