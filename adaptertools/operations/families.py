"""Modules whose ranks belong together, and the singular values of all: an adapter taken apart for truncation."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adaptertools.adapter import Adapter, Feature, LoraModule, Target
from adaptertools.errors import NonFiniteError, UnsupportedFeatureError
from adaptertools.linalg import ProductSVD, parse_device
from adaptertools.operations.ranks import Ladder, joined, nbytes, norm
from adaptertools.operations.spectra import decompose
from adaptertools.tensors import all_finite, in_parallel, parse_dtype


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Family:
    """Modules that are one product: `joined` is the single module, or [B₁; B₂; …]·A where several share their lora_A.

    Truncated as one they go on sharing it; each on its own basis, formats that store it once would need both.
    """

    places: tuple[int, ...]
    members: tuple[LoraModule, ...]
    joined: LoraModule

    @property
    def name(self) -> str:
        return ", ".join(str(module.target) for module in self.members)

    @property
    def inner(self) -> LoraModule:
        """The module whose rank, scaling and scale rule are those of all."""
        return self.members[0]

    def ladder(self, singular_values: Tensor, dtype: torch.dtype | None) -> Ladder:
        """The steps of the nominal rank: one singular direction of every expert, k of a convolution of loralib's.

        Shapes: singular_values (…, p)
        """
        module, fold = self.joined, self.joined.kernel_fold
        experts = (singular_values.reshape(-1, singular_values.shape[-1]) * abs(module.scaling)).tolist()
        directions = experts[0] if len(experts) == 1 else [math.hypot(*norms) for norms in zip(*experts, strict=True)]
        directions += [0.0] * (module.rank - len(directions))
        size_A, size_B = (dtype or module.lora_A.dtype).itemsize, (dtype or module.lora_B.dtype).itemsize
        each = (module.in_features * size_A + module.out_features * size_B) * (module.experts or 1)
        if fold == 1:
            return Ladder(norms=tuple(directions), costs=(each,) * module.rank)
        ends = [*range(0, module.nominal_rank * fold, fold), module.rank]
        return Ladder(
            norms=tuple(math.hypot(*directions[start:end]) for start, end in itertools.pairwise(ends)),
            costs=tuple(each * (end - start) for start, end in itertools.pairwise(ends)),
        )

    def with_factors(self, lora_A: Tensor, lora_B: Tensor, rank: int) -> list[LoraModule]:
        """The members with new factors of this nominal rank; alpha follows it, so that the scaling stays."""
        blocks = [lora_B]
        if len(self.members) > 1:
            blocks = list(torch.split(lora_B, [module.out_features for module in self.members]))
        alpha = self.inner.scale_rule.alpha(self.inner.scaling, rank)
        return [
            replace(module, lora_A=lora_A, lora_B=block, alpha=alpha)
            for module, block in zip(self.members, blocks, strict=True)
        ]


def families(adapter: Adapter) -> list[Family]:
    """All modules of the adapter, those together that have the same tensor as lora_A and the same scaling.

    Memory: one lora_B of each that holds several modules
    """
    found: dict[object, list[int]] = {}
    for place, module in enumerate(adapter.modules):
        found.setdefault(_shared(module, place), []).append(place)
    return [_family(adapter, places) for places in found.values()]


def groups(found: Sequence[Family]) -> list[list[int]]:
    """Families by index, those together that must have one rank: all slots of one fused parameter."""
    together: dict[object, list[int]] = {}
    for index, family in enumerate(found):
        target = family.inner.target
        key: object = (target.component, target.parameter) if target.rows else index
        together.setdefault(key, []).append(index)
    return list(together.values())


def _shared(module: LoraModule, place: int) -> object:
    """What modules must have in common to be one product; the place itself for those that never are."""
    if module.experts is not None or module.kernel_fold > 1 or module.lora_A.is_meta:
        return place
    A, B, target = module.lora_A, module.lora_B, module.target
    return (
        (A.data_ptr(), tuple(A.shape), A.stride(), A.dtype, A.device, B.dtype, B.device),
        (module.scale_rule, module.alpha),
        (target.component, target.parameter) if target.rows else None,
    )


def _family(adapter: Adapter, places: Sequence[int]) -> Family:
    members = tuple(adapter.modules[place] for place in places)
    joined = members[0]
    if len(members) > 1:
        joined = LoraModule(
            target=Target(parameter=joined.target.parameter, component=joined.target.component),
            lora_A=joined.lora_A,
            lora_B=torch.cat([module.lora_B for module in members]),
            alpha=joined.alpha,
            scale_rule=joined.scale_rule,
        )
    return Family(places=tuple(places), members=members, joined=joined)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spectra:
    """An adapter taken apart: the singular values of every family, and the ladder of every group of families.

    `dtype` is what the new factors are to be rounded to, None for that of the old ones.
    """

    adapter: Adapter
    families: list[Family]
    decompositions: list[ProductSVD]
    steps: list[Ladder]
    """of every family"""
    groups: list[list[int]]
    ladders: list[Ladder]
    """of every group"""
    carried: list[LoraModule]
    """modules that hold NaN or infinity, and slots beside such, which stay as they are"""
    device: torch.device
    dtype: torch.dtype | None

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        device: str | torch.device,
        dtype: str | torch.dtype | None,
        on_progress: Callable[[int, int], None] | None,
        *,
        allow_nonfinite: bool = False,
        limit: int | None = None,
    ) -> "Spectra":
        """With `allow_nonfinite`, modules that hold NaN or infinity are carried along, unless `limit` is a lower rank.

        Raises: UnsupportedFeatureError, NonFiniteError, OptionError
        """
        _check(adapter)
        place, cast = parse_device(device), parse_dtype(dtype) if isinstance(dtype, str) else dtype
        found = families(adapter)
        damaged = _damaged(found) if allow_nonfinite else set()
        carried = [found[index] for index in sorted(damaged)]
        _check_carried(carried, limit)
        found = [family for index, family in enumerate(found) if index not in damaged]
        try:
            decompositions = decompose([family.joined for family in found], place, on_progress)
        except NonFiniteError:
            _explain(found, limit)
            raise
        steps = [family.ladder(d.singular_values, cast) for family, d in zip(found, decompositions, strict=True)]
        for family, ladder in zip(found, steps, strict=True):
            if not math.isfinite(norm(ladder.norms)):
                raise NonFiniteError(f"{family.name}: its delta weight is beyond the range of float64")
        together = groups(found)
        return cls(
            adapter=adapter,
            families=found,
            decompositions=decompositions,
            steps=steps,
            groups=together,
            ladders=[joined([steps[i] for i in group]) for group in together],
            carried=[module for family in carried for module in family.members],
            device=place,
            dtype=cast,
        )

    def factor_bytes(self, ranks: Sequence[int]) -> int:
        """The bytes of all factors at these ranks of the groups."""
        return nbytes(self.ladders, ranks)

    def of_families(self, ranks: Sequence[int]) -> list[int]:
        """The ranks of groups as those of their families."""
        found = [0] * len(self.families)
        for group, rank in zip(self.groups, ranks, strict=True):
            for index in group:
                found[index] = min(rank, len(self.steps[index]))
        return found


def _damaged(found: Sequence[Family]) -> set[int]:
    """The families that hold NaN or infinity, and all slots of the parameters that they are part of."""
    sound = list(in_parallel(lambda family: not _nonfinite(family.joined), found))
    return {i for group in groups(found) if not all(sound[i] for i in group) for i in group}


def _nonfinite(module: LoraModule) -> list[str]:
    return [name for name in ("lora_A", "lora_B") if not all_finite(module.tensors[name])]


def _check_carried(carried: Sequence[Family], limit: int | None) -> None:
    """Raises: NonFiniteError for one that would have to be truncated"""
    for family in carried:
        if limit is not None and family.inner.nominal_rank > limit:
            _refuse(family, limit)


def _explain(found: Sequence[Family], limit: int | None) -> None:
    """Raises: NonFiniteError for the first family that holds a value which is not finite; none may"""
    for family in found:
        if _nonfinite(family.joined):
            _refuse(family, limit)


def _refuse(family: Family, limit: int | None) -> None:
    """Raises: NonFiniteError"""
    member = next((module for module in family.members if _nonfinite(module)), family.inner)
    held = " and ".join(f"{member.target}.{name}" for name in _nonfinite(member))
    where = f"{held} holds NaN or infinity" if held else f"{member.target} shares its parameter with a damaged slot"
    advice = "leave the module out (adaptertools convert --exclude)"
    if limit is None or limit >= member.nominal_rank:
        advice += ", or have it kept as it is (allow_nonfinite=True, --allow-nonfinite)"
    else:
        advice += f", or allow for its rank {member.nominal_rank}"
        where += f", so that it has no nearest delta weight of rank {limit}"
    raise NonFiniteError(f"{where}. The adapter is damaged or its training diverged: {advice}")


def _check(adapter: Adapter) -> None:
    if not adapter.modules:
        raise UnsupportedFeatureError("the adapter holds whole weights alone: there is no rank to lower")
    if changed := adapter.holders(Feature.CHANGED_BASE):
        raise UnsupportedFeatureError(
            f"truncating is refused: the adapter was trained with {changed[0]}, so that its factors belong to base "
            "weights that are derived again at loading, and another rank would give others. If it is used on the "
            "changed weights themselves, --drop changed-base says so"
        )
