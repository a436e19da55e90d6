"""Variables of the environment that libraries read: what opens a door, and what differs between ranks."""

import os
from collections import defaultdict
from collections.abc import Mapping

from rto_megatron.diagnosis.finding import Finding, Level
from rto_megatron.generation.vllm.start.server_environment import environment_problems, mended
from rto_megatron.launching.torchrun import torchrun_defaults

_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "NVTE_", "UCX_")
_NAMES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
)
# Devices and cores of one machine: another machine may have others.
_OF_ONE_MACHINE = (
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "NCCL_IB_HCA",
    "NCCL_TOPO_FILE",
    "UCX_NET_DEVICES",
    "OMP_NUM_THREADS",
)
_DOORS = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "vLLM unpickles what it receives, which runs code of whoever sent it",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "torch.load runs code out of checkpoints",
    "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE": "TransformerEngine runs code out of checkpoints",
}
_OFF = ("", "0", "false", "no")


def relevant() -> dict[str, str]:
    """Variables that collectives, kernels and loaders read, as this rank has them."""
    names = {name for name in os.environ if name.startswith(_PREFIXES) or name in (*_NAMES, *_DOORS)}
    return {name: os.environ[name] for name in sorted(names)}


def check_doors() -> list[Finding]:
    """Variables that let data run code."""
    opened = [name for name in _DOORS if os.environ.get(name, "").lower() not in _OFF]
    problems = [
        Finding("variables", "problem", f"{name}={os.environ[name]}", _DOORS[name], f"unset {name}")
        for name in opened
    ]
    names = ", ".join(relevant()) or "none"
    return problems or [Finding("variables", "ok", f"set, of those that libraries read: {names}")]


def check_starts() -> list[Finding]:
    """What of the environment, and of the room for sockets and queues, changes or prevents a start."""
    found = torchrun_defaults()
    findings = [
        Finding(
            "starts",
            "warning",
            f"torchrun takes {', '.join(f'{name}={value}' for name, value in found.items())} for its options",
            "a plain torchrun waits for the machines that they announce; rto launch, which is for one machine, refuses "
            "PET_NNODES above 1 and uses none of them",
            f"unset {' '.join(found)}, unless an operator such as Kubeflow's starts one torchrun on each machine",
        )
    ] if found else []  # fmt: skip
    why = "servers of the pool would end while they start"
    findings += [
        Finding("starts", "warning", text, why, "nothing: rto launch and rto pool do so by themselves")
        for text in mended(os.environ)[1]
    ]
    findings += [
        Finding("starts", "problem", text, why, "do as it says")
        for text in environment_problems([1], os.environ)
    ]
    return findings or [Finding("starts", "ok", "nothing here changes what torchrun and the pool are told")]


def compare(name: str, by_rank: Mapping[int, Mapping[str, str]], hosts: Mapping[int, str]) -> list[Finding]:
    """Entries that are not the same on all ranks.

    Args:
        name: of the check.
        by_rank: rank -> entry -> value; an absent entry differs from any value.
        hosts: rank -> machine.
    """
    findings = []
    for entry in sorted({key for values in by_rank.values() for key in values}):
        ranks_of = defaultdict(list)
        for rank, values in by_rank.items():
            ranks_of[values.get(entry)].append(rank)
        if len(ranks_of) == 1:
            continue
        shown = "; ".join(
            f"{'unset' if value is None else value} on {ranks_text(ranks, hosts)}"
            for value, ranks in ranks_of.items()
        )
        level: Level = "warning" if entry in _OF_ONE_MACHINE else "problem"
        why = "ranks that disagree hang in a collective, or compute differently"
        fix = f"give every rank the same {entry}: one environment, exported before torchrun or srun"
        findings.append(Finding(name, level, f"{entry} differs: {shown}", why, fix))
    return findings or [Finding(name, "ok", f"equal on all {len(by_rank)} ranks")]


def ranks_text(ranks: list[int], hosts: Mapping[int, str]) -> str:
    """Ranks with their machines, for people."""
    by_host = defaultdict(list)
    for rank in ranks:
        by_host[hosts[rank]].append(rank)
    return ", ".join(
        f"{'ranks' if len(own) > 1 else 'rank'} {' '.join(map(str, own))} ({host})"
        for host, own in by_host.items()
    )
