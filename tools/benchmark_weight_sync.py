#!/usr/bin/env python
"""Weight pushes into real vLLM servers beside a raw broadcast of the same bytes among the same processes, in one run.

Usage: .venv/bin/python tools/benchmark_weight_sync.py [--megabytes 50 200 800] [--layouts tp1 tp2 pp2] [--rounds 7]

For every size two servers of one worker each are started, for every layout the ranks of a trainer; they push to the
first server and then to both. A round is one raw broadcast (the buckets of the push in the same order from the same
ranks, two on their way at a time, nothing packed, digested or kept) and one push as a training step does it, in turns
which goes first. The first push, which opens the communicator and rehearses the load, is not counted.

send: from the first request for the weights to their proof in host memory. push: pause to resume, all proofs and the
commit included, without the canary, whose seconds are apart. Digests: seconds of the slowest sender plus the slowest
worker, as a share of the push. CPU: of all ranks and workers. Memory: peak of resident memory during a push above the
moment before it, of the rank and of the worker with the most.

A second table has the seconds per GB of weights by part, each of the slowest sender or worker, beside this machine's
limits: digest (of the weights, or of what arrived), pack (the copy into a bucket), transport (waiting for a bucket),
stage (keeping what arrived), load (vLLM's own, and waiting for the others), read back (digests of what was loaded).
Sender and worker work at the same time until the load. All ranks, servers and the benchmark share this machine's
cores. About ten minutes.
"""

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from weight_sync_measures import Meter, OwnShare, PartClock, RawBroadcast, limits

from rto_megatron.config.rollouts import RolloutConfig
from rto_megatron.config.training import FrozenPrecisionConfig, ParallelConfig
from rto_megatron.errors import UserError
from rto_megatron.generation.vllm.client.server_client import Json, ServerClient
from rto_megatron.generation.vllm.gate import read_token
from rto_megatron.generation.vllm.start.server import (
    ServerOptions,
    start_server,
    stop_server,
    wait_until_ready,
)
from rto_megatron.models.config_files import config_of
from rto_megatron.models.parameters import num_parameters
from rto_megatron.models.shape import ModelShape
from rto_megatron.platform.device import Device, prepare
from rto_megatron.weight_sync import sender
from rto_megatron.weight_sync.manifest import Manifest
from rto_megatron.weight_sync.shared import open_communicator
from rto_megatron.weight_sync.transport import LOOPBACK, Communicator, Rendezvous, listen

_LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}
_VOCABULARY = 8192
_NUM_SERVERS = 2
_TIMEOUT_S = 300.0
_SENDER_PARTS = ("digest", "pack", "transport")
_WORKER_PARTS = ("transport", "digest", "stage", "load", "read back")
_LIMITS = ("copy into fresh pages", "copy into touched pages", "read", "digest")


@dataclass(frozen=True)
class Round:
    """Seconds of one raw broadcast and of one push, and what the push took; memory in bytes.

    `sender` and `worker` are seconds by part, of the slowest of each; `limits` are seconds per GB.
    """

    raw_s: float
    pause_s: float
    send_s: float
    commit_s: float
    canary_s: float
    cpu_s: float
    trainer_bytes: int
    worker_bytes: int
    sender: dict[str, float]
    worker: dict[str, float]
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def push_s(self) -> float:
        """Pause to resume without the canary."""
        return self.pause_s + self.send_s + self.commit_s

    @property
    def digest_s(self) -> float:
        """Of the slowest sender and the slowest worker."""
        return self.sender["digest"] + self.worker["digest"] + self.worker["read back"]


def _shape(megabytes: float) -> ModelShape:
    hidden, ffn, heads, kv_heads = (512, 1408, 8, 2) if megabytes < 100 else (1024, 2816, 16, 4)

    def of(layers: int) -> ModelShape:
        return ModelShape(
            "llama", layers, hidden, ffn, heads, kv_heads, 64, _VOCABULARY, 512, 1e-5, 10000.0, None, False, 0.02
        )  # fmt: skip

    ends, two = num_parameters(of(0), False), num_parameters(of(2), False)
    return of(2 * max(1, round((megabytes * 1e6 / 2 - ends) / (two - ends))))


class Rank:
    """One trainer rank: a policy of random numbers and its pushes."""

    def __init__(self, folder: Path, servers: tuple[str, ...], bucket_mb: int, device: Device) -> None:
        # These import Megatron, for which `prepare` has made the process ready.
        from rto_megatron.engine.build_roles import build_frozen
        from rto_megatron.engine.source import find_source
        from rto_megatron.parallel.topology import Topology
        from rto_megatron.trainer.connected_pool import connect_pool
        from rto_megatron.weight_sync.policy_weights import PolicySource

        tensor, pipeline = _LAYOUTS[os.environ["BENCHMARK_LAYOUT"]]
        self.topology = Topology.init(device, ParallelConfig(tensor=tensor, pipeline=pipeline), seed=0)
        source = find_source(folder / "model", False, is_random=True, key="model")
        policy = build_frozen("policy", source, False, FrozenPrecisionConfig(dtype="bf16"), self.topology)
        config = RolloutConfig(
            servers=servers, token_file=folder / "token", bucket_mb=bucket_mb, sync_timeout_s=_TIMEOUT_S
        )
        self.servers = servers
        self._token = read_token(folder / "token")
        self._push = connect_pool(config, policy).push
        self._manifest = Manifest(bucket_mb << 20, PolicySource(policy).specs())
        self._raw = self._open_raw()
        self._clock = PartClock()
        self._clock.time(Communicator, "finish", "transport")
        self._clock.time(sender, "digest", "digest")
        self._clock.time(sender, "_pack", "pack")
        self._version = 0

    def _open_raw(self) -> RawBroadcast:
        topology = self.topology
        listener = listen(LOOPBACK) if topology.is_lead else None
        port = listener.getsockname()[1] if listener is not None else 0
        world = topology.world_size
        meeting = Rendezvous(
            LOOPBACK, port, world, world + len(self.servers), secrets.token_hex(8), _TIMEOUT_S,
            topology.device.torch_device.type,
        )  # fmt: skip
        met = Rendezvous.from_json(topology.lead_value(meeting.to_json(), str))
        # Senders are stages x tensor ranks, and with one replica so are ranks.
        communicator = open_communicator(met, topology.rank, topology.device.torch_device, listener)
        with self._all_workers("probe_join", met.to_json(), world, self._manifest.to_json()):
            communicator.join()
        return RawBroadcast(self._manifest, communicator)

    @contextmanager
    def _all_workers(self, method: str, *arguments: str | int) -> Iterator[list[str]]:
        """The lead calls a method of every worker while the body runs; its answers are there afterwards."""
        answers: list[str] = []
        if not self.topology.is_lead:
            yield answers
            return

        def call(index: int) -> str:
            given: list[Json] = [str(one + index) if isinstance(one, int) else one for one in arguments]
            with ServerClient(self.servers[index], self._token, _TIMEOUT_S) as client:
                answer = client.request("POST", "/collective_rpc", {"method": method, "args": given})
            assert isinstance(answer["results"], list)
            (of_worker,) = answer["results"]
            return str(of_worker)

        with ThreadPoolExecutor(len(self.servers)) as threads:
            calls = [threads.submit(call, index) for index in range(len(self.servers))]
            yield answers
            answers += [one.result() for one in calls]

    def raw(self) -> float:
        """Seconds of one raw broadcast."""
        self.topology.barrier()
        begun = time.monotonic()
        with self._all_workers("probe_receive"):
            self._raw.run()
        self.topology.barrier()
        return time.monotonic() - begun

    def push(self) -> Round:
        """One push, with 0 for the raw broadcast."""
        self._version += 1
        with self._all_workers("probe_start"):
            pass
        self.topology.barrier()
        meter = Meter(self._clock)
        said = self._push(self._version)
        own = meter.read().to_json()
        with self._all_workers("probe_stop") as answers:
            pass
        ranks = [OwnShare.from_json(one) for one in self.topology.gather_all(own, str)]
        workers = [OwnShare.from_json(one) for one in answers]
        return Round(
            0.0, said["sync/pause_s"], said["sync/prepare_s"], said["sync/commit_s"], said["sync/canary_s"],
            sum(one.cpu_s for one in (*ranks, *workers)),
            max(one.peak_bytes for one in ranks), max((one.peak_bytes for one in workers), default=0),
            _slowest(ranks, _SENDER_PARTS), _slowest(workers, _WORKER_PARTS),
        )  # fmt: skip


def _slowest(shares: Sequence[OwnShare], parts: Sequence[str]) -> dict[str, float]:
    return {part: max((one.parts.get(part, 0.0) for one in shares), default=0.0) for part in parts}


def _be_a_rank(folder: Path, servers: Sequence[str], bucket_mb: int, rounds: int) -> None:
    """What a trainer rank does: rank 0 prints a line of JSON for each round."""
    device = prepare()
    for count in range(1, len(servers) + 1):
        rank = Rank(folder, tuple(servers[:count]), bucket_mb, device)
        rank.raw()
        rank.push()
        for index in range(rounds):
            raw_s = rank.raw() if index % 2 else 0.0
            push = rank.push()
            raw_s = raw_s or rank.raw()
            if rank.topology.is_lead:
                line = {"servers": count, **asdict(push), "raw_s": raw_s, "limits": limits()}
                print(json.dumps(line), flush=True)


def _run_ranks(
    folder: Path, layout: str, servers: Sequence[str], given: argparse.Namespace
) -> dict[int, list[Round]]:
    """What the ranks print, by the number of servers."""
    tensor, pipeline = _LAYOUTS[layout]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tensor * pipeline}",
        __file__, "--rounds", str(given.rounds), "--bucket-mb", str(given.bucket_mb), "--rank", str(folder), *servers,
    ]  # fmt: skip
    environment = os.environ | {"BENCHMARK_LAYOUT": layout}
    environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the trainer ranks of {layout} failed:\n{done.stderr[-3000:]}")
    rounds: dict[int, list[Round]] = {}
    for line in done.stdout.splitlines():
        if line.startswith('{"servers"'):
            said = json.loads(line)
            rounds.setdefault(said.pop("servers"), []).append(Round(**said))
    return rounds


@contextmanager
def _servers(folder: Path, shape: ModelShape, say: Console) -> Iterator[list[str]]:
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(config_of(shape, False, "bfloat16")))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    )
    started = []
    try:
        for index in range(_NUM_SERVERS):
            options = ServerOptions(
                folder / "model", folder / "token", folder / f"server-{index}.log", dtype="bf16", max_model_len=256,
                visible_gpus=str(2 + index) if torch.cuda.is_available() else None,  # ranks have the first two
                worker_extension="weight_sync_probe.ProbeExtension",
            )  # fmt: skip
            started.append(start_server(options))
        for server in started:
            wait_until_ready(server, progress=say.print)
        yield [server.address for server in started]
    finally:
        for server in started:
            stop_server(server)


def _row(size: float, layout: str, num_servers: int, rounds: Sequence[Round]) -> list[str]:
    def median(values: Iterator[float]) -> float:
        return statistics.median(values)

    raw, send, push = (median(getattr(one, name) for one in rounds) for name in ("raw_s", "send_s", "push_s"))
    return [
        f"{size:.0f}", layout, str(num_servers), f"{raw:.3f}", f"{send:.3f}", f"{push:.3f}",
        f"{median(one.raw_s / one.send_s for one in rounds):.2f}",
        f"{median(one.push_s / one.raw_s for one in rounds):.2f}",
        f"{median(one.digest_s / one.push_s for one in rounds):.1%}",
        f"{median(one.canary_s for one in rounds):.3f}", f"{median(one.cpu_s for one in rounds):.2f}",
        f"{max(one.trainer_bytes for one in rounds) / 1e6:.0f}", f"{max(one.worker_bytes for one in rounds) / 1e6:.0f}",
    ]  # fmt: skip


def _parts_of(size: float, rounds: Sequence[Round]) -> list[str]:
    median, gigabytes = statistics.median, size / 1e3
    seconds = [median(one.sender[part] for one in rounds) for part in _SENDER_PARTS]
    seconds += [median(one.worker[part] for one in rounds) for part in _WORKER_PARTS]
    seconds.append(median(one.push_s for one in rounds))
    per_gb = [one / gigabytes for one in seconds]
    per_gb += [median(one.limits[name] for one in rounds) for name in _LIMITS]
    return [f"{one:.2f}" for one in per_gb]


def _table_of_parts(columns: dict[str, list[str]]) -> Table:
    names = [f"sender: {part}" for part in _SENDER_PARTS] + [f"worker: {part}" for part in _WORKER_PARTS]
    table = Table(title="seconds per GB of weights, by part")
    table.add_column("MB, layout, servers")
    for name in columns:
        table.add_column(name, justify="right")
    for name, *cells in zip(
        [*names, "push", *(f"limit: {name}" for name in _LIMITS)], *columns.values(), strict=True
    ):
        table.add_row(name, *cells)
    return table


def _benchmark(given: argparse.Namespace) -> None:
    say = Console(stderr=True)
    table = Table(title=f"medians of {given.rounds} rounds, buckets of {given.bucket_mb} MiB")
    for name in (
        "MB", "layout", "servers", "raw s", "send s", "push s", "raw/send", "push/raw", "digests", "canary s",
        "CPU s", "trainer +MB", "worker +MB",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    parts: dict[str, list[str]] = {}
    for megabytes in given.megabytes:
        shape = _shape(megabytes)
        size = num_parameters(shape, False) * 2 / 1e6
        with tempfile.TemporaryDirectory() as scratch, _servers(Path(scratch), shape, say) as servers:
            for layout in given.layouts:
                for count, rounds in _run_ranks(Path(scratch), layout, servers, given).items():
                    row = _row(size, layout, count, rounds)
                    say.print(" ".join(row))
                    table.add_row(*row)
                    parts[" ".join(row[:3])] = _parts_of(size, rounds)
    Console(width=140).print(table, _table_of_parts(parts))


def main() -> None:
    """Runs the benchmark, or as a child one rank of a trainer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, nargs="+", default=[50, 200, 800], help="of bf16 weights")
    parser.add_argument(
        "--layouts", nargs="+", choices=_LAYOUTS, default=list(_LAYOUTS), help="of the trainer"
    )
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each")
    parser.add_argument("--bucket-mb", type=int, default=64, help="size of a bucket (rollout.bucket_mb)")
    parser.add_argument("--rank", nargs="+", metavar="ARGUMENT", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if min(given.rounds, given.bucket_mb, *given.megabytes) < 1:
        parser.error("every number must be at least 1")
    try:
        if given.rank:
            folder, *servers = given.rank
            _be_a_rank(Path(folder), servers, given.bucket_mb, given.rounds)
        else:
            _benchmark(given)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")


if __name__ == "__main__":
    main()
