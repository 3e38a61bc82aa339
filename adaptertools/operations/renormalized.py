"""Delta weights of DoRA, which are made with the base weight, compared on it: block by block, in float64.

ΔW = m · V/‖V‖ − W with V = W + s·B·A has the size and as a rule the rank of W, so that its factors tell no distance. It
takes W: whoever has the base model gives it as a function.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaptertools.convolution import unfolded
from adaptertools.errors import MatchError, NonFiniteError, UnsupportedFeatureError
from adaptertools.module import LoraModule, RowSlice, ScaleRule

BaseWeight = Callable[[LoraModule], Tensor]
"""The base weight of a module as the model stores it. Raises: MatchError, UnsupportedFeatureError if it is not there"""

_BLOCK_ELEMENTS = 1 << 20
"""Elements of the blocks of rows or columns; a core holds about ten of them at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The norms of two delta weights, the norm of their difference, and the cosine between them: None beside zero."""

    norm: float
    other_norm: float
    distance: float
    cosine: float | None


def base_matrix(modules: Sequence[LoraModule], base_weight: BaseWeight | None) -> tuple[Tensor | None, str]:
    """The weight of these modules' parameter as (out, in), None where none of them is DoRA, or it is not to be had; and
    why the base that was given does not have it.

    Raises: ShapeError if the base model has it in another shape
    """
    if base_weight is None or all(module.magnitude is None for module in modules):
        return None, ""
    try:
        weight = base_weight(modules[0])
    except (MatchError, UnsupportedFeatureError) as error:
        return None, str(error)
    alike = sorted(modules, key=lambda module: module.transposed is None)
    fitting = next((module for module in alike if module.weight_shape == tuple(weight.shape)), alike[0])
    shape = tuple(weight.shape)
    if fitting.transposed is None and len(shape) == 2 and shape != fitting.weight_shape == shape[::-1]:
        fitting = replace(fitting, transposed=True)
    return fitting.as_matrix(weight), ""


def compare_on_base(
    ours: Sequence[LoraModule], theirs: Sequence[LoraModule], rows: RowSlice | None, matrix: Tensor
) -> Measured:
    """ΔW beside ΔW' in some rows of one parameter, or in all of them; no module is one of zeros.

    Shapes: matrix (out, in)
    Memory: some blocks of a few MB in float64; the delta weight is never formed as a whole
    Raises: NonFiniteError
    """
    sides = [[unfolded(module) for module in group] for group in (ours, theirs)]
    squares, other_squares, distances, products = [], [], [], []
    for one, other in _blocks(sides, rows, matrix):
        squares.append(float(one.square().sum()))
        other_squares.append(float(other.square().sum()))
        distances.append(float((one - other).square().sum()))
        products.append(float((one * other).sum()))
    norm, other_norm, distance = (math.sqrt(math.fsum(part)) for part in (squares, other_squares, distances))
    if not math.isfinite(norm + other_norm + distance):
        raise _not_finite([*ours, *theirs], matrix)
    cosine = None
    if norm and other_norm:
        cosine = max(-1.0, min(1.0, math.fsum(products) / norm / other_norm))
    return Measured(norm=norm, other_norm=other_norm, distance=distance, cosine=cosine)


def _blocks(
    sides: Sequence[Sequence[LoraModule]], rows: RowSlice | None, matrix: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Both delta weights, block by block. Norms run within a block: one of rows, of columns, or the whole."""
    down = slice(rows.start, rows.stop) if rows else slice(0, len(matrix))
    height, width = down.stop - down.start, matrix.shape[1]
    axes = {module.magnitude_axis for side in sides for module in side if module.magnitude is not None}
    if axes == {"in"}:
        step = max(1, _BLOCK_ELEMENTS // height)
        parts = [(down, slice(start, min(start + step, width))) for start in range(0, width, step)]
    else:
        step = height if "in" in axes else max(1, _BLOCK_ELEMENTS // width)
        starts = range(down.start, down.stop, step)
        parts = [(slice(start, min(start + step, down.stop)), slice(0, width)) for start in starts]
    for part in parts:
        one, other = (_block(side, part, matrix) for side in sides)
        yield one, other


def _block(modules: Sequence[LoraModule], part: tuple[slice, slice], matrix: Tensor) -> Tensor:
    down, across = part
    total = matrix.new_zeros((down.stop - down.start, across.stop - across.start), dtype=torch.float64)
    for module in modules:
        first = module.target.rows.start if module.target.rows else 0
        start, stop = max(down.start, first), min(down.stop, first + module.out_features)
        if start < stop:
            own = slice(start - first, stop - first)
            piece = _piece(module, own, across)
            weight = matrix[start:stop, across]
            total[start - down.start : stop - down.start] += piece.delta_weight(dtype=torch.float64, base_weight=weight)
    return total


def _piece(module: LoraModule, down: slice, across: slice) -> LoraModule:
    """The module of some rows and columns of its delta weight, as a matrix."""
    along = {"out": down, "in": across}[module.magnitude_axis]
    return LoraModule(
        target=replace(module.target, rows=None),
        lora_A=module.lora_A[:, across],
        lora_B=module.lora_B[down],
        alpha=module.scaling,
        scale_rule=ScaleRule.DIRECT,
        magnitude=None if module.magnitude is None else module.magnitude[along],
        magnitude_axis=module.magnitude_axis,
    )


def _not_finite(modules: Sequence[LoraModule], matrix: Tensor) -> NonFiniteError:
    """The error that names what holds NaN or infinity, or says that DoRA divides by zero."""
    target = replace(modules[0].target, rows=None)
    named = {f"{module.target}.{name}": tensor for module in modules for name, tensor in module.tensors.items()}
    held = [name for name, tensor in {**named, f"{target} of the base model": matrix}.items() if not _finite(tensor)]
    why = f"{held[0]} holds NaN or infinity" if held else "a row or column of W + s·B·A has the norm 0, or none"
    return NonFiniteError(f"{target}: DoRA has no delta weight there: {why}")


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
