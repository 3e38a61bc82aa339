"""Memory that a thread computes in, block after block: fresh pages for every block took a third of the time."""

import threading

import torch
from torch import Tensor

_local = threading.local()


def scratch(name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor of this shape; on a CPU in memory that the thread has had before under this name."""
    if like.device.type != "cpu":
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    buffers = _local.__dict__
    key = f"{name} {dtype}"
    if key not in buffers or buffers[key].numel() < like.numel():
        buffers[key] = torch.empty(like.numel(), dtype=dtype)
    found: Tensor = buffers[key][: like.numel()].view(like.shape)
    return found
