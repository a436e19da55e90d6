"""Ports: the meeting point of the ranks, listeners of ours that the whole network reaches, and the pool's servers."""

import os
import secrets
import socket
from collections.abc import Iterator

import psutil

from rto_megatron.config.rollouts import RolloutConfig
from rto_megatron.diagnosis.finding import Finding
from rto_megatron.errors import UserError
from rto_megatron.generation.vllm.client.server_client import ServerClient
from rto_megatron.generation.vllm.gate import read_token

_DEFAULT_PORT = 29500  # torchrun's
_WILDCARDS = ("0.0.0.0", "::")
_OURS = ("rto_megatron", "vllm", "bin/rto ")
_ANSWER_WITHIN_S = 10.0


def check_rendezvous() -> list[Finding]:
    """The meeting point's name has an address; its port is free, where no torchrun runs yet."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", _DEFAULT_PORT))
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as error:
        why = "ranks meet there, and would wait until their time is up"
        fix = "export MASTER_ADDR=<a name or address that every machine of the job resolves>"
        return [Finding("rendezvous", "problem", f"MASTER_ADDR={host} has no address: {error}", why, fix)]
    if "RANK" in os.environ:
        return [Finding("rendezvous", "ok", f"ranks meet at {host}:{port}")]
    try:
        with socket.socket(socket.AF_INET6 if ":" in str(address) else socket.AF_INET) as listener:
            # As torch does: a port whose last user has just ended counts as free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
    except OSError as error:
        found = f"{host}:{port} cannot be listened on: {error.strerror}"
        why = "torchrun for several machines meets there (MASTER_PORT, --rdzv-endpoint); rto launch takes a free port"
        return [
            Finding(
                "rendezvous", "warning", found, why, f"ss -ltnp 'sport = :{port}', or another MASTER_PORT"
            )
        ]
    return [Finding("rendezvous", "ok", f"{host}:{port} is free")]


def check_listeners() -> list[Finding]:
    """Processes of this user and of this package that listen on every interface; this job's own are left out."""
    mine = {process.pid for process in [*psutil.Process().parents(), psutil.Process()]}
    open_to_all = []
    for process in psutil.process_iter(["pid", "uids", "cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        is_ours = process.info["uids"] is not None and process.info["uids"].real == os.getuid()
        if process.pid in mine or not is_ours or not any(name in command for name in _OURS):
            continue
        open_to_all += [f"port {port} of process {process.pid}" for port in _wildcard_ports(process)]
    if not open_to_all:
        return [Finding("listeners", "ok", "no server or rank of ours listens on every interface")]
    why = (
        "everybody on the network reaches them; a torch store has no password, and a pool has its token alone"
    )
    fix = "rto pool --host <one address>; for ranks of one machine rto launch, or torchrun --standalone"
    return [Finding("listeners", "warning", f"on every interface: {', '.join(open_to_all)}", why, fix)]


def _wildcard_ports(process: psutil.Process) -> Iterator[int]:
    try:
        connections = process.net_connections("tcp")
    except psutil.Error:  # it ended meanwhile
        return
    for one in connections:
        if one.status == psutil.CONN_LISTEN and one.laddr.ip in _WILDCARDS:
            yield one.laddr.port


def check_pool(rollout: RolloutConfig) -> list[Finding]:
    """Every server generates with the token, and refuses another one."""
    if not rollout.servers:
        return [Finding("pool", "ok", "rollout.servers is empty: rto launch starts a pool")]
    if rollout.token_file is None:
        why = "every request to a server needs the pool's token"
        fix = "rollout.token_file=<the file that rto pool --token-file was given>"
        return [Finding("pool", "problem", "rollout.servers is set and rollout.token_file is not", why, fix)]
    token = read_token(rollout.token_file)
    return [_check_server(address, token) for address in rollout.servers]


def _check_server(address: str, token: str) -> Finding:
    try:
        with ServerClient(address, token, _ANSWER_WITHIN_S) as client:
            version = client.weight_version()
            client.check_alive()
    except UserError as error:
        why = "the run would start without this server, and not at all without any"
        return Finding("pool", "problem", str(error), why, "rto pool MODEL --token-file FILE, and name both")
    if _answers_anybody(address):
        why = "whoever reaches it may replace the weights"
        fix = "start it with rto pool, whose servers demand the token on every route"
        return Finding("pool", "problem", f"{address} answers to any token", why, fix)
    return Finding("pool", "ok", f"{address} answers to the token alone; weight version {version}")


def _answers_anybody(address: str) -> bool:
    try:
        with ServerClient(address, secrets.token_hex(32), _ANSWER_WITHIN_S) as stranger:
            stranger.weight_version()
    except UserError:
        return False
    return True
