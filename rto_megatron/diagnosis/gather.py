"""The ranks' findings in one place: rank 0 gets all of them over gloo, and compares what must be equal."""

import os
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from rto_megatron.diagnosis import packages, variables
from rto_megatron.diagnosis.finding import Finding

_MEET_WITHIN = timedelta(minutes=2)
_WAIT = timedelta(hours=1)  # the slowest rank may read a large checkpoint
_LARGEST_CLOCK_DIFFERENCE_S = 2.0


@dataclass(frozen=True)
class RankReport:
    """What one rank found and is.

    Example:
        [report.host for report in reports if report.findings]
    """

    rank: int
    host: str
    findings: tuple[Finding, ...]
    variables: dict[str, str]
    versions: dict[str, str]
    wall_clock_s: float  # since the epoch, read by all ranks at one moment


def meet() -> list[Finding]:
    """Joins the ranks that a launcher started; none where there is one rank, and a problem where they do not meet."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return []
    try:
        dist.init_process_group("gloo", timeout=_MEET_WITHIN)
    except RuntimeError as error:
        name = socket.gethostname()
        found = f"rank {os.environ['RANK']} on {name} does not meet the others: {error}"
        why = "a run starts with the same meeting; often a machine's name leads to 127.0.0.1, or a firewall is between"
        fix = f"getent hosts {name}; export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME=<the interface they share>"
        return [Finding("ranks", "problem", found, why, fix)]
    return [Finding("ranks", "ok", f"{dist.get_world_size()} ranks met over gloo")]


def gather(findings: Sequence[Finding]) -> list[RankReport]:
    """Every rank's report, by rank, on every rank; all ranks that met must call it. Leaves the process group."""
    rank, host = int(os.environ.get("RANK", "0")), socket.gethostname()
    report = RankReport(rank, host, tuple(findings), variables.relevant(), packages.versions(), time.time())
    if not dist.is_initialized():
        return [report]
    from rto_megatron.parallel.collectives import gather as gather_reports

    group = dist.new_group(backend="gloo", timeout=_WAIT)
    dist.barrier(group)
    report = replace(report, wall_clock_s=time.time())
    reports = gather_reports(report, RankReport, group, torch.device("cpu"))
    dist.destroy_process_group()
    return reports


def merged(reports: Sequence[RankReport]) -> list[Finding]:
    """Equal findings once, with the ranks that made them; then what differs between ranks."""
    if len(reports) == 1:
        return list(reports[0].findings)
    hosts = {report.rank: report.host for report in reports}
    ranks_of: dict[Finding, list[int]] = defaultdict(list)
    for report in reports:
        for finding in report.findings:
            ranks_of[finding].append(report.rank)
    return [
        *(replace(finding, where=variables.ranks_text(ranks, hosts)) for finding, ranks in ranks_of.items()),
        *variables.compare("variables of ranks", {r.rank: r.variables for r in reports}, hosts),
        *variables.compare("versions of ranks", {r.rank: r.versions for r in reports}, hosts),
        *compare_clocks({r.host: r.wall_clock_s for r in reports}),
    ]


def compare_clocks(wall_clock_s: dict[str, float]) -> list[Finding]:
    """The wall clocks of machines, read at one moment, in seconds since the epoch."""
    first, last = (choose(wall_clock_s, key=wall_clock_s.__getitem__) for choose in (min, max))
    apart = wall_clock_s[last] - wall_clock_s[first]
    if apart <= _LARGEST_CLOCK_DIFFERENCE_S:
        return [Finding("clocks of ranks", "ok", f"less than {_LARGEST_CLOCK_DIFFERENCE_S:g} s apart")]
    why = "logs of one moment look like those of two, and file times on a shared disk mislead"
    fix = "timedatectl set-ntp true, on every machine"
    return [Finding("clocks of ranks", "warning", f"{last} is {apart:.1f} s ahead of {first}", why, fix)]
