"""`adaptertools merge`: a base model and adapters become a merged checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptertools.cli.options import Output, Sources, device_option, output_options, revision_option, sources_options
from adaptertools.errors import OptionError

if TYPE_CHECKING:
    from adaptertools.hub.stream import Merged, Way
    from adaptertools.merging.kernels import Statistics
    from adaptertools.merging.outlook import MergeOutlook
    from adaptertools.merging.plan import MergePlan
    from adaptertools.merging.record import MergeReport

_SHOWN = 5
"""Tensors that are listed: those of whose change rounding took the most."""


@click.command("merge", short_help="Merge adapters into base weights.")
@click.argument("model", metavar="BASE")
@click.argument("adapters", nargs=-1, metavar="ADAPTER...")
@click.argument("dst")
@click.option("--weights", metavar="W,W,...", help="A weight for each adapter, such as 1,0.5. [default: all 1]")
@device_option()
@click.option("--dtype", type=click.Choice(["f32", "f16", "bf16"]), help="Cast the result. [default: keep]")
@click.option("--dry-run", is_flag=True, help="Show what would be done; write nothing.")
@click.option("--allow-unmatched", is_flag=True, help="Leave out modules that match no weight of the base.")
@click.option("--untie", is_flag=True, help="Give a head that is tied to the embedding weights of its own.")
@click.option("--full-weights", type=int, metavar="N", help="Adapter, from 1 on, whose heads and whole weights count.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it is an earlier merge.")
@click.option("--hash", "hashed", is_flag=True, help="Record the SHA-256 of every file of the base; reads it twice.")
@click.option("--max-memory", metavar="BYTES", default="2GiB", show_default=True, help="Host memory beside adapters.")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Threads. [default: one a core, at most 16]")
@click.option("--low-disk", is_flag=True, help="From or to the Hub: keep no shard longer than it is needed.")
@click.option("--private", is_flag=True, help="Make the repository DST a private one.")
@click.option("--work-dir", metavar="DIR", help="Where a merge to the Hub is made. [default: beside the Hub's cache]")
@revision_option()
@sources_options(writes=False, base=False)
@output_options()
def command(
    model: str,
    adapters: tuple[str, ...],
    dst: str,
    weights: str | None,
    device: str,
    dtype: str | None,
    dry_run: bool,
    allow_unmatched: bool,
    untie: bool,
    full_weights: int | None,
    overwrite: bool,
    hashed: bool,
    max_memory: str,
    workers: int | None,
    low_disk: bool,
    private: bool,
    work_dir: str | None,
    revision: str | None,
    sources: Sources,
    output: Output,
) -> None:
    """Write the folder DST: the base model BASE with W + w1·ΔW1 + w2·ΔW2 + … of every ADAPTER, rounded once.

    BASE is a folder with safetensors or torch weights, or a model on the Hub. What no adapter changes is copied byte by
    byte. DST may be hf://org/name. From and to the Hub, the next shard is fetched while one merges and the last one is
    sent. A merge that was stopped is gone on with by the same command; nothing stands at DST before all is done.
    """
    if not adapters:
        raise click.UsageError("Expected a base model, an adapter at least, and a destination: BASE ADAPTER... DST.")
    from adaptertools.merging.warm_up import warm_up

    if not dry_run:
        warm_up(device)  # before torch is imported
    from adaptertools.cli._progress import progress
    from adaptertools.cli._sources import read_sources
    from adaptertools.cli._values import parse_weights
    from adaptertools.containers.pipeline import open_checkpoint
    from adaptertools.hub.stream import Way
    from adaptertools.linalg import parse_device
    from adaptertools.merging.outlook import preview
    from adaptertools.merging.plan import plan_merge

    given = parse_weights(weights, len(adapters))
    target = parse_device(device, has_float64=False)
    computing: dict[str, Any] = {"device": target, "max_memory": _bytes(max_memory), "workers": workers}
    way = Way.parse(dst, token=sources.token, low_disk=low_disk, private=private, work_dir=work_dir)
    with progress("download", output) as advance:
        base = open_checkpoint(way.open_base(model, revision=revision, on_progress=advance))
    way.check_free(base, overwrite=overwrite)
    places = sources.locate(adapters, output)
    plan = plan_merge(
        base,
        read_sources(sources, places, base),
        given,
        dtype=dtype,
        allow_unmatched=allow_unmatched,
        untie=untie,
        full_weights=full_weights,
        sources=[place.label for place in places],
    )
    if dry_run:
        aim = _Aim(str(way.dst), way.check(plan, overwrite=overwrite), on_hub=not isinstance(way.dst, Path))
        outlook = preview(plan, **computing)
        output.show(lambda: _plan_text(plan, outlook, aim), lambda: _plan_document(plan, outlook, aim))
        return
    with _resumable(way), progress("merge", output) as advance:
        merged = way.run(plan, overwrite=overwrite, hash=hashed, on_progress=advance, **computing)
    output.show(lambda: _text(plan, merged), lambda: _document(plan, merged))


@dataclass(frozen=True, slots=True)
class _Aim:
    """Where a merge would go."""

    place: str
    exists: bool
    on_hub: bool

    def __str__(self) -> str:
        return f"{self.place}, {'which exists' if self.exists else 'a new repository'}" if self.on_hub else self.place


def _bytes(max_memory: str) -> int:
    from adaptertools.operations.sizes import parse_size

    try:
        return parse_size(max_memory, 0)
    except OptionError:
        expected = "expected bytes such as 300000000, 500MB or 2GiB"
        raise OptionError(f"--max-memory {max_memory}: {expected}") from None


@contextmanager
def _resumable(way: "Way") -> Iterator[None]:
    """Ctrl-C within says what it leaves to go on from."""
    try:
        yield
    except KeyboardInterrupt:
        folder = way.unfinished()
        if folder is None:
            raise
        kept = "" if isinstance(way.dst, Path) else f", in {folder}"
        raise KeyboardInterrupt(f"interrupted; the same command goes on from what is finished{kept}") from None


def _plan_text(plan: "MergePlan", outlook: "MergeOutlook", aim: _Aim) -> str:
    from adaptertools.cli._report import count, field, size

    lines = [
        f"Would merge {count(len(plan.sources), 'adapter')} into {plan.base.label}: {aim}; nothing was written",
        *_source_lines(plan),
        field("changed", f"{outlook.changed:,} of {count(outlook.tensors, 'tensor')}"),
        *([field("replaced", count(outlook.replaced, "tensor"))] if outlook.replaced else []),
        *([field("cast", count(outlook.cast, "tensor"))] if outlook.cast else []),
        field("read", f"{size(outlook.bytes_read)} from {count(len(plan.base.files), 'file')}"),
        field("write", f"{size(outlook.bytes_written)} to {count(outlook.files, 'file')}"),
        field("memory", f"{size(outlook.memory)} for {count(outlook.workers, 'worker')}, beside the adapters"),
        field("device", outlook.device),
    ]
    return "\n".join([*lines, *_remark_lines(plan.left_out, plan.notes)])


def _text(plan: "MergePlan", merged: "Merged") -> str:
    from adaptertools.cli._report import count, field, relative, size, table

    report = merged.report
    adapters = count(len(plan.sources), "adapter")
    tensors = sum(len(shard.tensors) for shard in plan.shards)
    lines = [
        f"Merged {adapters} into {plan.base.label}: {merged.place}",
        *([field("commit", merged.sha)] if merged.sha else []),
        *([field("page", merged.url)] if merged.url else []),
        *_source_lines(plan),
        field("changed", f"{len(report.tensors):,} of {count(tensors, 'tensor')}, computed on {report.device}"),
        *_replaced_lines(plan, report),
        field("written", f"{size(report.nbytes)} in {count(len(plan.shards), 'file')}"),
        *([field("resumed", f"{count(report.resumed, 'file')} finished by a run before")] if report.resumed else []),
    ]
    if report.tensors:
        whole = report.total
        lines += [
            field("delta", f"{relative(whole.relative_delta)} of the norm of the weights that it changes"),
            field("rounding", f"took {relative(whole.relative_error)} of the delta, {_unchanged(whole)} as they were"),
        ]
    lines += _remark_lines(report.left_out, report.notes)
    rows = [(name, *_row(sums)) for name, sums in _worst(report.tensors)]
    return "\n".join([*lines, "", table([_HEADINGS, *rows])] if rows else lines)


def _replaced_lines(plan: "MergePlan", report: "MergeReport") -> list[str]:
    """What was written without arithmetic, and what the cast took of it."""
    from adaptertools.cli._report import count, field, relative

    brought = {*report.replaced} - {*plan.cast}
    lines = [field("replaced", count(len(brought), "tensor"))] if brought else []
    if report.cast:
        inexact = sum(sums.elements - sums.unchanged for sums in report.cast.values())
        worst, sums = max(report.cast.items(), key=lambda item: item[1].relative_loss)
        took = f"{count(inexact, 'value')} inexact, up to {relative(sums.relative_loss)} of the norm of {worst}"
        lines.append(field("cast", f"{count(len(report.cast), 'tensor')}, {took if inexact else 'exact'}"))
    return lines


_HEADINGS = ("TENSOR", "DELTA", "ROUNDING TOOK", "UNCHANGED")


def _worst(tensors: "Mapping[str, Statistics]") -> "Sequence[tuple[str, Statistics]]":
    """The tensors of whose change rounding took the most."""
    return sorted(tensors.items(), key=lambda item: -item[1].relative_error)[:_SHOWN]


def _row(sums: "Statistics") -> tuple[str, ...]:
    from adaptertools.cli._report import relative

    return relative(sums.relative_delta), relative(sums.relative_error), f"{sums.share_unchanged:.1%}"


def _unchanged(sums: "Statistics") -> str:
    return f"and left {sums.share_unchanged:.1%} of these weights"


def _source_lines(plan: "MergePlan") -> list[str]:
    from adaptertools.cli._report import field, number

    pairs = zip(plan.weights, plan.sources, strict=True)
    return [field("adapter", f"{number(weight)} × {source}") for weight, source in pairs]


def _remark_lines(left_out: Sequence[str], notes: Sequence[str]) -> list[str]:
    from adaptertools.cli._report import few, field

    lines = [field("left out", f"{len(left_out)}: {few(left_out, 4)}")] if left_out else []
    return lines + [field("note", note) for note in notes]


def _plan(plan: "MergePlan") -> dict[str, Any]:
    return {
        "base": plan.base.label,
        "adapters": [
            {"path": source, "weight": weight} for source, weight in zip(plan.sources, plan.weights, strict=True)
        ],
        "config": dict(plan.config),
        "edits": list(plan.edits),
        "left_out": list(plan.left_out),
        "notes": list(plan.notes),
    }


def _plan_document(plan: "MergePlan", outlook: "MergeOutlook", aim: _Aim) -> dict[str, Any]:
    destination = {"path": aim.place, "exists": aim.exists}
    return {"dry_run": True, **asdict(outlook), **_plan(plan), "destination": destination}


def _document(plan: "MergePlan", merged: "Merged") -> dict[str, Any]:
    from adaptertools.merging.record import cast_figures, figures

    report = merged.report
    commit = {"sha": merged.sha, "url": merged.url} if merged.sha else {}
    return {
        **_plan(plan),
        "destination": {"path": merged.place, **commit, "nbytes": report.nbytes, "files": list(report.files)},
        "device": report.device,
        "resumed": report.resumed,
        "tensors": {name: figures(sums) for name, sums in report.tensors.items()},
        "total": figures(report.total),
        "replaced": list(report.replaced),
        "cast": {name: cast_figures(sums) for name, sums in report.cast.items()},
    }
