"""What Megatron keeps in a checkpoint beside tensors."""

import argparse
from pathlib import Path

from rto_megatron.errors import ModelFolderError
from rto_megatron.platform.device import prepare
from rto_megatron.platform.safe_metadata import UNREADABLE, reason, safe_reading


def read_args(weights: Path) -> argparse.Namespace | None:
    """The arguments of the run that wrote a torch_dist checkpoint; None if it kept none.

    Raises:
        ModelFolderError: they cannot be read without running what they hold.
    """
    prepare()
    from megatron.core import dist_checkpointing

    with safe_reading(weights):
        try:
            common = dist_checkpointing.load_common_state_dict(weights)
        except UNREADABLE as error:
            raise ModelFolderError(f"{weights}: the common state cannot be read ({reason(error)})") from error
    args = common.get("args") if isinstance(common, dict) else None
    return args if isinstance(args, argparse.Namespace) else None
