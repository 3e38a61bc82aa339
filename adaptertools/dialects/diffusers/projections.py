"""Fused projections and the layers that they are made of, one row block after the other."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adaptertools.dialects.peft.factors import same_tensor
from adaptertools.encoding import Encoder
from adaptertools.errors import UnsupportedFeatureError
from adaptertools.module import LoraModule, RowSlice, ScaleRule, Target
from adaptertools.tensors import materialize


def split(module: LoraModule, parts: Mapping[Target, RowSlice]) -> list[LoraModule]:
    """A fused projection as the layers that it is made of, which share lora_A.

    Where lora_B is block-sparse, as `joined` makes it, each part gets back the factors that it had, and one that had
    none is left out.

    Memory: the values of lora_B are read
    Raises: UnsupportedFeatureError for a DoRA magnitude of the inputs, which is of all rows together
    """
    if module.magnitude is not None and module.magnitude_axis != "out":
        raise UnsupportedFeatureError(
            f"{module.target}: its DoRA magnitude has a value for each input, over the rows of all parts, so that it "
            "cannot be split. Give it up with --drop dora"
        )
    owned = _owned_columns(module, list(parts.values()))
    return [
        _part(module, target, span, columns)
        for (target, span), columns in zip(parts.items(), owned, strict=True)
        if columns is None or columns
    ]


def _part(module: LoraModule, target: Target, span: RowSlice, columns: list[int] | None) -> LoraModule:
    """The rows of one part, of the columns that are its own, or of all."""
    piece = slice(span.start, span.stop)
    lora_A, lora_B, alpha, rule = module.lora_A, module.lora_B[piece], module.alpha, module.scale_rule
    if columns is not None:
        lora_A, lora_B = _rows_of(lora_A, columns), _rows_of(lora_B.T, columns).T
        if len(columns) != module.rank:
            alpha, rule = module.scaling, ScaleRule.DIRECT
    return replace(
        module,
        target=target,
        lora_A=lora_A,
        lora_B=lora_B,
        alpha=alpha,
        scale_rule=rule,
        magnitude=None if module.magnitude is None else module.magnitude[piece],
        lora_bias=None if module.lora_bias is None else module.lora_bias[piece],
    )


def _rows_of(tensor: Tensor, chosen: list[int]) -> Tensor:
    """A view where the rows follow one another, else a copy."""
    if chosen == list(range(chosen[0], chosen[-1] + 1)):
        return tensor[chosen[0] : chosen[-1] + 1]
    return tensor[chosen]


def _owned_columns(module: LoraModule, rows: Sequence[RowSlice]) -> list[list[int] | None]:
    """The columns of lora_B that are one part's alone, for each part; None for all where a column serves several.

    A column of zeros goes to the part of the one before it. A part without columns is nothing that changes the weight,
    unless it has a magnitude or a bias: then all parts share lora_A.
    """
    shared: list[list[int] | None] = [None] * len(rows)
    used = torch.stack([(module.lora_B[span.start : span.stop] != 0).any(dim=0) for span in rows])
    if bool((used.sum(dim=0) > 1).any()) or not bool(used.any()):
        return shared
    owners = [int(column.int().argmax()) if bool(column.any()) else -1 for column in used.T]
    current = next(owner for owner in owners if owner >= 0)
    owned: list[list[int]] = [[] for _ in rows]
    for column, owner in enumerate(owners):
        current = owner if owner >= 0 else current
        owned[current].append(column)
    whole = module.magnitude is not None or module.lora_bias is not None
    return shared if whole and not all(owned) else list(owned)


def joined(target: Target, parts: Sequence[LoraModule], encoder: Encoder) -> LoraModule:
    """Slices of one fused projection as one module: lora_A stacked, lora_B block-diagonal.

    Parts that share lora_A share it here too. Where scalings differ, each is folded into its part of lora_B relative to
    the largest.

    Shapes: lora_A (rᵢ, in), lora_B (outᵢ, rᵢ) -> (Σrᵢ, in), (out, Σrᵢ)
    Memory: the new factors
    Raises: UnsupportedFeatureError for DoRA on a part of the rows
    """
    spans = [part.target.rows for part in parts if part.target.rows]
    total = spans[0].total
    magnitudes = [part.magnitude for part in parts if part.magnitude is not None]
    if magnitudes and (len(magnitudes) < len(parts) or sum(span.stop - span.start for span in spans) < total):
        raise UnsupportedFeatureError(
            f"{target}: DoRA on {len(magnitudes)} of the layers that it fuses, and it has a magnitude for all rows or "
            "none. Give it up with --drop dora"
        )
    scaling = max((part.scaling for part in parts), key=abs)
    factors = [part.scaling / scaling if scaling else 1.0 for part in parts]
    distinct: list[Tensor] = []
    blocks: list[Tensor] = []
    places: list[int] = []
    for part, factor in zip(parts, factors, strict=True):
        known = next((i for i, seen in enumerate(distinct) if same_tensor(seen, part.lora_A)), len(distinct))
        if known == len(distinct):
            distinct.append(part.lora_A)
        places.append(sum(A.shape[0] for A in distinct[:known]))
        blocks.append(materialize(encoder.fold(f"{target}.lora_B", part.lora_B, factor)))
    dtype = functools.reduce(torch.promote_types, (block.dtype for block in blocks))
    lora_B = torch.zeros(total, sum(A.shape[0] for A in distinct), dtype=dtype)
    for block, span, column in zip(blocks, spans, places, strict=True):
        lora_B[span.start : span.stop, column : column + block.shape[1]] = block
    whole = len(distinct) == 1 and parts[0].scaling == scaling
    return LoraModule(
        target=target,
        lora_A=torch.cat(distinct),
        lora_B=lora_B,
        alpha=parts[0].alpha if whole else scaling,
        scale_rule=parts[0].scale_rule if whole else ScaleRule.DIRECT,
        magnitude=placed(magnitudes, spans) if magnitudes else None,
        lora_bias=_joined_bias(parts, spans, factors, encoder),
    )


def _joined_bias(
    parts: Sequence[LoraModule], spans: Sequence[RowSlice], factors: Sequence[float], encoder: Encoder
) -> Tensor | None:
    held = [
        (materialize(encoder.fold(f"{part.target}.lora_bias", part.lora_bias, factor)), span)
        for part, span, factor in zip(parts, spans, factors, strict=True)
        if part.lora_bias is not None
    ]
    return placed([bias for bias, _ in held], [span for _, span in held]) if held else None


def placed(pieces: Sequence[Tensor], spans: Sequence[RowSlice]) -> Tensor:
    """Vectors of the parts in their rows of the whole, zero elsewhere."""
    dtype = functools.reduce(torch.promote_types, (piece.dtype for piece in pieces))
    whole = torch.zeros(spans[0].total, dtype=dtype)
    for piece, span in zip(pieces, spans, strict=True):
        whole[span.start : span.stop] = piece
    return whole


def with_halves_swapped(module: LoraModule, target: Target) -> LoraModule:
    """The halves of the rows in the other order: shift and scale there, scale and shift here."""
    if module.out_features % 2:
        raise UnsupportedFeatureError(f"{module.target} has {module.out_features} rows, which have no halves")

    def swap(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat(tuple(reversed(tensor.chunk(2))))

    magnitude = swap(module.magnitude) if module.magnitude_axis == "out" else module.magnitude
    lora_B = swap(module.lora_B)
    assert lora_B is not None
    return replace(module, target=target, lora_B=lora_B, magnitude=magnitude, lora_bias=swap(module.lora_bias))
