"""Model files of a reward model or critic whose padding token ends no sequence; checkpoints and exports carry them."""

from collections.abc import Collection
from pathlib import Path

from rto_megatron.data.padding_token import separate_padding
from rto_megatron.parallel.topology import Topology
from rto_megatron.trainer.report.progress import say


def give_own_padding(hf_files: Path, used_ids: Collection[int], topology: Topology) -> None:
    """Changes the padding token where it must be; all ranks must call it.

    Args:
        used_ids: see `separate_padding`.
    """
    if topology.is_lead and (changed := separate_padding(hf_files, used_ids)) is not None:
        say(changed, True)
    topology.barrier()
