"""What a worker of a merge works with: buffers of its own that it reads into and writes from, and a CUDA stream.

On the CPU the block that was read is computed with where it lies. On CUDA the buffer is pinned, and copies to and from
the device run on the worker's stream, beside those of the other workers.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from adaptertools.containers.tensorfile import reading
from adaptertools.errors import DamagedFileError
from adaptertools.tensors import tensor_bytes

_CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ETXTBSY}
"""What the operating system says where it cannot copy by itself."""

_TILES = 12 << 20
"""What a worker takes on the host beside its blocks: the tiles that it computes in, what a product packs, copies."""


def worker_memory(block: int) -> int:
    """The bytes on the host that a worker takes for blocks of this size: as they are read, and as they are written."""
    return 2 * block + _TILES


class Worker:
    """The buffer and the stream of one thread. CUDA pins one buffer after the other: it is made when it is needed."""

    def __init__(self, device: torch.device, block: int) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._block = block
        self._stream = torch.cuda.Stream(device) if self.on_gpu else None  # type: ignore[no-untyped-call]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within, torch keeps to this thread and to this worker's stream."""
        torch.set_num_threads(1)
        stream = torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()
        with torch.inference_mode(), stream:
            yield

    @cached_property
    def _buffer(self) -> Tensor:
        return torch.empty(max(1, self._block), dtype=torch.uint8, pin_memory=self.on_gpu)

    def settle(self) -> None:
        """Wait for what was begun on the device."""
        if self._stream is not None:
            self._stream.synchronize()

    def read(self, handle: int, path: Path, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A block of a file, on the device. It stands until the next block is read.

        Raises: DamagedFileError if the file ends early
        """
        nbytes = shape[0] * shape[1] * dtype.itemsize
        room = self._buffer[:nbytes]
        read_into(handle, path, offset, room.numpy().data)
        return self._moved(room.view(dtype).view(shape))

    def take(self, block: Tensor) -> Tensor:
        """A block that is in memory, or mapped, on the device."""
        return block.to(self.device) if self.on_gpu else block

    def hand_back(self, block: Tensor) -> memoryview:
        """The bytes of a result. They stand until the next block is read."""
        if not self.on_gpu:
            return tensor_bytes(block)
        room = self._buffer[: block.nbytes]
        room.view(block.dtype).view(block.shape).copy_(block, non_blocking=True)
        self.settle()
        return room.numpy().data

    def _moved(self, block: Tensor) -> Tensor:
        return block.to(self.device, non_blocking=True) if self.on_gpu else block


def read_into(handle: int, path: Path, offset: int, room: memoryview) -> None:
    """Fill `room` with the bytes of a file from `offset` on.

    Raises: DamagedFileError if the file ends early; SourceNotFoundError if it cannot be read
    """
    done = 0
    with reading(path):
        while done < len(room):
            count = os.preadv(handle, [room[done:]], offset + done)
            if count == 0:
                raise DamagedFileError(f"{path}: it ends at byte {offset + done}: it has become shorter meanwhile")
            done += count


def write_from(handle: int, offset: int, content: memoryview | bytes) -> None:
    """Put bytes into a file at `offset`.

    Raises: OSError
    """
    view = memoryview(content)
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)


def copy_range(source: int, path: Path, begin: int, target: int, offset: int, nbytes: int) -> None:
    """Copy bytes from file to file, within the operating system where it can.

    Raises: DamagedFileError if the source ends early; OSError
    """
    done = _copy_in_kernel(source, begin, target, offset, nbytes)
    chunk = bytearray(min(nbytes - done, 1 << 20))
    while done < nbytes:
        room = memoryview(chunk)[: nbytes - done]
        read_into(source, path, begin + done, room)
        write_from(target, offset + done, room)
        done += len(room)


def _copy_in_kernel(source: int, begin: int, target: int, offset: int, nbytes: int) -> int:
    """The bytes that the operating system copied by itself; 0 where it cannot, as between some file systems."""
    done = 0
    if not hasattr(os, "copy_file_range"):
        return 0
    while done < nbytes:
        try:
            count = os.copy_file_range(source, target, nbytes - done, begin + done, offset + done)
        except OSError as error:
            if error.errno in _CANNOT_COPY:
                return done
            raise
        if count == 0:
            return done
        done += count
    return done
