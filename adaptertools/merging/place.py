"""Where in the tensors of a base model the product of a module's factors goes: tensor, block, orientation.

Everything is a view of the factors; nothing is computed but what `unfolded` does to loralib's convolutions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.convolution import unfolded
from adaptertools.dialects.peft.base import BaseModel
from adaptertools.errors import ShapeError, UnsupportedFeatureError
from adaptertools.merging.edits import Renormalization, Update
from adaptertools.merging.refusals import check_ungrouped
from adaptertools.module import Kind, LoraModule

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Change:
    """A change of one tensor, which is seen as a matrix of these rows and columns."""

    name: str
    matrix: tuple[int, int]
    change: Update | Renormalization


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A module's place among the adapters that are merged, and the weight of its adapter."""

    number: int
    weight: float


class Orientation:
    """Which way round the matrices of a base model are stored."""

    def __init__(self, base: Checkpoint) -> None:
        self._model = BaseModel(base)

    def of(self, module: LoraModule, name: str, shape: Shape, out: int) -> bool:
        """Whether a matrix is stored (in, out), told by its shape; by the model's type where it is square.

        Raises: ShapeError if it is not of the module's size
        """
        if shape not in ((out, module.in_features), (module.in_features, out)):
            raise misfit(module, name, shape)
        if out != module.in_features:
            return shape == (module.in_features, out)
        if module.kind is Kind.PARAMETER and module.transposed is not None:
            return module.transposed
        known = self._model.linear_is_transposed(name.removesuffix(".weight"), out, module.in_features)
        return bool(module.transposed if known is None else known)

    def of_experts(
        self, module: LoraModule, name: str, shape: Shape, sizes: tuple[int, int], stated: bool | None
    ) -> bool:
        """The same for a stack of experts of these sizes, out and in; by what is stated where both are the same.

        Raises: ShapeError; UnsupportedFeatureError if nothing tells
        """
        if shape not in (sizes, sizes[::-1]):
            raise misfit(module, name, shape)
        if sizes[0] != sizes[1]:
            return shape == sizes[::-1]
        known = self._model.experts_are_transposed if stated is None else stated
        if known is None:
            raise UnsupportedFeatureError(
                f"{module.target}: the experts of {name} are square, and neither the adapter nor a model_type in the "
                "base's config.json says which way round they are stored"
            )
        return known


def misfit(module: LoraModule, name: str, shape: Shape) -> ShapeError:
    """The error of a module that is for a weight of another shape."""
    return ShapeError(
        f"{module.target}: lora_A {tuple(module.lora_A.shape)} and lora_B {tuple(module.lora_B.shape)} make a delta "
        f"weight of shape {module.weight_shape}, {name} has {shape}. Is it the right base model? Was its vocabulary "
        "resized?"
    )


def matrix_of(shape: Shape) -> tuple[int, int]:
    """The matrix that a tensor is seen as where nothing else is said."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def stack_matrix(shape: Shape) -> tuple[int, int]:
    """A stack of experts, one below the other."""
    return math.prod(shape[:-1]), shape[-1]


def changes(module: LoraModule, source: Source, name: str, shape: Shape, orientation: Orientation) -> Iterator[Change]:
    """What a module changes in the tensor `name`, which has this shape.

    Raises: ShapeError, UnsupportedFeatureError, each with the names of both
    """
    check_ungrouped(module, name, shape)
    if module.experts is not None:
        yield from _expert_changes(module, source, name, shape, orientation)
        return
    module = unfolded(module)
    rows = module.target.rows
    out = rows.total if rows else module.out_features
    if module.kind is Kind.EMBEDDING:
        matrix, transposed = shape, True
        if shape != (module.in_features, out):
            raise misfit(module, name, shape)
    elif module.kind is Kind.CONV:
        matrix, transposed = (out, module.in_features), False
        if _squeezed(module.weight_shape) != _squeezed(shape):
            raise misfit(module, name, shape)
    else:
        matrix = _squeezed(shape)
        transposed = orientation.of(module, name, matrix, out)
    first = rows.start if rows else 0
    row, column = (0, first) if transposed else (first, 0)
    update = updated(module, source, transposed=transposed, row=row, column=column)
    change = renormalized(update, module, source, transposed=transposed)
    yield Change(name=name, matrix=(matrix[0], math.prod(matrix[1:])), change=change)


def bias_change(module: LoraModule, source: Source, name: str, shape: Shape) -> Change:
    """The lora_bias of a module, added to the bias of its layer.

    Raises: ShapeError if that is of another size
    """
    assert module.lora_bias is not None
    rows = module.target.rows
    total = rows.total if rows else module.out_features
    if shape != (total,):
        raise ShapeError(f"{module.target}: its lora_bias is for a bias of {total} values, {name} has shape {shape}")
    update = Update(
        source=source.number,
        target=f"{module.target}.lora_bias",
        left=module.lora_bias.unsqueeze(1),
        right=torch.ones(1, 1, dtype=torch.float32),
        scale=source.weight * module.scaling,
        row=rows.start if rows else 0,
    )
    return Change(name=name, matrix=(total, 1), change=update)


def updated(
    module: LoraModule, source: Source, *, transposed: bool, row: int = 0, column: int = 0, expert: int | None = None
) -> Update:
    """The product of a module, or of one expert of it, as it is added to a stored matrix."""
    lora_A, lora_B = module.lora_A, module.lora_B
    if expert is not None:
        lora_A, lora_B = lora_A[expert], lora_B[expert]
    return Update(
        source=source.number,
        target=f"{module.target}" if expert is None else f"{module.target}[{expert}]",
        left=lora_A.T if transposed else lora_B,
        right=lora_B.T if transposed else lora_A,
        scale=source.weight * module.scaling,
        row=row,
        column=column,
    )


def renormalized(update: Update, module: LoraModule, source: Source, *, transposed: bool) -> Update | Renormalization:
    """The update with its module's DoRA magnitude, where it has one. There the weight stands apart from the scaling."""
    if module.magnitude is None:
        return update
    return Renormalization(
        update=replace(update, scale=module.scaling),
        weight=source.weight,
        magnitude=module.magnitude,
        axis="row" if (module.magnitude_axis == "out") != transposed else "column",
    )


def _expert_changes(
    module: LoraModule, source: Source, name: str, shape: Shape, orientation: Orientation
) -> Iterator[Change]:
    if len(shape) != 3 or shape[0] != module.experts:
        raise misfit(module, name, shape)
    sizes = (module.out_features, module.in_features)
    transposed = orientation.of_experts(module, name, shape[1:], sizes, module.transposed)
    for expert in range(shape[0]):
        update = updated(module, source, transposed=transposed, row=expert * shape[1], expert=expert)
        yield Change(name=name, matrix=stack_matrix(shape), change=update)


def _squeezed(shape: Shape) -> Shape:
    """The shape without a convolution's kernel, where that is of one value."""
    return shape[:2] if len(shape) > 2 and all(size == 1 for size in shape[2:]) else shape
