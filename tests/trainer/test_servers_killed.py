"""Real vLLM servers that are stopped and killed while a run samples from them."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from pool_server import PoolServer
from ranks import run_ranks
from trainer.pool_runs import TOLERANCE
from trainer.tiny_runs import configure, join

from rto_megatron.config.schema import ReinforcementStage
from rto_megatron.errors import UserError
from rto_megatron.generation.vllm.client.server_client import ServerClient, open_headers
from rto_megatron.reporting.metrics import read_metrics
from rto_megatron.trainer.online import train_online

pytestmark = [pytest.mark.pool, pytest.mark.slow]


@dataclass(frozen=True)
class OwnPool:
    """`rto pool` with one server beside the session's, whose token and model it has."""

    process: psutil.Process
    address: str
    token: str
    output: Path

    def server(self) -> psutil.Process:
        """The API server of the moment."""
        (child,) = self.process.children()
        return child

    def engine(self) -> psutil.Process:
        """Its engine, the process that computes."""
        (engine,) = (one for one in self.server().children() if "EngineCore" in one.name())
        return engine

    def wait_until_alive(self) -> None:
        """Returns when the server generates."""
        with ServerClient(self.address, self.token, 5) as client:
            for _ in range(600):
                try:
                    client.check_alive()
                    return
                except UserError:
                    time.sleep(0.3)
        raise AssertionError(f"{self.address} did not come back: {self.output.read_text()}")


@pytest.fixture(scope="module")
def own_pool(pool_server: PoolServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnPool]:
    folder = tmp_path_factory.mktemp("own_pool")
    command = [sys.executable, "-m", "rto_megatron.cli.main", "pool", str(pool_server.model)]
    command += ["--token-file", str(pool_server.token_file), "--address-file", str(folder / "address")]
    command += ["--log-file", str(folder / "log"), "--dtype", "fp32", "--max-model-len", "256"]
    with (folder / "output").open("wb") as output:
        started = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    process = psutil.Process(started.pid)
    while not (folder / "address").exists():
        assert started.poll() is None, (folder / "output").read_text()
        time.sleep(0.2)
    yield OwnPool(process, (folder / "address").read_text().strip(), pool_server.token, folder / "output")
    family = process.children(recursive=True)
    process.terminate()
    assert started.wait(60) == 0
    assert [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []


def settings(run_dir: Path, files: Path, token_file: Path, *servers: str, steps: int) -> ReinforcementStage:
    return configure(
        "rto",
        files,
        run_dir,
        run__steps=steps,
        run__save_every=None,
        rollout__servers=servers,
        rollout__token_file=token_file,
        rollout__logprob_tolerance=TOLERANCE,
        rollout__sync_timeout_s=60.0,
        rollout__probe_interval_s=4.0,
        rollout__probe_timeout_s=3.0,
        sampling__min_response_tokens=120,
        sampling__max_response_tokens=120,
    )


@dataclass(frozen=True)
class Strike:
    """What happens to `address` while it generates, once the run has logged a step with so many servers."""

    servers: int
    address: str
    token: str
    act: Callable[[], None]


def strikes_at(run_dir: Path, strike: Strike) -> None:
    """Waits for the moment and acts."""
    while not (run_dir / "metrics.jsonl").exists() or all(
        entry["pool/servers"] != strike.servers for entry in read_metrics(run_dir)
    ):
        time.sleep(0.01)
    with httpx.Client(headers=open_headers(strike.token)) as http:
        while num_running(http, strike.address) == 0:
            time.sleep(0.002)
    print(f"strike at {strike.address} after {len(read_metrics(run_dir))} steps", flush=True)
    strike.act()


def num_running(http: httpx.Client, address: str) -> float:
    """Requests that the server's engine works on."""
    lines = http.get(f"{address}/metrics").text.splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running")
    )


def train(config: ReinforcementStage, *strikes: Strike) -> tuple[str, str] | None:
    """Runs as one rank beside the strikes; kind and text of the error for the user that ended it."""

    def strike_all() -> None:
        for strike in strikes:
            strikes_at(config.run.dir, strike)

    threading.Thread(target=strike_all, daemon=True).start()
    try:
        train_online(config, join(config))
    except UserError as error:
        return type(error).__name__, str(error)
    return None


def sampled_with_every_step(run_dir: Path) -> list[float]:
    """Checks every step of a run; returns the number of servers that each began with."""
    metrics = read_metrics(run_dir)
    servers = [entry["pool/servers"] for entry in metrics]
    print("servers", servers, "seconds", [round(entry["time/sample_s"], 1) for entry in metrics])
    assert max(entry["pool/logprob_gap_max"] for entry in metrics) < TOLERANCE
    assert {entry["rollout/response_tokens"] for entry in metrics} == {120}
    return servers


def test_a_stopped_engine_is_left_out_and_takes_part_again_after_a_push(
    pool_files: Path,
    pool_server: PoolServer,
    own_pool: OwnPool,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    engine, token = own_pool.engine(), pool_server.token

    def stop() -> None:
        engine.send_signal(signal.SIGSTOP)
        answer = httpx.get(f"{own_pool.address}/health", headers=open_headers(token), timeout=5)
        print(f"health of the stopped engine: {answer.status_code}", flush=True)

    strikes = (
        Strike(2, own_pool.address, token, stop),
        Strike(1, pool_server.address, token, lambda: engine.send_signal(signal.SIGCONT)),
    )
    servers = (pool_server.address, own_pool.address)
    config = settings(tmp_path / "run", pool_files, pool_server.token_file, *servers, steps=5)
    try:
        assert run_ranks(1, train, config, *strikes, timeout_seconds=200) == [None]
    finally:
        engine.send_signal(signal.SIGCONT)
    shown = capfd.readouterr().out
    print(shown)
    served = sampled_with_every_step(tmp_path / "run")
    assert (served[0], min(served), served[-1]) == (2, 1, 2)
    (line,) = (line for line in shown.splitlines() if "it is out until" in line)
    assert line.startswith(
        f"warning: inference server {own_pool.address} did not generate one token within 3 s"
    )
    assert f"inference server {own_pool.address} serves again" in shown


def test_a_run_whose_only_server_was_killed_goes_on_with_the_restarted_one(
    pool_files: Path,
    pool_server: PoolServer,
    own_pool: OwnPool,
    tmp_path: Path,
) -> None:
    def config(name: str, address: str) -> ReinforcementStage:
        return settings(tmp_path / name, pool_files, pool_server.token_file, address, steps=3)

    lost = config("lost", own_pool.address)
    killed = own_pool.engine()
    ((kind, message),) = run_ranks(
        1, train, lost, Strike(1, own_pool.address, pool_server.token, killed.kill), timeout_seconds=200
    )
    print(message)
    assert kind == "NoServersLeft"
    assert message.startswith("no inference server is left to sample from: ")
    assert own_pool.address in message.splitlines()[0]
    saved = len(read_metrics(tmp_path / "lost"))
    assert f"step {saved} is saved in {tmp_path / 'lost'}; start the pool again" in message
    assert [path.name for path in (tmp_path / "lost/checkpoints").glob("step_*")] == [f"step_{saved:06d}"]
    begun = time.monotonic()
    own_pool.wait_until_alive()
    print(f"restarted within {time.monotonic() - begun:.0f} s")
    assert "ended with status 0; starting it again (1 of 5)" in own_pool.output.read_text()
    with ServerClient(own_pool.address, own_pool.token, 5) as client:
        assert client.weight_version() == "default"
    assert run_ranks(1, train, lost, timeout_seconds=200) == [None]
    assert sampled_with_every_step(tmp_path / "lost") == [1, 1, 1]
    whole = config("whole", pool_server.address)
    assert run_ranks(1, train, whole, timeout_seconds=200) == [None]
    for one, other in zip(read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "lost"), strict=True):
        assert one["objective/scores"] == other["objective/scores"], "the same responses, whoever gave them"
    ours, theirs = (
        [file.read_bytes() for file in sorted((tmp_path / name / "hf").glob("*.safetensors"))]
        for name in ("whole", "lost")
    )
    print("parameters bit-equal to the undisturbed run:", ours == theirs)


def test_a_killed_api_server_leaves_its_requests_to_the_other(
    pool_files: Path,
    pool_server: PoolServer,
    own_pool: OwnPool,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server, orphan = own_pool.server(), own_pool.engine()
    strike = Strike(2, own_pool.address, pool_server.token, lambda: os.kill(server.pid, signal.SIGKILL))
    servers = (pool_server.address, own_pool.address)
    config = settings(tmp_path / "run", pool_files, pool_server.token_file, *servers, steps=4)
    assert run_ranks(1, train, config, strike, timeout_seconds=200) == [None]
    shown = capfd.readouterr().out
    print(shown)
    served = sampled_with_every_step(tmp_path / "run")
    assert (served[0], served[-1]) == (2, 1)
    (line,) = (line for line in shown.splitlines() if "it is out until" in line)
    assert line.startswith("warning: ") and own_pool.address in line
    psutil.wait_procs([orphan], timeout=30)
    assert not orphan.is_running(), "the supervisor ends what a killed server leaves"
