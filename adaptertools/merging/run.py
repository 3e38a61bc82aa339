"""The run of a plan: a copy of the base with some bytes made anew, by workers that read, compute and write.

Every file of the result is a list of tasks: bytes to copy, and row blocks to compute. Workers take them in order, so
that one reads while another computes and a third writes. A file whose tasks are all done is flushed and recorded; the
whole result is renamed into place.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.source import as_path
from adaptertools.errors import (
    AdapterToolsError,
    DamagedFileError,
    DestinationError,
    HubError,
    OptionError,
    SourceNotFoundError,
    StoppedMergeError,
    check_flags,
)
from adaptertools.linalg import parse_device
from adaptertools.merging.destination_folder import check_apart
from adaptertools.merging.documents import beside, write_documents
from adaptertools.merging.kernels import Statistics, full_precision
from adaptertools.merging.outlook import Crew, hire
from adaptertools.merging.plan import MergePlan
from adaptertools.merging.record import NAME, Inputs, MergeReport, document, know_inputs, total
from adaptertools.merging.resume import Staging, resumable, staging_folder
from adaptertools.merging.route import HaltedError, Route
from adaptertools.merging.shards import Layout, lay_out
from adaptertools.merging.tasks import Output, Sources, Task, rehearse
from adaptertools.merging.workers import Worker
from adaptertools.tensors import threads_kept

Progress = Callable[[int, int], None]
"""Called with the bytes written and the bytes in all."""

_SECONDS_BETWEEN_REPORTS = 0.1


def run_merge(
    plan: MergePlan,
    dst: str | Path,
    *,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    max_memory: int = 2 << 30,
    workers: int | None = None,
    hash: bool = False,
    flush: bool = True,
    route: Route | None = None,
    on_progress: Progress | None = None,
) -> MergeReport:
    """Write the merged checkpoint that `plan` describes into the folder `dst`, whole or not at all.

    A run that was stopped is gone on with by the same call: what it finished stands in a hidden folder beside `dst`.
    Neither `max_memory` nor `workers` changes a bit of the result. `overwrite` replaces an earlier merge, nothing else.
    `hash` records the SHA-256 of the base's files; `flush=False` leaves it to the system when bytes reach the disk.
    `route` brings the base's files and sends those of the result on, where they are not all on this machine.

    Units:  max_memory bytes on the host
    Memory: max_memory at most, beside the adapters
    Raises: DestinationExistsError, DestinationError, StoppedMergeError, OptionError, NonFiniteError, HubError
    """
    if not isinstance(plan, MergePlan):
        raise OptionError(f"plan is {type(plan).__name__}, expected what plan_merge gives")
    check_flags(overwrite=overwrite, hash=hash, flush=flush)
    route = route or Route()
    target = parse_device(device, has_float64=False)
    dst = as_path(dst)
    plan = _reopened(plan)
    check_apart(plan.base, dst, plan.folders)
    layouts = [lay_out(plan, shard) for shard in plan.shards]
    crew = hire(plan, target, max_memory, workers)
    inputs = know_inputs(plan, target, stamped=route.stamps(plan), known=route.hashes(), hash=hash)
    if not staging_folder(dst).exists():
        route.check(dst, overwrite)
    with resumable(dst, flush=flush) as staging:
        if route.published(staging, inputs.recipe):
            report = _report(plan, staging, layouts, inputs, len(layouts))
            staging.remove()
            return replace(report, path=dst)
        route.check(dst, overwrite)
        staging.begin(inputs.recipe)
        try:
            report = _make(plan, staging, layouts, inputs, crew, route, on_progress)
            if route.stamps(plan) != inputs.stamps:
                raise DamagedFileError(f"{plan.base.label}: its files changed while they were merged. Merge again")
            route.publish(staging, [*report.files, NAME])
        except HubError:
            raise  # what is finished was kept
        except (DestinationError, SourceNotFoundError) as error:
            if not staging.anything_finished():
                raise
            told = f"{error}. What is finished was kept: the same call goes on from there"
            raise StoppedMergeError(told) from error
        except AdapterToolsError:
            staging.remove()  # the same call would fail again
            raise
    return replace(report, path=dst)


def _reopened(plan: MergePlan) -> MergePlan:
    """The plan with its base as that is now.

    Raises: DamagedFileError if it is no longer the base that was planned with
    """
    old, base = plan.base, Checkpoint.open(plan.base.opened or Path(plan.base.label))
    if (old.shapes, old.dtypes, old.places) != (base.shapes, base.dtypes, base.places):
        raise DamagedFileError(f"{base.label}: its files have changed since the merge was planned. Plan it again")
    return replace(plan, base=base)


def _make(
    plan: MergePlan,
    staging: Staging,
    layouts: Sequence[Layout],
    inputs: Inputs,
    crew: Crew,
    route: Route,
    on_progress: Progress | None,
) -> MergeReport:
    """Make what is not finished yet, and what stands beside the weights."""
    rest = [layout for layout in layouts if staging.finished(layout) is None]
    staging.clear_parts()
    if not route.gradual:
        staging.allocate(rest)
    meter = _Meter(sum(layout.size for layout in layouts), on_progress)
    meter.add(meter.total - sum(layout.size for layout in rest))
    sources = Sources(plan, rest, route)
    outputs = [Output(plan, layout, staging, sources, crew.device) for layout in rest]
    try:
        route.begin(staging, [layout for layout in layouts if layout not in rest], sources.in_order)
        rehearse(plan, crew.device)
        _work(crew, _in_turn([output.tasks() for output in outputs], route.at_once), meter, route)
        route.settle(meter.tell)
    finally:
        route.halt()
        sources.close()
        for output in outputs:
            output.close()
    report = _report(plan, staging, layouts, inputs, len(layouts) - len(rest))
    write_documents(plan, staging.result, document(plan, inputs, report), flush=staging.flush)
    return report


class _Meter:
    """Bytes done, counted by workers and told by the caller's thread."""

    def __init__(self, total: int, on_progress: Progress | None) -> None:
        self.total, self._on_progress = total, on_progress
        self._done, self._told = 0, -1
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes

    def tell(self) -> None:
        if self._on_progress is not None and self._done != self._told:
            self._told = self._done
            self._on_progress(self._told, self.total)


def _in_turn(files: Sequence[Iterator[Task]], at_once: int) -> Iterator[Task]:
    """The tasks of so many files at a time, one of each in turn."""
    waiting = iter(files)
    begun = deque(islice(waiting, at_once))
    while begun:
        tasks = begun.popleft()
        task = next(tasks, None)
        if task is None:
            begun.extend(islice(waiting, 1))
        else:
            begun.append(tasks)
            yield task


def _work(crew: Crew, tasks: Iterator[Task], meter: _Meter, route: Route) -> None:
    """Have all tasks done. After the first failure, no more are begun."""
    stop = threading.Event()
    lock = threading.Lock()

    def work() -> None:
        worker = Worker(crew.device, crew.block)
        try:
            with worker.at_work():
                while not stop.is_set():
                    with lock:
                        task = next(tasks, None)
                    if task is None:
                        return
                    task.run(worker)
                    meter.add(task.nbytes)
        except HaltedError:
            return
        except BaseException:
            stop.set()
            route.halt()
            raise

    with full_precision(), threads_kept(), ThreadPoolExecutor(crew.count) as pool:
        try:
            running = {pool.submit(work) for _ in range(crew.count)}
            everyone = list(running)
            while running:
                meter.tell()
                _, running = wait(running, _SECONDS_BETWEEN_REPORTS)
            meter.tell()
        except BaseException:
            route.halt()
            raise
        finally:
            stop.set()
    for future in everyone:
        future.result()


def _report(plan: MergePlan, staging: Staging, layouts: Sequence[Layout], inputs: Inputs, resumed: int) -> MergeReport:
    """What became of each tensor, from the records of the files."""
    found: dict[str, Statistics] = {}
    for layout in layouts:
        found |= staging.finished(layout) or {}
    in_order = {name: plan.edits[name] for shard in plan.shards for name in shard.tensors if name in plan.edits}
    tensors = {name: found[name] for name, edit in in_order.items() if edit.computes}
    return MergeReport(
        path=staging.dst,
        nbytes=sum(layout.size for layout in layouts),
        files=(*(layout.name for layout in layouts), *beside(plan)),
        device=inputs.device,
        tensors=tensors,
        total=total(tensors.values()),
        replaced=tuple(name for name, edit in in_order.items() if not edit.computes),
        cast={name: found[name] for name, edit in in_order.items() if not edit.computes and name in found},
        resumed=resumed,
        left_out=plan.left_out,
        notes=plan.notes,
    )
