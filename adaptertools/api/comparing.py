"""How far two adapters are from each other, on their base model where that is given."""

from adaptertools.adapter import Adapter
from adaptertools.api.base_weights import BaseWeights
from adaptertools.api.places import Given
from adaptertools.destination import Progress
from adaptertools.operations import diff as diff_operation
from adaptertools.operations.difference import Difference


def diff(
    a: Adapter,
    b: Adapter,
    *,
    tolerance: float = 1e-6,
    norms: bool = False,
    base: Given | None = None,
    token: str | None = None,
    on_progress: Progress | None = None,
) -> Difference:
    """How far B is from A: the relative Frobenius distance of their delta weights, and whatever else differs.

    Of the factors only their product counts: ranks, alphas, dtypes, formats, order and gauge may differ. Of DoRA, whose
    delta weights are made of the base weights, these are compared where `base` has them (a model here or on the Hub,
    opened only if they are needed); else direction and magnitude are, each by itself.

    Units:  tolerance is relative to A
    Memory: a few float64 copies of one parameter's factors a core, with DoRA on its base some blocks of a few MB; the
            (out, in) delta weight is never formed
    Raises: OptionError, ShapeError, NonFiniteError as the operation does; those of the base model
    """
    weights = None if base is None else BaseWeights.at(base, token).weight
    return diff_operation.diff(a, b, tolerance=tolerance, norms=norms, base_weight=weights, on_progress=on_progress)
