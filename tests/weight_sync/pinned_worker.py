"""Joins a push as one worker of a server whose NCCL variables vLLM has pinned, and prints those that the join saw.

A program, as vLLM must not be imported into the process of other tests. Torch's group over NCCL, of which there is none
without a GPU, is a stand-in that reads the environment when it connects, as NCCL does.
"""

import contextlib
import json
import os
import threading

import torch
from torch import nn
from torch.distributed import BroadcastOptions, distributed_c10d
from vllm.config import VllmConfig
from vllm.utils.nccl import pin_nccl_env
from weight_sync.test_nccl_group import Group, Sent

from rto_megatron.generation.vllm.worker.plugin import InitInfo, RtoWeightTransferEngine
from rto_megatron.weight_sync.control_channel import ControlChannel
from rto_megatron.weight_sync.manifest import Manifest
from rto_megatron.weight_sync.transport import LOOPBACK, Communicator, Rendezvous, Wire, listen

NAMES = ("NCCL_PROTO", "NCCL_NTHREADS")
seen: dict[str, str | None] = {}


class Reading(Group):
    def broadcast(self, tensors: list[torch.Tensor], options: BroadcastOptions) -> Sent:
        seen.update({name: os.environ.get(name) for name in NAMES})
        return Sent()


class Nothing:
    """The wire of the sender, which only has to come to the meeting."""

    memory = ""

    def join(self, memories: list[str]) -> None:
        pass


def nothing(channel: ControlChannel, meeting: Rendezvous, device: torch.device) -> Wire:
    return Nothing()


def main() -> None:
    os.environ["NCCL_NTHREADS"] = "256"  # the launcher's own, which trainer and pool share
    pin_nccl_env({"NCCL_PROTO": "Simple", "NCCL_NTHREADS": "1"})
    distributed_c10d.ProcessGroupNCCL = Reading
    torch.cuda.device = contextlib.nullcontext
    torch.zeros = lambda *shape, device, **how: torch.ones(shape, **how)
    listener, manifest = listen(LOOPBACK), Manifest(1024, ())
    meeting = Rendezvous(LOOPBACK, listener.getsockname()[1], 1, 2, "pinned", 60, "cuda")
    sender = Communicator(meeting, 0, torch.device("cpu"), listener, nothing)
    comes = threading.Thread(target=sender.join)
    comes.start()
    engine = RtoWeightTransferEngine(None, VllmConfig(), torch.device("cuda", 0), nn.Module())
    engine.init_transfer_engine(
        InitInfo(rendezvous=meeting.to_json(), first_rank=1, manifest=manifest.to_json())
    )
    comes.join()
    print(json.dumps([seen, {name: os.environ.get(name) for name in NAMES}]))


if __name__ == "__main__":
    main()
