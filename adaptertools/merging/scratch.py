"""Memory that a thread computes in, block after block: fresh pages for every block took a third of the time."""

import threading

import torch
from torch import Tensor

_local = threading.local()


def scratch(name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor of this shape; on a CPU in memory that the thread has had before under this name."""
    if like.device.type != "cpu":
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    buffers: dict[str, tuple[Tensor, Tensor]] = _local.__dict__
    key = f"{name} {dtype}"
    flat, found = buffers.get(key, (None, None))
    if flat is None or found is None or found.shape != like.shape:
        if flat is None or flat.numel() < like.numel():
            flat = torch.empty(like.numel(), dtype=dtype)
        found = flat[: like.numel()].view(like.shape)
        buffers[key] = flat, found  # one tile after the other has the same shape
    return found
