"""What a merge will take, known before a byte of weights is read: workers, memory, bytes read and written."""

import os
from dataclasses import dataclass

import torch

from adaptertools.errors import OptionError
from adaptertools.linalg import parse_device
from adaptertools.merging.blocks import largest_block, source_dtype
from adaptertools.merging.plan import MergePlan
from adaptertools.merging.record import device_name
from adaptertools.merging.shards import lay_out
from adaptertools.merging.workers import worker_memory

_MOST_WORKERS = 16

_COMMON = 40 << 20
"""What the workers take on the host together: code, records, and the factors of the tensors in hand in float64."""


@dataclass(frozen=True, slots=True)
class Crew:
    """How many workers there are, and the largest block that they meet."""

    device: torch.device
    count: int
    block: int

    @property
    def memory(self) -> int:
        """What they take on the host."""
        return _COMMON + self.count * worker_memory(self.block)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOutlook:
    """What running a plan takes. `changed` counts tensors that an adapter changes, `replaced` those that it brings,
    `cast` those of which nothing but the dtype changes.

    Units:  bytes_read, bytes_written and memory in bytes; memory on the host, beside the adapters
    """

    tensors: int
    changed: int
    replaced: int
    cast: int
    files: int
    bytes_read: int
    bytes_written: int
    memory: int
    workers: int
    device: str


def preview(
    plan: MergePlan, *, device: str | torch.device = "auto", max_memory: int = 2 << 30, workers: int | None = None
) -> MergeOutlook:
    """What `run_merge` would do with the same arguments.

    Raises: OptionError, UnsupportedFeatureError as `run_merge`
    """
    layouts = [lay_out(plan, shard) for shard in plan.shards]
    crew = hire(plan, parse_device(device, has_float64=False), max_memory, workers)
    changed = len(plan.computed)
    return MergeOutlook(
        tensors=len(plan.tensors),
        changed=changed,
        replaced=len(plan.edits) - changed - len(plan.cast),
        cast=len(plan.cast),
        files=len(layouts),
        bytes_read=plan.bytes_read,
        bytes_written=sum(layout.size for layout in layouts),
        memory=crew.memory,
        workers=crew.count,
        device=device_name(crew.device),
    )


def hire(plan: MergePlan, device: torch.device, max_memory: int, workers: int | None) -> Crew:
    """As many workers as are asked for, or as there are cores, and as fit into the memory.

    Raises: OptionError if not one does
    """
    if workers is not None and (not isinstance(workers, int) or isinstance(workers, bool) or workers < 1):
        raise OptionError(f"workers is {workers!r}, expected a number of threads, from 1 on")
    if not isinstance(max_memory, int) or isinstance(max_memory, bool):
        raise OptionError(f"max_memory is {max_memory!r}, expected a number of bytes, such as 2 << 30")
    blocks = [largest_block(edit, source_dtype(plan, edit), device) for edit in plan.edits.values()]
    block = max(blocks, default=0)
    each = worker_memory(block)
    if max_memory < _COMMON + each:
        raise OptionError(
            f"max_memory (--max-memory) is {max_memory:,} bytes, expected {_COMMON + each:,} or more: what one worker "
            "needs for the blocks of this model"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Crew(device, min(workers or min(_MOST_WORKERS, cores), (max_memory - _COMMON) // each), block)
