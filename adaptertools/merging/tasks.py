"""What is to be done for one file of the result: bytes to copy, and row blocks to compute, each task by itself."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from adaptertools.containers.atomic import begin_sync, explained
from adaptertools.containers.tensorfile import reading
from adaptertools.errors import NonFiniteError
from adaptertools.merging.blocks import block_rows, source_dtype
from adaptertools.merging.edits import Edit
from adaptertools.merging.kernels import Prepared, Statistics, cast_statistics, prepare
from adaptertools.merging.plan import MergePlan
from adaptertools.merging.record import total
from adaptertools.merging.resume import Staging
from adaptertools.merging.route import Route
from adaptertools.merging.shards import CHUNK_BYTES, Copy, Layout, changes_in_place, sources_of
from adaptertools.merging.workers import Worker, copy_range, write_from
from adaptertools.tensors import all_finite, dtype_name, tensor_bytes


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work on one file, of which it writes `nbytes`."""

    nbytes: int
    run: Callable[[Worker], None]


class Sources:
    """The files of the base, open for reading from the time that something is made of them until nothing is."""

    def __init__(self, plan: MergePlan, layouts: Sequence[Layout], route: Route) -> None:
        self._route = route
        self._needed = {layout.name: sources_of(plan, layout) for layout in layouts}
        self._users = Counter(path for paths in self._needed.values() for path in paths)
        self._in_place = {layout.name for layout in layouts if changes_in_place(plan, layout)}
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()

    @property
    def in_order(self) -> tuple[Path, ...]:
        """The files of the base that are needed, the first one first."""
        return tuple(self._users)

    def ready(self, layout: Layout) -> bool:
        """Wait for what a file is made of; whether the base's own file was put in its place.

        Raises: HubError; HaltedError
        """
        needed = self._needed[layout.name]
        alone = layout.name in self._in_place and len(needed) == 1 and self._users[needed[0]] == 1
        return self._route.ready(layout, needed, needed[0] if alone else None)

    def handle(self, path: Path) -> int:
        """Raises: SourceNotFoundError"""
        with self._lock, reading(path):
            if path not in self._handles:
                self._handles[path] = os.open(self._route.place(path), os.O_RDONLY)
            return self._handles[path]

    def release(self, layout: Layout) -> None:
        """The file is made: what nothing else is made of is closed."""
        for path in self._needed[layout.name]:
            with self._lock:
                self._users[path] -= 1
                spent = not self._users[path]
                if spent and path in self._handles:
                    os.close(self._handles.pop(path))
            if spent:
                self._route.spent(path)
        self._route.finished(layout)

    def close(self) -> None:
        """Close them all."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


class Output:
    """A file in the making. When its last task is done, it is finished."""

    def __init__(
        self, plan: MergePlan, layout: Layout, staging: Staging, sources: Sources, device: torch.device
    ) -> None:
        self.layout, self._staging, self._sources = layout, staging, sources
        self.statistics: dict[str, Statistics] = {}
        self._handle: int | None = None
        self._lock = threading.Lock()
        self._tasks = list(self._all_tasks(plan, device))
        self._left = len(self._tasks)
        self._in_place = False

    def tasks(self) -> Iterator[Task]:
        """All there is to do, as soon as what it is made of is here."""
        self._in_place = self._sources.ready(self.layout)
        if not self._in_place:
            self._staging.make_room(self.layout)
        for task in self._tasks:
            yield Task(task.nbytes, partial(self._run, task))
        self._tasks = []

    def write(self, offset: int, content: memoryview | bytes) -> None:
        """Raises: OSError"""
        write_from(self._open(), offset, content)
        self._begin_flush(offset, len(content))

    def _begin_flush(self, offset: int, nbytes: int) -> None:
        if self._staging.flush:
            begin_sync(self._open(), offset, nbytes)

    def close(self) -> None:
        """Close it, finished or not."""
        with self._lock:
            if self._handle is not None:
                os.close(self._handle)
            self._handle = None

    def _run(self, task: Task, worker: Worker) -> None:
        with explained(self._staging.part(self.layout)):
            task.run(worker)
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            self.close()
            self._staging.finish(self.layout, self.statistics)
            self._sources.release(self.layout)

    def _open(self) -> int:
        with self._lock:
            if self._handle is None:
                self._handle = os.open(self._staging.part(self.layout), os.O_RDWR)
            return self._handle

    def _all_tasks(self, plan: MergePlan, device: torch.device) -> Iterator[Task]:
        """What is only copied comes first: meanwhile a GPU gets ready. Either goes through the file in its order."""
        if header := self.layout.header:
            yield Task(len(header), partial(self._put, 0, header))
        for copy in self.layout.copies:
            for chunk in copy.chunks():
                yield Task(chunk.nbytes, partial(self._copy, chunk))
        for name, offset in self.layout.moved.items():
            yield from self._move(plan.base.tensor(name), offset)
        for name, offset in sorted(self.layout.edited.items(), key=lambda item: item[1]):
            yield from EditedTensor(plan, plan.edits[name], offset, self, self._sources, device).tasks()

    def _put(self, offset: int, content: bytes | Tensor, worker: Worker) -> None:
        self.write(offset, content if isinstance(content, bytes) else tensor_bytes(content))

    def _copy(self, chunk: Copy, worker: Worker) -> None:
        if self._in_place:
            return
        source = self._sources.handle(chunk.source)
        copy_range(source, chunk.source, chunk.begin, self._open(), chunk.offset, chunk.nbytes)
        self._begin_flush(chunk.offset, chunk.nbytes)

    def _move(self, tensor: Tensor, offset: int) -> Iterator[Task]:
        """A tensor of a torch file: it is mapped, and need not be contiguous."""
        flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor
        step = CHUNK_BYTES // tensor.dtype.itemsize
        if flat.dim() != 1:
            yield Task(tensor.nbytes, partial(self._put, offset, flat))
            return
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            begin = offset + start * tensor.dtype.itemsize
            yield Task(part.nbytes, partial(self._put, begin, part))


class EditedTensor:
    """A tensor that is made anew, block by block, by whichever workers come by."""

    def __init__(
        self, plan: MergePlan, edit: Edit, offset: int, output: Output, sources: Sources, device: torch.device
    ) -> None:
        self._edit, self._offset, self._output, self._sources = edit, offset, output, sources
        self._place = None if edit.source is None else plan.base.places[edit.source]
        self._tensor = edit.replacement
        if self._place is None and edit.source is not None:
            self._tensor = plan.base.tensor(edit.source)
        self._dtype = source_dtype(plan, edit)
        self._blocks = block_rows(edit, self._dtype, device)
        self._device, self._labels = device, plan.sources
        self._left = len(self._blocks)
        self._prepared: Prepared | None = None
        self._casts: list[Statistics] = []
        self._lock = threading.Lock()

    def tasks(self) -> Iterator[Task]:
        """One for each block."""
        row = self._edit.matrix[1] * self._edit.dtype.itemsize
        for rows in self._blocks:
            offset = self._offset + rows.start * row
            nbytes = (rows.stop - rows.start) * row
            yield Task(nbytes, partial(self._make, rows, offset))

    def _make(self, rows: slice, offset: int, worker: Worker) -> None:
        prepared = self._ready(worker)
        block = self._read(worker, rows)
        if prepared is None:
            done = self._cast(block)
        else:  # in place, where the block is the worker's own
            own = self._place is not None and block.dtype == self._edit.dtype
            done = prepared.merged(block, rows.start, out=block if own else None)
        self._output.write(offset, worker.hand_back(done))
        with self._lock:
            self._left -= 1
            last = not self._left
        if last and prepared is not None:
            self._output.statistics[self._edit.name] = prepared.statistics
            self._prepared = None
        elif last and self._casts:
            self._output.statistics[self._edit.name] = total(self._casts)

    def _ready(self, worker: Worker) -> Prepared | None:
        """The factors on the device, and where norms run over the rows, these, in a pass before."""
        if not self._edit.computes:
            return None
        with self._lock:
            if self._prepared is None:
                prepared = prepare(self._edit, self._device, sources=self._labels)
                if prepared.wants_norms:
                    for rows in self._blocks:
                        prepared.measure(self._read(worker, rows), rows.start)
                        worker.settle()  # before the buffer takes the next block
                    prepared.settle()
                worker.settle()
                self._prepared = prepared
            return self._prepared

    def _read(self, worker: Worker, rows: slice) -> Tensor:
        """Rows of what the tensor is before anything is added to it."""
        columns = self._edit.matrix[1]
        if self._place is not None:
            handle = self._sources.handle(self._place.path)
            offset = self._place.offset + rows.start * columns * self._dtype.itemsize
            block = worker.read(handle, self._place.path, offset, (rows.stop - rows.start, columns), self._dtype)
        else:
            assert self._tensor is not None
            block = worker.take(self._tensor.reshape(self._edit.matrix)[rows])
        for indices, values in self._edit.rows:
            block = _replace(block, rows, torch.tensor(indices), values)
        return block

    def _cast(self, block: Tensor) -> Tensor:
        done = block.to(self._edit.dtype)
        if done.dtype != block.dtype and not all_finite(done) and all_finite(block):
            raise NonFiniteError(
                f"{self._edit.name}: values too large for {dtype_name(done.dtype)}. Choose another dtype"
            )
        if done.dtype != block.dtype:
            self._casts.append(cast_statistics(block, done))
        return done


def rehearse(plan: MergePlan, device: torch.device) -> None:
    """Compute a block of zeros of each shape, so that the kernels are there when the first worker asks for them.

    Begun beside the first copies. Of what goes wrong nothing is said here: the merge will meet it again.
    """

    def run() -> None:
        with suppress(Exception), torch.inference_mode():  # the precision of products is the workers' to settle
            for edit in shapes.values():
                dtype = source_dtype(plan, edit)
                rows = block_rows(edit, dtype, device)[0]
                zeros = torch.zeros(rows.stop, edit.matrix[1], dtype=dtype, device=device)
                prepare(edit, device).merged(zeros, 0)

    shapes = {
        (edit.matrix, edit.dtype, len(edit.updates)): edit
        for edit in plan.edits.values()
        if edit.updates and not edit.renormalizations
    }
    if device.type == "cuda":
        threading.Thread(target=run).start()


def _replace(block: Tensor, rows: slice, indices: Tensor, values: Tensor) -> Tensor:
    """The block with trained rows in it, in a dtype that holds both."""
    inside = (indices >= rows.start) & (indices < rows.stop)
    if not inside.any():
        return block
    block = block.to(torch.promote_types(block.dtype, values.dtype), copy=True)
    block[(indices[inside] - rows.start).to(block.device)] = values[inside].to(block)
    return block
