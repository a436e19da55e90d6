"""Starts and stops one vLLM server on this machine; `supervisor.py` keeps several of them running."""

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import rto_megatron
from rto_megatron.config.training import Fp32Part
from rto_megatron.errors import MachineError, ModelFolderError, PoolError, UserError, refuse_if
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.generation.vllm.gate import TOKEN_FILE_VARIABLE, read_token
from rto_megatron.generation.vllm.start.server_environment import environment_problems, mended
from rto_megatron.generation.vllm.start.server_log import keep_log_before, why_it_ended
from rto_megatron.models.model_folder import code_problems, misnamed, pattern_problems

Progress = Callable[[str], None]

_WORKER = "rto_megatron.generation.vllm.worker"
# Weights of 70B from a network disk take a quarter of an hour, and compilation minutes more.
START_LIMIT_S = 1800.0
# As vLLM names them.
DTYPES: Mapping[str, Literal["float32", "bfloat16"]] = {"fp32": "float32", "bf16": "bfloat16"}
_PR_SET_PDEATHSIG = 1
_UNBOUND = "nobind"
_CPU_KV_CACHE = "256M"  # bytes: a hundred thousand tokens of models of the size that is trained without a GPU


@dataclass(frozen=True)
class NodeGroup:
    """This machine's part of a server that is larger than one; vLLM's own multi-node mode.

    Args:
        num_nodes: machines of the server, which share its tensor parallelism evenly.
        rank: this machine's; 0 has the HTTP server, the others only workers.
        leader: host:port, on the machine of rank 0, where all workers meet.

    Example:
        NodeGroup(num_nodes=2, rank=0, leader="10.0.0.2:29500")
    """

    num_nodes: int
    rank: int
    leader: str


@dataclass(frozen=True)
class ServerOptions:
    """One vLLM server, or one machine's part of it.

    Args:
        model: Hugging Face folder; config.json is enough unless `load_weights`.
        token_file: bearer token of the pool; made with mode 0600 when absent.
        log_file: receives everything the server prints.
        host: address to listen on; loopback unless the trainer runs on another machine.
        port: None picks a free one.
        dtype: must be the dtype the trainer sends, pushes in another one are refused.
        fp32_parts: of a bf16 model, as `precision.fp32_parts` of the trainer.
        load_weights: read the folder's weights; otherwise they are random until the first push.
        max_model_len: tokens of prompt and response together; None takes the model's limit.
        tensor_parallel: devices per server.
        gpu_memory_fraction: share of each GPU's memory; None leaves vLLM's default. Not used without a GPU.
        can_sleep: gives its memory back when told to (`phases.py`). Without a GPU it only obeys.
        visible_gpus: CUDA_VISIBLE_DEVICES of the server; None leaves this process's own.
        group: None where the whole server is on this machine.
        worker_extension: class that vLLM mixes into its workers, derived from `RtoWorkerExtension`; None: what
            `fp32_parts` need.

    Example:
        ServerOptions(Path("models/sft"), Path("pool/token"), Path("pool/server-0.log"))
    """

    model: Path
    token_file: Path
    log_file: Path
    host: str = "127.0.0.1"
    port: int | None = None
    dtype: Literal["fp32", "bf16"] = "bf16"
    fp32_parts: Sequence[Fp32Part] = ()
    load_weights: bool = False
    max_model_len: int | None = None
    tensor_parallel: int = 1
    gpu_memory_fraction: float | None = None
    can_sleep: bool = False
    visible_gpus: str | None = None
    group: NodeGroup | None = None
    worker_extension: str | None = None


@dataclass(frozen=True)
class Server:
    """A started server process, the leader of its own process group.

    Example:
        print(server.address, server.why_it_ended())
    """

    address: str
    process: subprocess.Popen[bytes]
    token_file: Path
    log_file: Path
    # Bound to its port, so that nobody is given it before the server listens.
    claim: socket.socket | None = None

    def why_it_ended(self) -> str:
        """The first error in what it printed, or the end of it, for a message."""
        return why_it_ended(self.log_file)


def ensure_token_file(token_file: Path) -> None:
    """Makes a token file readable only by its owner; keeps an existing one."""
    if token_file.exists():
        read_token(token_file)
        return
    token_file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def start_server(options: ServerOptions) -> Server:
    """Starts a server process and returns at once; call `wait_until_ready` next and `stop_server` in the end.

    Raises:
        UserError: no model there, the port is taken, the token file is not private, or vLLM cannot run here.
    """
    if not (options.model / "config.json").is_file():
        raise ModelFolderError(f"{misnamed(options.model)}; rollout servers need a Hugging Face model folder")
    of_model = [
        *code_problems(options.model),
        *(pattern_problems(options.model) if options.load_weights else []),
    ]
    of_machine = environment_problems([options.tensor_parallel], os.environ)
    kind = ModelFolderError if of_model else MachineError
    refuse_if([*of_model, *of_machine], "the pool does not start", kind)
    ensure_token_file(options.token_file)
    claim = _claim_port(options.host, options.port)
    port = claim.getsockname()[1]
    keep_log_before(options.log_file)
    set_death_signal = _death_signal_setter()
    with options.log_file.open("wb") as log:
        process = subprocess.Popen(
            _command(options, port),
            env=_environment(options),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=set_death_signal,  # noqa: PLW1509  (one system call, no lock of Python is taken)
        )
    return Server(f"http://{options.host}:{port}", process, options.token_file, options.log_file, claim)


def wait_until_ready(
    server: Server, timeout_s: float = START_LIMIT_S, progress: Progress | None = None
) -> None:
    """Returns when the server has generated a token; reports the seconds waited about every 5 s.

    Raises:
        PoolError: the server ended or took longer than `timeout_s`, with the end of its log.
    """
    started = reported = time.monotonic()
    with ServerClient(server.address, read_token(server.token_file), timeout_s=30) as client:
        while True:
            if server.process.poll() is not None:
                raise PoolError(
                    f"inference server {server.address} ended while starting; {server.why_it_ended()}"
                )
            waited = time.monotonic() - started
            if waited > timeout_s:
                raise PoolError(
                    f"inference server {server.address} not ready after {waited:.0f} s; {server.why_it_ended()}"
                )
            try:
                client.request("GET", "/health", timeout_s=2)
                client.check_alive()
                return
            except UserError:
                time.sleep(0.3)
            if progress is not None and time.monotonic() - reported > 5:
                reported = time.monotonic()
                progress(f"inference server {server.address} is starting, {waited:.0f} s")


def label_weights(server: Server, version: int) -> None:
    """Names the weights that a server read from its folder, so that an engine can ask for them.

    A server calls them what it calls random ones, "default", and one that is started again does so too.
    """
    with ServerClient(server.address, read_token(server.token_file), timeout_s=30) as client:
        client.request("POST", "/update_weight_version", {"new_version": str(version)})


def stop_server(server: Server, grace_s: float = 15) -> None:
    """Ends the server and every process of its group; safe to call twice."""
    for stop_signal, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        if not _signal_group(server.process.pid, stop_signal):
            break
        try:
            server.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    # Worker processes can outlive the leader.
    _signal_group(server.process.pid, signal.SIGKILL)
    server.process.wait()
    if server.claim is not None:
        server.claim.close()


def _claim_port(host: str, port: int | None) -> socket.socket:
    """Binds a port without listening: a server may listen on it, and the kernel gives it to nobody else meanwhile."""
    claim = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        claim.bind((host, port or 0))
    except OSError as error:
        claim.close()
        raise MachineError(
            f"cannot listen on {host}:{port} ({error.strerror}); stop what uses it or choose another port"
        ) from error
    return claim


def _command(options: ServerOptions, port: int) -> list[str]:
    has_gpu = torch.cuda.is_available()
    group = options.group
    if group is None or group.rank == 0:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(options.model)]
    else:
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            str(options.model),
            "--headless",
        ]
    if group is not None:
        host, _, meeting_port = group.leader.rpartition(":")
        command += ["--nnodes", str(group.num_nodes), "--node-rank", str(group.rank)]
        command += ["--master-addr", host, "--master-port", meeting_port]
    command += ["--served-model-name", "policy", "--tokens-only"]
    command += ["--host", options.host, "--port", str(port), "--disable-uvicorn-access-log"]
    command += ["--dtype", DTYPES[options.dtype], "--tensor-parallel-size", str(options.tensor_parallel)]
    command += ["--middleware", "rto_megatron.generation.vllm.gate.BearerGate"]
    command += ["--weight-transfer-config", '{"backend": "rto"}']
    command += ["--worker-extension-cls", options.worker_extension or _extension(options)]
    if "head" in options.fp32_parts:
        command += ["--hf-overrides", '{"head_dtype": "float32"}']
    # Of what is sampled from: without end-of-sequence where min_tokens bans it, as the trainer takes its own.
    command += ["--logprobs-mode", "processed_logprobs"]
    # Each answer says how much of its prompt came from the cache.
    command += ["--enable-prompt-tokens-details"]
    if not options.load_weights:
        command += ["--load-format", "dummy"]
    if options.max_model_len is not None:
        command += ["--max-model-len", str(options.max_model_len)]
    if has_gpu and options.gpu_memory_fraction is not None:
        command += ["--gpu-memory-utilization", str(options.gpu_memory_fraction)]
    if has_gpu and options.can_sleep:  # vLLM refuses the flag without one, and has the routes all the same
        command += ["--enable-sleep-mode"]
    if not has_gpu:
        # A prefill cut in two discards the token sampled at the cut and rewinds the request's generator with
        # Generator.set_offset (vllm/v1/worker/gpu_model_runner.py), which CPU generators lack: one seeded
        # request too many in a batch would kill the engine. Whole prefills never rewind.
        command += ["--no-enable-chunked-prefill", "--enforce-eager"]
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:  # whole GiB, all of which vLLM takes at once
            command += ["--kv-cache-memory-bytes", _CPU_KV_CACHE]
    if not has_gpu and options.tensor_parallel == 1 and _cpu_binding() == _UNBOUND:
        # The engine computes in its own process, as it does with one GPU. On a CPU vLLM would move the model to another
        # one, for the sake of thread binding alone, and both would spin on the queue between them for as much
        # CPU time as the model takes. Under its short name, "uni", vLLM overrides the choice.
        command += ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
    return command


def _extension(options: ServerOptions) -> str:
    wide = "residual" in options.fp32_parts and options.dtype != "fp32"
    return f"{_WORKER}.{'fp32_residual.Fp32ResidualExtension' if wide else 'plugin.RtoWorkerExtension'}"


def _cpu_binding() -> str:
    return os.environ.get("VLLM_CPU_OMP_THREADS_BIND", _UNBOUND)


def _environment(options: ServerOptions) -> dict[str, str]:
    environment, _ = mended(os.environ)
    # A start imports torch and vLLM in three processes; without byte code that takes minutes.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # The launcher's torchrun variables would make the server look like a trainer rank.
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_USE_AGENT_STORE",
    ):
        environment.pop(name, None)
    package_root = str(Path(rto_megatron.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [package_root, environment.get("PYTHONPATH", "")])
    )
    if options.visible_gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = options.visible_gpus
    environment[TOKEN_FILE_VARIABLE] = str(options.token_file.resolve())
    environment |= {
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that pause and update weights exist only then
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if options.host == "127.0.0.1":
        environment |= {"VLLM_HOST_IP": "127.0.0.1", "VLLM_LOOPBACK_IP": "127.0.0.1"}
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        environment["VLLM_HOST_IP"] = options.host
    if not torch.cuda.is_available():
        # Inductor would compile at the first request, even with eager mode.
        environment["TORCHDYNAMO_DISABLE"] = "1"
        environment.setdefault("OMP_NUM_THREADS", "1")
        # A server on a CPU shares it with ranks; threads that spin would keep the cores that those compute on.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # A push fills as much fresh memory as the model has, and pages of 4 KiB cost more than the bytes in them.
        environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        environment["VLLM_CPU_OMP_THREADS_BIND"] = _cpu_binding()
    return environment


def _death_signal_setter() -> Callable[[], None]:
    """A server must not outlive a launcher that was killed: the kernel then sends it SIGTERM."""
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _signal_group(group: int, which: signal.Signals) -> bool:
    try:
        os.killpg(group, which)
    except ProcessLookupError:
        return False
    return True
