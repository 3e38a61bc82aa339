"""The factors of one Flax leaf pair, put together from the modules that share it: fused parts, stacked layers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaptertools.adapter import LoraModule
from adaptertools.dialects.flax_layout import interleave_halves
from adaptertools.dialects.flax_names import Path, Rule
from adaptertools.dialects.flax_sidecar import Record, is_power_of_two
from adaptertools.encoding import Encoder, scale
from adaptertools.errors import OptionError, ShapeError
from adaptertools.tensors import Deferred, combine

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """One module, and its layer and place among the parts of its leaf.

    `key` is its name in the sidecar. `halves_of` asks for MaxText's row order of Llama 3.1 and gives the size of a
    head; `extra` is a factor of lora_b beyond the module's scaling.
    """

    module: LoraModule
    key: str
    layer: int
    place: int
    halves_of: int | None = None
    extra: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stack:
    """What stands in one leaf pair: the parts, and along which axis their layers, None if there is but one layer.

    `names` are the sidecar's names of all modules that the leaf has room for, by layer and place.
    """

    path: Path
    rule: Rule
    parts: Sequence[Part]
    names: Mapping[tuple[int, int], str]
    layers: int = 1
    axis: int | None = None
    head_dim: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packed:
    """A leaf pair, what the sidecar has to say of its modules, and the scaling that is left to whoever applies it."""

    a: Deferred
    b: Deferred
    rank: int
    scaling: float
    records: Mapping[str, Record]


def pack(stack: Stack, encoder: Encoder, *, folds: bool) -> Packed:
    """Lay out one leaf pair.

    Parts with the same lora_A share it. Others are laid side by side: the rank becomes the sum of theirs, lora_b is
    zero where a part meets the rank of another, and ΔW stays what it was. Layers and parts that the adapter lacks are
    zero. Where the modules of a leaf disagree about the scaling, it is folded even if the dialect has one.

    Memory: the values of what is folded are read once, in chunks; one leaf when it is written
    Raises: ShapeError if the modules do not fit into one leaf; OptionError without head_dim where heads are split off
    """
    scalings = {part.module.scaling for part in stack.parts}
    folds = folds or len(scalings) > 1
    spans = _rank_spans(stack.parts)
    rank = max(stop for _, stop in spans.values())
    inner = _one(stack, "input", {part.module.in_features for part in stack.parts})
    outer = _one(stack, "output", {part.module.out_features for part in stack.parts})
    owners = list({(part.layer, spans[part.key]): part for part in reversed(stack.parts)}.values())
    kept = [encoder.keep(f"{part.key}.lora_A", part.module.lora_A) for part in owners]
    factors = [part.extra * (part.module.scaling if folds else 1.0) for part in stack.parts]
    folded = [
        encoder.fold(f"{part.key}.lora_B", part.module.lora_B, factor)
        for part, factor in zip(stack.parts, factors, strict=True)
    ]

    a = combine(
        kept,
        _leaf_shape(stack, (*_split(stack, inner, "in"), rank)),
        lambda tensors: _join_a(
            stack, [(part, spans[part.key], t) for part, t in zip(owners, tensors, strict=True)], rank
        ),
    )
    b = combine(
        folded,
        _leaf_shape(stack, (rank, *_fused(stack), *_split(stack, outer, "out"))),
        lambda tensors: _join_b(
            stack, [(part, spans[part.key], t) for part, t in zip(stack.parts, tensors, strict=True)], rank
        ),
    )
    records = {
        part.key: _record(
            part, factor, encoder, a.dtype, b.dtype, spans[part.key] if spans[part.key] != (0, rank) else None
        )
        for part, factor in zip(stack.parts, factors, strict=True)
    }
    filling = replace(next(iter(records.values())), rows=None, absent=True)
    records |= {name: filling for name in stack.names.values() if name not in records}
    scaling = 1.0 if folds else scalings.pop()
    return Packed(a=a, b=b, rank=rank, scaling=scaling, records=records)


Placed = tuple[Part, tuple[int, int], Tensor]


def _join_a(stack: Stack, placed: Sequence[Placed], rank: int) -> Tensor:
    """Shapes: lora_A (r, in) of each -> (in, r), with heads split off and layers stacked as the leaf has them."""
    first = placed[0][2]
    if stack.layers == 1 and len(placed) == 1:
        grid = first.T.unsqueeze(0)
    else:
        grid = first.new_zeros(stack.layers, first.shape[1], rank)
        for part, span, lora_A in placed:
            grid[part.layer, :, slice(*span)] = lora_A.T
    return _unstack(stack, grid.reshape(stack.layers, *_split(stack, first.shape[1], "in"), rank))


def _join_b(stack: Stack, placed: Sequence[Placed], rank: int) -> Tensor:
    """Shapes: lora_B (out, r) of each -> (r, out), likewise, with the parts of a fused weight behind the rank."""
    turned = [
        (part, span, lora_B if part.halves_of is None else interleave_halves(lora_B, part.halves_of))
        for part, span, lora_B in placed
    ]
    first = turned[0][2]
    if stack.layers == 1 and len(stack.rule.parts) == 1:
        grid = first.T.unsqueeze(0)
    else:
        grid = first.new_zeros(stack.layers, rank, len(stack.rule.parts), first.shape[0])
        for part, span, lora_B in turned:
            grid[part.layer, slice(*span), part.place] = lora_B.T
    return _unstack(stack, grid.reshape(stack.layers, rank, *_fused(stack), *_split(stack, first.shape[0], "out")))


def _unstack(stack: Stack, grid: Tensor) -> Tensor:
    return grid[0] if stack.axis is None else grid.movedim(0, stack.axis)


def _leaf_shape(stack: Stack, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if stack.axis is None else (*shape[: stack.axis], stack.layers, *shape[stack.axis :])


def _fused(stack: Stack) -> tuple[int, ...]:
    return (len(stack.rule.parts),) if len(stack.rule.parts) > 1 else ()


def _split(stack: Stack, size: int, side: str) -> tuple[int, ...]:
    """The axes of the input or output: heads and their size where the rule splits them."""
    if stack.rule.heads != side:
        return (size,)
    if not stack.head_dim:
        raise OptionError(
            f"{'/'.join(stack.path)} has an axis for heads, and only you know how large a head is: give head_dim"
        )
    if size % stack.head_dim:
        raise ShapeError(f"{stack.parts[0].key}: {size} features do not divide into heads of head_dim {stack.head_dim}")
    return (size // stack.head_dim, stack.head_dim)


def _one(stack: Stack, what: str, sizes: set[int]) -> int:
    if len(sizes) > 1:
        raise ShapeError(
            f"{'/'.join(stack.path)} would hold {', '.join(part.key for part in stack.parts[:3])}, "
            f"whose {what} sizes differ: {sorted(sizes)}"
        )
    return sizes.pop()


def _rank_spans(parts: Sequence[Part]) -> dict[str, tuple[int, int]]:
    """Which of the leaf's ranks belong to each part: the same for equal lora_A in one layer, else side by side."""
    spans: dict[str, tuple[int, int]] = {}
    for layer in {part.layer for part in parts}:
        seen: list[tuple[Tensor, tuple[int, int]]] = []
        for part in (part for part in parts if part.layer == layer):
            lora_A = part.module.lora_A
            span = next((span for other, span in seen if _same(other, lora_A)), None)
            if span is None:
                start = seen[-1][1][1] if seen else 0
                span = (start, start + part.module.rank)
                seen.append((lora_A, span))
            spans[part.key] = span
    return spans


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _record(
    part: Part, factor: float, encoder: Encoder, a: torch.dtype, b: torch.dtype, rows: tuple[int, int] | None
) -> Record:
    module = part.module
    before_a, before_b = encoder.dtype or module.lora_A.dtype, encoder.dtype or module.lora_B.dtype
    return Record(
        rank=module.rank,
        alpha=module.alpha,
        rule=module.scale_rule,
        factor=factor,
        restores=_restores(module.lora_B, factor, b, before_b),
        rows=rows,
        lora_A_dtype=before_a if before_a != a else None,
        lora_B_dtype=before_b if before_b != b else None,
        transposed=module.transposed,
        shape=module.shape,
        component=module.target.component,
        opaque=module.target.opaque,
    )


def _restores(lora_B: Tensor, factor: float, stored: torch.dtype, before: torch.dtype) -> bool:
    """Whether `unfold` undoes what was folded, bit for bit: looked at, not assumed."""
    if factor == 1.0:
        return True
    if factor == 0.0 or not math.isfinite(factor):
        return False
    rows = max(1, _CHUNK // lora_B.shape[1])
    return all(
        torch.equal(unfold(scale(piece, factor, stored), factor, before), piece.to(before))
        for piece in torch.split(lora_B, rows)
    )


def unfold(lora_b: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """The tensor without the factor that was folded into it, rounded once to `dtype`."""
    wide = torch.float32 if is_power_of_two(factor) else torch.float64
    return (lora_b.to(wide) / factor).to(dtype)
