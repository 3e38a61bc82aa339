"""What stacking gives: the adapter, how near each module is to what was meant, and what to know about it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adaptertools.adapter import Adapter
from adaptertools.operations.truncation import Truncation


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedModule:
    """One module of the stack. `ranks` has an entry for every source, 0 where it does not change the weight.

    `delta_error` is ‖ΔW' − ΔW‖ / ‖ΔW‖ against the sum that was meant, or against what the method made: exact unless
    `estimated`. `element_error` is the largest of an element of the factors and of lora_bias, against the magnitudes
    that went into it; 0.0 for factors made anew. Both come before a truncation.

    Units: ranks are nominal, as alpha is divided by them
    """

    target: str
    ranks: tuple[int, ...]
    rank: int
    delta_error: float
    element_error: float
    estimated: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stacked:
    """The stack, and how near it is to what was meant: the largest errors of its modules, which `rows` has one by one.

    `settings` are the method and what it was given, with the name and weight of every source. `left_out` are the whole
    weights that were not taken, `promoted` the tensors in a dtype that they have in no source and that was not asked
    for, `truncation` what lowering the rank did to the stack.
    """

    adapter: Adapter
    settings: Mapping[str, Any]
    rows: tuple[StackedModule, ...]
    left_out: tuple[str, ...] = ()
    promoted: Mapping[str, str]
    truncation: Truncation | None = None

    @property
    def max_delta_error(self) -> float:
        """The largest error of a module's delta weight, relative to its norm."""
        return max((row.delta_error for row in self.rows), default=0.0)

    @property
    def max_element_error(self) -> float:
        """The largest relative error of an element of the factors, which says nothing of terms that cancel."""
        return max((row.element_error for row in self.rows), default=0.0)

    @property
    def estimated(self) -> bool:
        """Whether some errors of delta weights are estimates."""
        return any(row.estimated for row in self.rows)

    @property
    def exact(self) -> bool:
        """Whether not one bit was lost in combining the sources; a truncation comes after that."""
        return self.max_delta_error == 0.0 and self.max_element_error == 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        return self.adapter.notes

    @property
    def figures(self) -> dict[str, Any]:
        """What the history says of the errors."""
        return {
            "exact": self.exact,
            "max_delta_error": self.max_delta_error,
            "max_element_error": self.max_element_error,
            "estimated": self.estimated,
        }

    def to_json(self) -> dict[str, Any]:
        """The settings and the figures, without the adapter."""
        return {
            **self.settings,
            **self.figures,
            "left_out": list(self.left_out),
            "promoted": dict(self.promoted),
            "modules": [asdict(row) for row in self.rows],
            "truncation": None if self.truncation is None else self.truncation.to_json(),
        }
