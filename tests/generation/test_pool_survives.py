"""A pool whose servers fail while it generates: canned servers with the ills of real ones."""

import threading
from collections.abc import Callable, Iterator

import pytest
from generation.canned import Answer, CannedServer, canned_servers, choice

from rto_megatron.errors import PoolError, UserError
from rto_megatron.generation.contract import NoServersLeft, Sampling, StaleWeights, request_seed
from rto_megatron.generation.vllm.client.liveness import Liveness
from rto_megatron.generation.vllm.client.membership import Members
from rto_megatron.generation.vllm.client.vllm_pool import VllmPool
from rto_megatron.types import Prompt, Rollout

SAMPLING = Sampling(max_tokens=3, eos_ids=(2,), seed=5)
PROMPTS = [Prompt(f"prompt-{index}", (1, 5 + index)) for index in range(40)]
SEEDS = [request_seed(5, 4, index) for index in range(40)]
LIVENESS = Liveness(interval_s=1.2, timeout_s=1.0)
TIMEOUT_S = 30.0  # of a request: nothing below waits for it


def tokens_of(seed: int) -> list[int]:
    return [10 + seed % 7, 10 + seed % 11, 10 + seed % 13]


def by_seed(seed: int | None) -> Answer:
    return choice(tokens_of(seed or 0))


Start = Callable[[Callable[[int | None], Answer | int]], CannedServer]


@pytest.fixture
def start() -> Iterator[Start]:
    with canned_servers() as starter:
        yield starter


def pool_of(
    *servers: CannedServer, said: list[str] | None = None, retries: int = 3, liveness: Liveness = LIVENESS
) -> VllmPool:
    lines = [] if said is None else said
    addresses = [server.address for server in servers]
    return VllmPool(addresses, "t", TIMEOUT_S, retries, liveness, lines.append)


def assert_whole(rollouts: list[Rollout]) -> None:
    """Every prompt in order, each with what its own seed gives, whoever answered."""
    assert [one.prompt_id for one in rollouts] == [prompt.id for prompt in PROMPTS]
    assert [list(one.response_ids) for one in rollouts] == [tokens_of(seed) for seed in SEEDS]


def test_requests_are_shared_and_each_is_sent_once(start: Start) -> None:
    servers = [start(by_seed) for _ in range(3)]
    assert_whole(pool_of(*servers).generate(PROMPTS, SAMPLING, 4))
    assert sorted(seed for server in servers for seed in server.seeds) == sorted(SEEDS)
    assert all(len(server.seeds) > 5 for server in servers)


def test_a_server_is_asked_for_as_much_at_once_as_it_batches_on_a_gpu(start: Start) -> None:
    """The least number of sequences of vLLM's GPUs, 256: EngineArgs.get_batch_defaults."""
    all_are_there = threading.Barrier(256)

    def together(seed: int | None) -> Answer:
        if seed is not None:
            all_are_there.wait(TIMEOUT_S)
        return by_seed(seed)

    prompts = [Prompt(f"prompt-{index}", (1, 5)) for index in range(256)]
    assert len(pool_of(start(together), retries=0).generate(prompts, SAMPLING, 4)) == 256


def test_each_response_is_told_of_while_others_are_sampled(start: Start) -> None:
    come = threading.Event()

    def last_waits(seed: int | None) -> Answer:
        assert seed != SEEDS[7] or come.wait(30)
        return by_seed(seed)

    told: dict[int, Rollout] = {}

    def arrived(place: int, rollout: Rollout) -> None:
        assert place not in told
        told[place] = rollout
        if len(told) == len(PROMPTS) - 1:
            come.set()

    rollouts = pool_of(start(last_waits)).stream(PROMPTS, SAMPLING, 4, arrived)
    assert_whole(rollouts)
    assert [told[place] for place in range(len(PROMPTS))] == rollouts


def test_a_server_that_answers_nothing_but_errors_is_taken_out_with_one_line(start: Start) -> None:
    good, broken, said = start(by_seed), start(lambda seed: 500), []
    pool = pool_of(broken, good, said=said)
    assert_whole(pool.generate(PROMPTS, SAMPLING, 4))
    assert pool.members.serving == (good.address,)
    (line,) = said
    assert line.startswith(f"warning: inference server {broken.address} answered 500")
    assert line.endswith("it is out until it takes part in a weight push")
    asked = len(broken.seeds)
    assert_whole(pool.generate(PROMPTS, SAMPLING, 4))
    assert len(broken.seeds) == asked


class StopsAfter:
    """Answers `count` requests and then stops the server that it belongs to."""

    server: CannedServer

    def __init__(self, count: int, awake: Callable[[int | None], Answer]) -> None:
        self._answered = threading.Semaphore(count)
        self._awake = awake

    def __call__(self, seed: int | None) -> Answer:
        if seed is not None and not self._answered.acquire(blocking=False):
            self.server.stop()
        return self._awake(seed)


def start_stopping(start: Start, count: int, awake: Callable[[int | None], Answer]) -> CannedServer:
    respond = StopsAfter(count, awake)
    respond.server = start(respond)
    return respond.server


def test_a_stopped_server_loses_its_requests_to_the_others_and_its_late_answers_are_not_read(
    start: Start,
) -> None:
    good, said = start(by_seed), []
    zombie = start_stopping(start, 3, lambda seed: choice([30, 31, 32]))
    pool = pool_of(zombie, good, said=said)
    rollouts = pool.generate(PROMPTS, SAMPLING, 4)
    assert [one.prompt_id for one in rollouts] == [prompt.id for prompt in PROMPTS]
    others = [at for at, one in enumerate(rollouts) if one.response_ids != (30, 31, 32)]
    assert len(others) >= 37  # three were answered while it was well
    assert all(list(rollouts[at].response_ids) == tokens_of(SEEDS[at]) for at in others)
    (line,) = said
    assert line.startswith(
        f"warning: inference server {zombie.address} did not generate one token within 1 s"
    )
    zombie.wake()
    asked = len(zombie.seeds)
    assert_whole(pool.generate(PROMPTS, SAMPLING, 4))
    assert len(zombie.seeds) == asked


def test_a_server_that_wakes_during_the_same_generation_is_not_read(start: Start) -> None:
    zombie = start_stopping(start, 0, lambda seed: choice([30, 31, 32]))
    woken = threading.Event()

    def slow(seed: int | None) -> Answer:
        if seed is not None and not woken.is_set():
            threading.Event().wait(0.1)
            if zombie.address not in pool.members.serving:
                zombie.wake()
                woken.set()
        return by_seed(seed)

    good = start(slow)
    pool = pool_of(zombie, good)
    assert_whole(pool.generate(PROMPTS, SAMPLING, 4))
    assert woken.is_set() and zombie.seeds


def test_a_server_that_vanished_with_requests_in_flight_is_taken_out(start: Start) -> None:
    def vanishes(seed: int | None) -> Answer:
        gone.stop()
        gone.close()
        return by_seed(seed)

    gone, good, said = start(vanishes), start(by_seed), []
    assert_whole(pool_of(gone, good, said=said).generate(PROMPTS, SAMPLING, 4))
    assert gone.seeds
    assert len(said) == 1 and "(ConnectionRefusedError" in said[0] and gone.address in said[0]


def test_a_busy_server_whose_probe_waits_behind_requests_stays(start: Start) -> None:
    busy = start(by_seed)
    busy.stop()

    def work() -> None:
        for _ in range(140):
            threading.Event().wait(0.05)
            busy.num_generated_tokens += 10
        busy.wake()

    worker = threading.Thread(target=work)
    worker.start()
    said: list[str] = []
    patient = Liveness(
        interval_s=LIVENESS.interval_s, timeout_s=5
    )  # the counter may stand that long on a busy machine
    assert_whole(pool_of(busy, said=said, liveness=patient).generate(PROMPTS, SAMPLING, 4))
    worker.join()
    assert busy.num_probes > 0 and said == []


def test_errors_of_a_live_server_are_retried_elsewhere_and_then_raised(start: Start) -> None:
    unlucky = SEEDS[7]
    weak, good = start(lambda seed: 503 if seed == unlucky else by_seed(seed)), start(by_seed)
    pool = pool_of(weak, good)
    assert_whole(pool.generate(PROMPTS, SAMPLING, 4))
    assert len(pool.members.serving) == 2
    alone = pool_of(weak, retries=2)
    before = weak.seeds.count(unlucky)
    with pytest.raises(PoolError, match="answered 503"):
        alone.generate(PROMPTS, SAMPLING, 4)
    assert weak.seeds.count(unlucky) - before == 3
    assert alone.members.serving == (weak.address,)


def test_a_passing_error_is_survived_by_the_only_server(start: Start) -> None:
    failures = iter([500, 503])
    server = start(lambda seed: next(failures, by_seed(seed)) if seed == SEEDS[7] else by_seed(seed))
    assert_whole(pool_of(server).generate(PROMPTS, SAMPLING, 4))
    assert server.seeds.count(SEEDS[7]) == 3


def test_a_response_that_was_given_up_is_asked_again(start: Start) -> None:
    aborted = iter([choice([11], "abort"), choice([], "abort")])
    server = start(lambda seed: next(aborted, by_seed(seed)) if seed == SEEDS[3] else by_seed(seed))
    assert_whole(pool_of(server).generate(PROMPTS, SAMPLING, 4))


def test_a_request_that_takes_too_long_is_sent_to_another_server(start: Start) -> None:
    never = threading.Event()

    def holds_one(seed: int | None) -> Answer:
        if seed == SEEDS[0]:
            never.wait(20)
        return by_seed(seed)

    slow, good = start(holds_one), start(by_seed)
    pool = VllmPool([slow.address, good.address], "t", 0.5, 1, LIVENESS)
    assert_whole(pool.generate(PROMPTS, SAMPLING, 4))
    assert pool.members.serving == (slow.address, good.address)
    never.set()


def test_a_refused_request_is_not_sent_again(start: Start) -> None:
    server = start(lambda seed: 400 if seed == SEEDS[2] else by_seed(seed))
    with pytest.raises(PoolError, match="answered 400"):
        pool_of(server).generate(PROMPTS, SAMPLING, 4)
    assert server.seeds.count(SEEDS[2]) == 1


def test_a_restarted_server_is_not_used_before_a_push(start: Start) -> None:
    good, restarted, said = start(by_seed), start(by_seed), []
    restarted.version = "default"
    pool = pool_of(restarted, good, said=said)
    assert_whole(pool.generate(PROMPTS, SAMPLING, 4))
    assert restarted.seeds == []
    assert len(said) == 1 and "holds weight version default, expected 4" in said[0]
    alone = pool_of(restarted)
    with pytest.raises(StaleWeights, match="holds weight version default, expected 4"):
        alone.generate(PROMPTS, SAMPLING, 4)


def test_a_server_that_was_restarted_during_generation_is_not_used(start: Start) -> None:
    good, said = start(by_seed), []
    restarted = start(lambda seed: choice([30, 31, 32], version="default"))
    assert_whole(pool_of(restarted, good, said=said).generate(PROMPTS, SAMPLING, 4))
    assert len(said) == 1 and "with weight versions ['default'], expected 4 alone" in said[0]


def test_no_server_left_names_the_last_reason_of_each(start: Start) -> None:
    stopped, broken = start_stopping(start, 3, by_seed), start(lambda seed: 500)
    pool = pool_of(stopped, broken)
    with pytest.raises(NoServersLeft) as caught:
        pool.generate(PROMPTS, SAMPLING, 4)
    message = str(caught.value)
    assert f"{stopped.address} did not generate one token within" in message
    assert f"{broken.address} answered 500" in message
    with pytest.raises(NoServersLeft):
        pool.generate(PROMPTS, SAMPLING, 4)


def test_a_push_is_offered_to_all_that_are_alive_and_decides_who_serves(start: Start) -> None:
    first, second, dead = start(by_seed), start(by_seed), start(by_seed)
    dead.close()
    said: list[str] = []
    pool = pool_of(first, second, dead, said=said)
    pool.members.take_out(second.address, UserError("it slept"))
    assert pool.alive() == (first.address, second.address)
    assert pool.members.serving == (first.address,)  # alive is not yet proved
    pool.members.settle((second.address,), {first.address: "canary failed"})
    assert pool.members.serving == (second.address,)
    assert pool.members.out[first.address] == "canary failed"
    assert "cannot reach" in pool.members.out[dead.address]
    assert said == [
        f"warning: inference server {second.address}: it slept; it is out until it takes part in a weight push",
        f"warning: {pool.members.out[dead.address]}; it is out until it takes part in a weight push",
        f"warning: inference server {first.address}: canary failed; it is out until it takes part in a weight push",
        f"inference server {second.address} serves again: it holds the pushed weights",
    ]


def test_members_that_no_push_proved_do_not_serve() -> None:
    members = Members(["http://a", "http://b"])
    members.settle(("http://b",), {})
    assert members.serving == ("http://b",)
    assert members.out == {"http://a": "it took no part in the last weight push"}
