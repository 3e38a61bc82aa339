"""What `diff` finds: distances of modules, of other tensors, and what they come to together."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from adaptertools.adapter import Target
from adaptertools.operations.values import Side, ValueDifference, relative


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleDifference:
    """One delta weight of A beside that of B, in the Frobenius norm; beside zero if it is `only_in` one of them.

    The norms of modules that are `identical`, equal bit for bit, are None where nothing needed them.
    """

    target: Target
    norm: float | None
    other_norm: float | None
    distance: float
    cosine: float | None
    """None where a side is zero"""
    identical: bool = False
    only_in: Side | None = None

    @property
    def relative_distance(self) -> float:
        """‖ΔW_A − ΔW_B‖ / ‖ΔW_A‖; infinite where A alone is zero."""
        return relative(self.distance, self.norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What sets two adapters apart. A is the reference of relative distances.

    `weights` has an entry for each tensor beside the factors that is not equal on both sides. `others` says in words
    what else changes the model and differs; `notes` what differs and changes nothing, such as the name of the base.

    DoRA adds what it makes of the base weight. Of the parameters in `dora_on_base` that was compared; of those in
    `dora_in_parts`, whose base weight is not known, direction and magnitude were, each by itself. Parameters that are
    equal bit for bit stand in neither. `base_lacks` says of each in parts why the base that was given did not help.
    """

    tolerance: float
    modules: tuple[ModuleDifference, ...] = ()
    weights: tuple[ValueDifference, ...] = ()
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    dora_on_base: tuple[str, ...] = ()
    dora_in_parts: tuple[str, ...] = ()
    base_lacks: tuple[str, ...] = ()

    @property
    def norm(self) -> float | None:
        """‖ΔW_A‖ of all modules together; None if some were not measured, being equal bit for bit."""
        return _together([module.norm for module in self.modules])

    @property
    def other_norm(self) -> float | None:
        """‖ΔW_B‖ of all modules together; None if some were not measured, being equal bit for bit."""
        return _together([module.other_norm for module in self.modules])

    @property
    def distance(self) -> float:
        """‖ΔW_A − ΔW_B‖ of all modules together; those on one side only count with their whole norm."""
        return math.hypot(*(module.distance for module in self.modules))

    @property
    def relative_distance(self) -> float:
        """‖ΔW_A − ΔW_B‖ / ‖ΔW_A‖ of all modules together; infinite where A alone is zero."""
        return relative(self.distance, self.norm)

    @property
    def cosine(self) -> float | None:
        """Between ΔW_A and ΔW_B with all modules as one vector; None where a side is zero, or there is no module."""
        norm, other_norm = self.norm, self.other_norm
        if norm is None or other_norm is None:
            return 1.0  # no distance anywhere: else all would have been measured
        parts = [(m.norm or 0.0, m.other_norm or 0.0, m.cosine) for m in self.modules]
        return cosine_together(parts, norm, other_norm)

    @property
    def same(self) -> bool:
        """Whether both change a model alike within the tolerance.

        The relative distance of all delta weights together is within it, and that of every other tensor on its own; no
        delta weight other than zero stands on one side only; and `others` is empty.
        """
        return (
            self.relative_distance <= self.tolerance
            and all(weight.relative_distance <= self.tolerance for weight in self.weights)
            and not any(module.only_in and module.distance for module in self.modules)
            and not self.others
        )


def cosine_together(parts: Iterable[tuple[float, float, float | None]], norm: float, other_norm: float) -> float | None:
    """The cosine between vectors of parts, from both lengths and the cosine of every part; None where one is zero."""
    if norm == 0 or other_norm == 0:
        return None
    return max(
        -1.0,
        min(
            1.0,
            math.fsum(
                cosine * (length / norm) * (other / other_norm)
                for length, other, cosine in parts
                if cosine is not None and length and other
            ),
        ),
    )


def _together(norms: Iterable[float | None]) -> float | None:
    known = list(norms)
    return None if None in known else math.hypot(*(norm for norm in known if norm is not None))
