"""The edits of a merge while they are gathered, tensor by tensor."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.errors import ShapeError
from adaptertools.merging.edits import Edit, Renormalization, Update
from adaptertools.merging.place import Change, Shape, matrix_of
from adaptertools.merging.refusals import check_weight_dtype


@dataclass(slots=True)
class _Gathered:
    source: str | None
    shape: Shape
    replacement: Tensor | None = None
    matrix: tuple[int, int] | None = None
    updates: list[Update] = field(default_factory=list)
    renormalizations: list[Renormalization] = field(default_factory=list)
    rows: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)


class Draft:
    """What happens to each tensor of a base model, and which tensors are new."""

    def __init__(self, base: Checkpoint, dtype: torch.dtype | None) -> None:
        self._base, self._dtype = base, dtype
        self._gathered: dict[str, _Gathered] = {}
        self._mirrors: dict[str, str] = {}
        floating = Counter(dtype for dtype in base.dtypes.values() if dtype.is_floating_point)
        self._usual = floating.most_common(1)[0][0] if floating else torch.float32

    @property
    def is_empty(self) -> bool:
        """Whether no tensor changes."""
        return not self._gathered

    def shape(self, name: str) -> Shape:
        """The shape that a tensor will have."""
        return self._gathered[name].shape if name in self._gathered else self._base.shapes[name]

    def has(self, name: str) -> bool:
        """Whether the result has this tensor."""
        return name in self._gathered or name in self._base.shapes

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor will have: its own, that of most where it is new, or the one asked for."""
        own = self._base.dtypes.get(name, self._usual)
        return self._dtype if self._dtype is not None and own.is_floating_point else own

    def replace(self, name: str, weight: Tensor) -> None:
        """A whole weight in the place of the base's, or a new one."""
        self._gathered[name] = _Gathered(source=None, shape=tuple(weight.shape), replacement=weight)

    def copy(self, name: str, source: str) -> None:
        """A tensor made of the base's `source`, whatever happens to that."""
        self._gathered[name] = _Gathered(source=source, shape=self._base.shapes[source])

    def mirror(self, name: str, source: str) -> None:
        """A tensor to which the same happens as to `source`: its bytes are the same, and stay so."""
        self._mirrors[name] = source

    def same_as(self, name: str) -> str | None:
        """The tensor that this one mirrors, if it does."""
        return self._mirrors.get(name)

    def set_rows(self, name: str, indices: tuple[int, ...], rows: Tensor) -> None:
        """Rows in the place of the tensor's own.

        Raises: ShapeError if it has no such rows
        """
        gathered = self._of(name)
        shape = gathered.shape
        if len(shape) != 2 or rows.shape[1] != shape[1] or max(indices, default=0) >= shape[0]:
            raise ShapeError(
                f"{name}: trained token rows of shape {tuple(rows.shape)} up to token {max(indices, default=0)}, "
                f"the tensor has shape {shape}. Is it the right base model? Was its vocabulary resized?"
            )
        gathered.rows.append((indices, rows))

    def add(self, change: Change) -> None:
        """A low-rank addition.

        Raises: UnsupportedFeatureError for weights of a dtype that nothing can be added to
        """
        gathered = self._of(change.name)
        dtype = self.dtype(change.name) if gathered.source is None else self._base.dtypes[gathered.source]
        check_weight_dtype(change.name, dtype)
        if gathered.matrix not in (None, change.matrix):
            raise ShapeError(f"{change.name}: seen as a matrix of {gathered.matrix} and of {change.matrix}")
        gathered.matrix = change.matrix
        if isinstance(change.change, Update):
            gathered.updates.append(change.change)
        else:
            gathered.renormalizations.append(change.change)

    def finished(self) -> Mapping[str, Edit]:
        """The edits, those of untouched tensors included that are cast to another dtype.

        Raises: ShapeError
        """
        edits = {name: self._edit(name, gathered) for name, gathered in self._gathered.items()}
        for name, source in self._mirrors.items():
            if source in edits and name not in edits:
                edits[name] = replace(edits[source], name=name, dtype=self.dtype(name))
        for name, shape in self._base.shapes.items():
            if name not in edits and self.dtype(name) != self._base.dtypes[name]:
                edits[name] = self._edit(name, _Gathered(source=name, shape=shape))
        return edits

    def _of(self, name: str) -> _Gathered:
        if name not in self._gathered:
            self._gathered[name] = _Gathered(source=name, shape=self._base.shapes[name])
        return self._gathered[name]

    def _edit(self, name: str, gathered: _Gathered) -> Edit:
        return Edit(
            name=name,
            source=gathered.source,
            shape=gathered.shape,
            matrix=gathered.matrix or matrix_of(gathered.shape),
            dtype=self.dtype(name),
            updates=tuple(gathered.updates),
            renormalizations=tuple(gathered.renormalizations),
            replacement=gathered.replacement,
            rows=tuple(gathered.rows),
        )
