"""Copies from the host to the device that the host does not wait for."""

import torch
from torch import Tensor


def copied_to(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, which lies in host memory, on `device`; the host goes on while a GPU reads it from pinned memory."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
