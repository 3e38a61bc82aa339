"""The factors of one Flax leaf pair, put together from the modules that share it: fused parts, stacked layers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from adaptertools.adapter import LoraModule
from adaptertools.dialects.flax.layout import interleave_halves
from adaptertools.dialects.flax.names import Path, Rule
from adaptertools.dialects.flax.sidecar import Record, is_power_of_two
from adaptertools.encoding import Encoder, scale
from adaptertools.errors import OptionError, ShapeError
from adaptertools.tensors import Deferred

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

    @property
    def fused(self) -> bool:
        """Whether the leaf has an axis for the parts."""
        return len(self.rule.parts) > 1


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
    owners = {(part.layer, spans[part.key]): part for part in reversed(stack.parts)}.values()
    kept = [(part, encoder.keep(f"{part.key}.lora_A", part.module.lora_A)) for part in owners]
    folded: list[tuple[Part, Deferred]] = []
    factors: list[tuple[float, bool]] = []
    for part in stack.parts:
        factor = part.extra * (part.module.scaling if folds else 1.0)
        lora_b = encoder.fold(f"{part.key}.lora_B", part.module.lora_B, factor)
        folded.append((part, _turned(lora_b, part.halves_of)))
        factors.append((factor, factor == 1.0 or _restores(part.module.lora_B, factor, lora_b.dtype, encoder)))
    a = _leaf(stack, (*_split(stack, inner, "in"), rank), kept, lambda leaf, part: leaf[..., slice(*spans[part.key])])
    b = _leaf(
        stack,
        (rank, *((len(stack.rule.parts),) if stack.fused else ()), *_split(stack, outer, "out")),
        folded,
        lambda leaf, part: leaf[slice(*spans[part.key]), part.place] if stack.fused else leaf[slice(*spans[part.key])],
    )
    records = {
        part.key: _record(part, factor, encoder, a, b, spans[part.key] if spans[part.key] != (0, rank) else None)
        for part, factor in zip(stack.parts, factors, strict=True)
    }
    filling = replace(next(iter(records.values())), rows=None, absent=True)
    records |= {name: filling for name in stack.names.values() if name not in records}
    return Packed(a=a, b=b, rank=rank, scaling=1.0 if folds else scalings.pop(), records=records)


def _leaf(
    stack: Stack,
    shape: tuple[int, ...],
    factors: Sequence[tuple[Part, Deferred]],
    region: Callable[[Tensor, Part], Tensor],
) -> Deferred:
    """A leaf put together from factors, each transposed into its `region` of one layer's `shape`."""
    whole = shape if stack.axis is None else (*shape[: stack.axis], stack.layers, *shape[stack.axis :])
    dtype = reduce(torch.promote_types, (factor.dtype for _, factor in factors))

    def compute() -> Tensor:
        if len(factors) == 1 and math.prod(factors[0][1].shape) == math.prod(whole):
            return factors[0][1].compute().T.reshape(whole).contiguous()
        leaf = torch.zeros(whole, dtype=dtype)
        layers = leaf.unsqueeze(0) if stack.axis is None else leaf.movedim(stack.axis, 0)
        for part, factor in factors:
            place = region(layers[part.layer], part)
            place.copy_(factor.compute().T.reshape(place.shape))
        return leaf

    return Deferred(shape=whole, dtype=dtype, compute=compute)


def _turned(lora_B: Deferred, head_dim: int | None) -> Deferred:
    """lora_B with its rows in MaxText's order, where that is asked for."""
    if head_dim is None:
        return lora_B
    return replace(lora_B, compute=lambda: interleave_halves(lora_B.compute(), head_dim))


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
    """Whether two tensors are equal bit for bit, so that zeros of different sign are not."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    mapped_once = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return mapped_once or torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


def _record(
    part: Part, factor: tuple[float, bool], encoder: Encoder, a: Deferred, b: Deferred, rows: tuple[int, int] | None
) -> Record:
    module = part.module
    before_a, before_b = encoder.dtype or module.lora_A.dtype, encoder.dtype or module.lora_B.dtype
    return Record(
        rank=module.rank,
        alpha=module.alpha,
        rule=module.scale_rule,
        factor=factor[0],
        restores=factor[1],
        rows=rows,
        lora_A_dtype=before_a if before_a != a.dtype else None,
        lora_B_dtype=before_b if before_b != b.dtype else None,
        transposed=module.transposed,
        shape=module.shape,
        component=module.target.component,
        opaque=module.target.opaque,
    )


def _restores(lora_B: Tensor, factor: float, stored: torch.dtype, encoder: Encoder) -> bool:
    """Whether `unfold` undoes the fold just made, bit for bit: by its measured loss, else looked at."""
    if factor == 0.0 or not math.isfinite(factor):
        return False
    if encoder.dtype is None and encoder.losses[-1].exact:
        return True  # the quotient of an exact product is the factor itself, and the nearest float to it
    before = encoder.dtype or lora_B.dtype
    rows = max(1, _CHUNK // lora_B.shape[1])
    return all(
        torch.equal(unfold(scale(piece, factor, stored), factor, before), piece.to(before))
        for piece in torch.split(lora_B, rows)
    )


def unfold(lora_b: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """The tensor without the factor that was folded into it, rounded once to `dtype`."""
    wide = torch.float32 if is_power_of_two(factor) else torch.float64
    return (lora_b.to(wide) / factor).to(dtype)
