"""Flax tree -> Adapter: the leaves taken apart, and the scale, from the sidecar or from whoever knows it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from adaptertools.adapter import Adapter, LoraModule, Origin, ScaleRule, Target, merge_notes
from adaptertools.containers.history import read_history, unread_entries
from adaptertools.containers.source import Source
from adaptertools.containers.tensorfile import TensorFile
from adaptertools.dialects.flax import source as flax_source
from adaptertools.dialects.flax.layout import Factors, Scan, join_halves, unpack
from adaptertools.dialects.flax.names import (
    DEFAULT_LAYER_PREFIX,
    LLAMA31,
    Naming,
    infer_naming,
    naming,
    possible_namings,
    query_or_key,
)
from adaptertools.dialects.flax.options import DEFAULT_SCAN_AT, Request, check_request, check_stacked
from adaptertools.dialects.flax.pack import unfold
from adaptertools.dialects.flax.scale import Scale, foreign_scale
from adaptertools.dialects.flax.sidecar import Record, Sidecar
from adaptertools.dialects.flax.tree import Dialect, Pair, pairs
from adaptertools.errors import OptionError, ShapeError, UnsupportedFeatureError, count


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How the leaves are taken apart: what was asked for, else what the sidecar says, else what the paths show."""

    chosen: Naming | None
    layer_prefix: str
    written_prefix: str
    scan: Scan
    arch: str | None
    head_dim: int | None


def read(source: Source, request: Request) -> Adapter:
    """The adapter in a source. Factors are views of the file wherever nothing has to be undone.

    Raises: AdapterToolsError
    """
    found = flax_source.find(source, request.dialects, request.format)
    sidecar = found.sidecar
    if found.dialect is Dialect.OPENPI:
        raise UnsupportedFeatureError(
            f"{found.file.label}: an openpi checkpoint. It has factors of their own for every head and scales "
            "attention, but not the feed-forward layers, by an alpha that only its configuration states: it is not read"
        )
    if sidecar is not None and request.alpha is not None:
        raise OptionError(f"{found.file.label}: its sidecar states alpha, so none is taken")
    leaves, notes = pairs(found.file, found.dialect, own=sidecar is not None, ignore_other=request.ignore_other)
    plan = _plan(request, sidecar, leaves)
    scale = foreign_scale(source, found, request.alpha) if sidecar is None else None
    unpacked = [factors for pair in leaves for factors in _unpacked(pair, plan)]
    if not any(factors.stack for factors in unpacked):
        check_stacked(request, ("/".join(pair.path) for pair in leaves))
    modules = [
        module
        for factors in unpacked
        for module in (_described(factors, sidecar) if sidecar else _foreign(factors, plan, scale))
    ]
    possible = [] if request.naming else possible_namings([pair.path for pair in leaves], request.namings)
    return Adapter(
        modules=tuple(modules),
        bases=sidecar.bases if sidecar else {},
        history=read_history(found.file.metadata, sidecar.document if sidecar else None),
        metadata=sidecar.metadata if sidecar else {},
        notes=merge_notes(
            notes, _header_notes(found.file), scale.notes if scale else (), _notes(plan, sidecar, modules, possible)
        ),
        origin=Origin(
            format=request.format,
            container=found.file.container,
            label=found.file.label,
            path=found.path,
            name=source.name,
            options=_writer_options(plan, leaves, unpacked),
        ),
    )


def _header_notes(file: TensorFile) -> list[str]:
    return unread_entries(file.metadata, "Flax") if file.container == "safetensors" else []


def _plan(request: Request, sidecar: Sidecar | None, leaves: list[Pair]) -> _Plan:
    if request.naming or sidecar is None:
        name = request.naming or infer_naming((pair.path for pair in leaves), request.namings)
    else:
        name = sidecar.naming
    arch = request.arch or (sidecar.arch if sidecar else None)
    head_dim = request.head_dim or (sidecar.head_dim if sidecar else None)
    chosen = naming(name, request.namings)
    check_request(request, sidecar, chosen)
    written_prefix = (sidecar.layer_prefix if sidecar else None) or DEFAULT_LAYER_PREFIX
    axis = request.scan_axis if request.scan_axis is not None else (sidecar.scan_axis if sidecar else None)
    return _Plan(
        chosen=chosen,
        layer_prefix=request.layer_prefix or written_prefix,
        written_prefix=written_prefix,
        scan=Scan(axis=axis, at=request.scan_at or (sidecar.scan_at if sidecar else None) or DEFAULT_SCAN_AT),
        arch=arch,
        head_dim=head_dim,
    )


def _unpacked(pair: Pair, plan: _Plan) -> Iterator[Factors]:
    for factors in unpack(
        pair, plan.chosen, plan.scan, layer_prefix=plan.layer_prefix, written_prefix=plan.written_prefix
    ):
        if plan.arch == LLAMA31 and plan.head_dim and query_or_key(factors.key):
            yield replace(factors, lora_B=join_halves(factors.lora_B, plan.head_dim))
        else:
            yield factors


def _foreign(factors: Factors, plan: _Plan, scale: Scale | None) -> Iterator[LoraModule]:
    """A module of a file without a sidecar."""
    assert scale is not None
    scale.check_rank(factors.key, factors.lora_A.shape[0])
    alpha = scale.alpha
    if plan.arch == LLAMA31 and plan.head_dim and query_or_key(factors.key) == "q":
        alpha *= math.sqrt(plan.head_dim)
    yield LoraModule(
        target=Target(parameter=factors.name),
        lora_A=factors.lora_A,
        lora_B=factors.lora_B,
        alpha=alpha,
        scale_rule=scale.rule,
    )


def _described(factors: Factors, sidecar: Sidecar) -> Iterator[LoraModule]:
    """A module of a file with a sidecar, as it was before it was written; where that cannot be had, as it stands."""
    record = sidecar.record(factors.key)
    if record.absent and not factors.lora_B.any():
        return
    lora_A, lora_B = factors.lora_A, factors.lora_B
    own = record.rows or (0, lora_A.shape[0])
    apart = (
        not record.absent
        and own[1] <= lora_A.shape[0]
        and not lora_B[:, : own[0]].any()
        and not lora_B[:, own[1] :].any()
    )
    if apart and own[1] - own[0] != record.rank:
        raise ShapeError(
            f"{factors.key}: the file has rank {own[1] - own[0]}, {sidecar.label} says {record.rank}. "
            "The sidecar belongs to another file"
        )
    if apart:
        lora_A = lora_A[slice(*own)].to(record.lora_A_dtype or lora_A.dtype)
        lora_B = lora_B[:, slice(*own)]
    if apart and record.restores:
        lora_B, alpha, rule = _restored(lora_B, record), record.alpha, record.rule
    else:
        alpha, rule = (record.scaling / record.factor if record.factor else 1.0), ScaleRule.DIRECT
    yield LoraModule(
        target=Target(
            parameter=factors.name.removeprefix(f"{record.component}." if record.component else ""),
            component=record.component,
            opaque=record.opaque,
        ),
        lora_A=lora_A,
        lora_B=lora_B,
        alpha=alpha,
        scale_rule=rule,
        transposed=record.transposed,
        shape=record.shape,
    )


def _restored(lora_B: Tensor, record: Record) -> Tensor:
    dtype = record.lora_B_dtype or lora_B.dtype
    return lora_B.to(dtype) if record.factor == 1.0 else unfold(lora_B, record.factor, dtype)


def _notes(plan: _Plan, sidecar: Sidecar | None, modules: list[LoraModule], possible: list[str]) -> list[str]:
    notes = []
    if sidecar is None and plan.chosen is None and possible:
        notes.append(f"the names are taken as they stand; if the model is of {' or '.join(possible)}, give naming")
    if plan.chosen is not None and plan.chosen.name == "maxtext" and plan.arch is None and sidecar is None:
        notes.append(
            "MaxText keeps q and k of Llama 3.1 in another row order: for that model, give arch=llama3.1 and head_dim"
        )
    if sidecar is not None:
        stated = sum(module.scale_rule is ScaleRule.DIRECT for module in modules)
        if stated and sidecar.document.get("scaling") != "none":
            notes.append(
                f"the scale of {count(stated, 'module')} was folded into lora_B with rounding, which cannot be undone: "
                f"they keep lora_B as stored. Before it was folded, lora_alpha was {sidecar.document.get('lora_alpha')}"
            )
    return notes


def _writer_options(plan: _Plan, leaves: list[Pair], unpacked: list[Factors]) -> dict[str, Any]:
    """The writer options that give the layout that was read."""
    options: dict[str, Any] = {}
    if plan.chosen is not None:
        options |= {"naming": plan.chosen.name, "layer_prefix": plan.layer_prefix}
        if any(part.endswith("_einsum") for pair in leaves for part in pair.path):
            options["fuse_qkv"] = any("qkv_einsum" in pair.path for pair in leaves)
    for factors in unpacked:
        if factors.stack is not None:
            options |= {"scan_axis": factors.stack[0], "num_layers": factors.stack[1]}
            options |= {"scan_at": plan.scan.at} if plan.chosen is None else {}
        if factors.head_dim is not None:
            options["head_dim"] = factors.head_dim
    return options | ({"arch": plan.arch, "head_dim": plan.head_dim} if plan.arch else {})
