"""What a merge says of itself: the inputs that it is known by, and adaptertools_merge.json beside the result.

Nothing in the document depends on time or place. What tells one run's inputs from another's does look at modification
times, and stays in the hidden folder of the merge.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptertools import __version__
from adaptertools.containers import safetensors
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.tensorfile import reading
from adaptertools.errors import count
from adaptertools.merging import blocks
from adaptertools.merging.edits import Edit, Update
from adaptertools.merging.kernels import Statistics
from adaptertools.merging.plan import MergePlan
from adaptertools.tensors import dtype_name, in_parallel, tensor_bytes

NAME = "adaptertools_merge.json"
"""The document beside a merged model."""

_VERSION = 1
"""Of the engine: files made by another are not gone on with."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAMED_COMMIT = re.compile(r"@([0-9a-f]{40})(?:/|$)")
_CHUNK = 8 << 20
_END = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """A finished merge: where it is, what each tensor's change was, and what rounding took of it.

    `tensors` holds those that an adapter changed by arithmetic, `replaced` those that it brought or that were only
    moved or cast, `cast` what casts took of these. `resumed` counts the files that an earlier run had finished. `total`
    is over `tensors`.
    """

    path: Path
    nbytes: int
    files: tuple[str, ...]
    device: str
    tensors: Mapping[str, Statistics]
    total: Statistics
    replaced: tuple[str, ...] = ()
    cast: Mapping[str, Statistics] = field(default_factory=dict)
    resumed: int = 0
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def __repr__(self) -> str:
        took = f"rounding took {self.total.relative_error:.4g} of the delta"
        return f"<MergeReport of {self.path}: {count(len(self.tensors), 'tensor')} changed on {self.device}, {took}>"


def total(parts: Iterable[Statistics]) -> Statistics:
    """The sums of several tensors; their order does not matter."""
    found = list(parts)
    return Statistics(
        delta=math.fsum(each.delta for each in found),
        weight=math.fsum(each.weight for each in found),
        lost=math.fsum(each.lost for each in found),
        unchanged=sum(each.unchanged for each in found),
        elements=sum(each.elements for each in found),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a merge is made of, by what can be known without reading the base's weights.

    `whole` are the SHA-256 of heads, embeddings and token rows that an adapter brings, by tensor.
    """

    base: tuple[dict[str, Any], ...]
    commit: str | None
    adapters: tuple[dict[str, Any], ...]
    whole: dict[str, str]
    device: str
    stamps: list[list[Any]]
    recipe: str = field(repr=False)


def know_inputs(
    plan: MergePlan,
    device: torch.device,
    *,
    stamped: list[list[Any]],
    known: Mapping[str, str] | None = None,
    hash: bool = False,
) -> Inputs:
    """The identity of everything that goes into a merge. `hash` asks for the SHA-256 of every file of the base.

    `stamped` tells the base's files from others of the same name; `known` are SHA-256 that need not be computed.

    Memory: none; the adapters are read
    Raises: SourceNotFoundError for a file that went away
    """
    shas = dict(known or {})
    base = tuple(_base_file(plan.base, path, shas.get(path.name)) for path in plan.base.files)
    if hash:
        hashes = in_parallel(lambda path: shas.get(path.name) or _file_hash(path), plan.base.files)
        base = tuple({**entry, "sha256": found} for entry, found in zip(base, hashes, strict=True))
    digests = _tensor_digests(plan.edits.values())
    said = {
        "engine": _VERSION,
        "adaptertools": __version__,
        "torch": torch.__version__,
        "device": [device_name(device), torch.backends.cpu.get_cpu_capability(), dict(blocks.BLOCK_BYTES)],
        "base": [base, stamped],
        "plan": _describe(plan, digests),
    }
    recipe = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return Inputs(
        base=base,
        commit=_commit(plan.base),
        adapters=tuple(_adapter(plan, index, digests) for index in range(len(plan.sources))),
        whole={name: sha for name, edit in sorted(plan.edits.items()) if (sha := _whole(edit, digests))},
        device=device_name(device),
        stamps=stamped,
        recipe=recipe,
    )


def device_name(device: torch.device) -> str:
    """`cpu`, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def stamps(plan: MergePlan) -> list[list[Any]]:
    """Name, size and time of every file of the base that is read.

    Raises: SourceNotFoundError
    """
    found: list[list[Any]] = []
    for path in [*plan.base.files, *(plan.base.folder / name for name in plan.copied)]:
        with reading(path):
            state = path.stat()
        found.append([path.name, state.st_size, state.st_mtime_ns])
    return found


def document(plan: MergePlan, inputs: Inputs, report: MergeReport) -> dict[str, Any]:
    """The content of adaptertools_merge.json."""
    base: dict[str, Any] = {"name": plan.base.name, "files": list(inputs.base)}
    if inputs.commit:
        base["commit"] = inputs.commit
    return {
        "version": _VERSION,
        "adaptertools": __version__,
        "base": base,
        "adapters": list(inputs.adapters),
        "whole_weights_sha256": dict(inputs.whole),
        "device": inputs.device,
        "config": dict(plan.config),
        "tensors": {name: figures(sums) for name, sums in report.tensors.items()},
        "total": figures(report.total),
        "replaced": list(report.replaced),
        "cast": {name: cast_figures(sums) for name, sums in report.cast.items()},
        "left_out": list(report.left_out),
        "notes": list(report.notes),
        "files": [*report.files, NAME],
    }


def figures(sums: Statistics) -> dict[str, Any]:
    """What the sums say: the size of the change beside the weights, and what rounding took of it."""
    return {
        "relative_delta": _finite(sums.relative_delta),
        "rounding_error": _finite(sums.relative_error),
        "unchanged": sums.share_unchanged,
        "elements": sums.elements,
    }


def cast_figures(sums: Statistics) -> dict[str, Any]:
    """What the sums say of a cast."""
    return {
        "rounding_error": _finite(sums.relative_loss),
        "inexact": sums.elements - sums.unchanged,
        "elements": sums.elements,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _base_file(base: Checkpoint, path: Path, known: str | None) -> dict[str, Any]:
    with reading(path):
        size = path.stat().st_size
        header = base.header(path) if base.container == safetensors.NAME else _ends(path)
    entry = {"name": path.name, "size": size, "header_sha256": hashlib.sha256(header).hexdigest()}
    known = known or _known_hash(path)
    return {**entry, "sha256": known} if known else entry


def _ends(path: Path) -> bytes:
    """The first and the last bytes of a torch file, where its pickle and its zip's directory are."""
    with path.open("rb") as file:
        first = file.read(_END)
        file.seek(max(0, path.stat().st_size - _END))
        return first + file.read(_END)


def _known_hash(path: Path) -> str | None:
    """The SHA-256 by which the Hub's cache names a large file: it is free."""
    target = path.readlink() if path.is_symlink() else None
    named = target is not None and target.parent.name == "blobs" and _SHA256.fullmatch(target.name)
    return target.name if target is not None and named else None


def _commit(base: Checkpoint) -> str | None:
    """The commit of a model of the Hub, by its name or by the folder that the Hub's cache keeps it in."""
    if named := _NAMED_COMMIT.search(base.name):
        return named[1]
    folder = base.folder.absolute()
    known = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if known else None


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


_Key = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


def _key(tensor: Tensor) -> _Key:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _tensor_digests(edits: Iterable[Edit]) -> dict[_Key, str]:
    """The SHA-256 of every tensor that an adapter brings, each read once."""
    tensors = {_key(tensor): tensor for edit in edits for tensor in _tensors(edit)}
    return dict(zip(tensors, in_parallel(_tensor_hash, tensors.values()), strict=True))


def _tensor_hash(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)} ".encode())
    if tensor.dim() == 2 and not tensor.is_contiguous():  # most often a factor that is seen the other way round
        digest.update(b"T")
        tensor = tensor.T
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _tensors(edit: Edit) -> list[Tensor]:
    found = [tensor for update in _updates(edit) for tensor in (update.left, update.right)]
    found += [each.magnitude for each in edit.renormalizations]
    found += [rows for _, rows in edit.rows]
    return found if edit.replacement is None else [*found, edit.replacement]


def _updates(edit: Edit) -> Sequence[Update]:
    return (*edit.updates, *(each.update for each in edit.renormalizations))


def _adapter(plan: MergePlan, index: int, digests: Mapping[_Key, str]) -> dict[str, Any]:
    """A source by its name, its weight, and the factors that are merged of it."""
    digest = hashlib.sha256()
    for name, edit in sorted(plan.edits.items()):
        for update in _updates(edit):
            if update.source == index:
                said = [name, update.target, update.row, update.column, digests[_key(update.left)]]
                digest.update(json.dumps([*said, digests[_key(update.right)]]).encode())
    return {
        "name": plan.recorded[index],
        "weight": plan.weights[index],
        "factors_sha256": digest.hexdigest(),
    }


def _whole(edit: Edit, digests: Mapping[_Key, str]) -> str | None:
    """What an adapter brings of a tensor beside factors."""
    said: list[Any] = [[list(indices), digests[_key(rows)]] for indices, rows in edit.rows]
    if edit.replacement is not None:
        said.append(digests[_key(edit.replacement)])
    return hashlib.sha256(json.dumps(said).encode()).hexdigest() if said else None


def _describe(plan: MergePlan, digests: Mapping[_Key, str]) -> dict[str, Any]:
    """All that a plan settles, in JSON's terms."""
    return {
        "weights": list(plan.weights),
        "sources": list(plan.recorded),
        "shards": [[shard.name, list(shard.tensors), shard.patches] for shard in plan.shards],
        "edits": [_describe_edit(edit, digests) for _, edit in sorted(plan.edits.items())],
        "config": dict(plan.config),
        "copied": list(plan.copied),
        "left_out": list(plan.left_out),
        "notes": list(plan.notes),
    }


def _describe_edit(edit: Edit, digests: Mapping[_Key, str]) -> list[Any]:
    return [
        edit.name,
        edit.source,
        list(edit.shape),
        list(edit.matrix),
        dtype_name(edit.dtype),
        [[update.source, update.target, update.scale, update.row, update.column] for update in _updates(edit)],
        [[each.weight, each.axis] for each in edit.renormalizations],
        [list(indices) for indices, _ in edit.rows],
        [digests[_key(tensor)] for tensor in _tensors(edit)],
    ]
