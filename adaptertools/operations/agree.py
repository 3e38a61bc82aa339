"""What several adapters must agree on before they are one: base model, whole weights, token rows, tokens, settings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from adaptertools.adapter import Adapter, Base, Feature, FullWeight, RowWeights
from adaptertools.errors import OptionError, UnsupportedFeatureError

_MADE_ANEW = frozenset(
    {
        "modules_to_save",
        "parameter_orders",
        "peft_version",
        "target_modules",
        "target_parameters",
        "tied_copies",
        "trainable_token_indices",
    }
)
"""Settings that follow from the modules and weights when an adapter is written, so that a difference means nothing."""

_CHOOSE = "--full-weights SRC_NUMBER takes one source's (full_weights=N in Python)"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """One of the adapters to be combined. `number` counts from 1; a source of weight 0 contributes nothing."""

    number: int
    name: str
    adapter: Adapter
    weight: float = 1.0

    def __str__(self) -> str:
        return f"source {self.number} ({self.name})"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Agreement:
    """What the sources have in common. `left_out` names the weights of the sources that were not taken."""

    full_weights: Mapping[str, FullWeight]
    row_weights: Mapping[str, RowWeights]
    bases: Mapping[str, Base]
    invocation_tokens: tuple[int, ...] | None
    metadata: Mapping[str, Any]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def agree(sources: Sequence[Source], *, full_weights: int | None = None, force: bool = False) -> Agreement:
    """What the combination of these sources has beside its modules.

    Whole weights, biases and token rows that several sources have must be equal bit for bit, unless `full_weights` is
    the number of the source, from 1 on, whose alone are taken. Base models that are known must be the same, unless
    `force`: then that of the first source is kept.

    Raises: UnsupportedFeatureError that names the sources and what they disagree on; OptionError
    """
    active = [source for source in sources if source.weight]
    _check_features(active)
    _check_layers(active)
    tokens = _tokens(active)
    notes: list[str] = []
    bases = _bases(active, force, notes)
    metadata = _metadata(active, notes)
    chosen = _chosen(sources, full_weights)
    weights = _common_weights(active, notes) if chosen is None else _weights(chosen.adapter)
    return Agreement(
        full_weights={name: weight for name, weight in weights.items() if isinstance(weight, FullWeight)},
        row_weights={name: weight for name, weight in weights.items() if isinstance(weight, RowWeights)},
        bases=bases,
        invocation_tokens=tokens,
        metadata=metadata,
        left_out=_left_out(sources, chosen) if chosen is not None else (),
        notes=tuple(notes),
    )


def _check_features(sources: Iterable[Source]) -> None:
    """Raises: UnsupportedFeatureError for DoRA and for a changed base"""
    for source in sources:
        if holders := source.adapter.holders(Feature.DORA):
            raise UnsupportedFeatureError(
                f"{source} has a DoRA magnitude in {holders[0]}{_more(holders)}: its delta weight is no product of "
                "factors, and cannot be added to others. Merge it into the base model instead"
            )
        if holders := source.adapter.holders(Feature.CHANGED_BASE):
            raise UnsupportedFeatureError(
                f"{source} was trained with {holders[0]}, which changed the base weights: its factors mean nothing "
                "beside those for the published ones. PEFT converts such an adapter when it is saved "
                "(path_initial_model_for_weight_conversion)"
            )


def _check_layers(sources: Sequence[Source]) -> None:
    """Raises: UnsupportedFeatureError unless all sources count the same layers"""
    first = sources[0]
    for other in sources[1:]:
        for component in (*first.adapter.bases, *other.adapter.bases):
            one, another = (source.adapter.bases.get(component, Base()) for source in (first, other))
            if one.layer_replication != another.layer_replication:
                raise UnsupportedFeatureError(
                    f"{first} is for {_layers(one)}, {other} for {_layers(another)} (layer_replication): their "
                    "modules of one name belong to different layers, and do not add up"
                )


def _layers(base: Base) -> str:
    ranges = [list(layers) for layers in base.layer_replication]
    return f"layers {ranges}" if ranges else "the layers as published"


def _tokens(sources: Sequence[Source]) -> tuple[int, ...] | None:
    first = sources[0]
    for other in sources[1:]:
        if other.adapter.invocation_tokens != first.adapter.invocation_tokens:
            raise UnsupportedFeatureError(f"{first} {_acts(first)}, {other} {_acts(other)}: one adapter cannot do both")
    return first.adapter.invocation_tokens


def _acts(source: Source) -> str:
    tokens = source.adapter.invocation_tokens
    return "acts on every token" if tokens is None else f"acts after the tokens {list(tokens)} alone (aLoRA)"


def _bases(sources: Sequence[Source], force: bool, notes: list[str]) -> dict[str, Base]:
    """The base of each component: the first that is known."""
    found: dict[str, Base] = {}
    for component in dict.fromkeys(name for source in sources for name in source.adapter.bases):
        stated = [(source, source.adapter.bases[component]) for source in sources if component in source.adapter.bases]
        known = [(source, base) for source, base in stated if base.id is not None]
        first = known[0][1] if known else stated[0][1]
        for (one, base), (other, another) in combinations(known, 2):
            if not _contradict(base, another):
                continue
            said = f"{one} is for {_name(base)}, {other} for {_name(another)}"
            if not force:
                raise UnsupportedFeatureError(
                    f"{said}. Adapters add up on one base model only; --force says that the two are the same"
                )
            notes.append(f"{said}; as forced, they count as the same, and the first is kept")
        revisions = [base.revision for _, base in known if model_name(base) == model_name(first) and base.revision]
        found[component] = replace(first, revision=first.revision or next(iter(revisions), None))
    unknown = [source for source in sources if not any(base.id for base in source.adapter.bases.values())]
    if unknown:
        names = ", ".join(map(str, unknown))
        notes.append(f"no base model is named in {names}: that all sources are for the same one was not checked")
    return found


def _contradict(one: Base, other: Base) -> bool:
    revisions = {one.revision, other.revision} - {None}
    return model_name(one) != model_name(other) or len(revisions) > 1


def model_name(base: Base) -> str | None:
    """The base's id without slashes at its end, which a folder's name may have or not."""
    return base.id and (base.id.rstrip("/") or base.id)


def _name(base: Base) -> str:
    return f"{base.id}{f'@{base.revision}' if base.revision else ''}"


def _metadata(sources: Sequence[Source], notes: list[str]) -> dict[str, Any]:
    """Each format's settings, as the first source that has some says."""
    kept: dict[str, Any] = {}
    owners: dict[str, Source] = {}
    for source in sources:
        for name, said in source.adapter.metadata.items():
            if name not in kept:
                kept[name], owners[name] = said, source
            elif keys := _different(kept[name], said):
                notes.append(f"{source} has other settings of {name} ({keys}); those of {owners[name]} are kept")
    return kept


def _different(one: Any, other: Any) -> str:
    """The names of the settings that differ; no name where none of them matters."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return "" if one == other else "all"
    return ", ".join(sorted(key for key in {**one, **other}.keys() - _MADE_ANEW if one.get(key) != other.get(key)))


def _chosen(sources: Sequence[Source], number: int | None) -> Source | None:
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= len(sources):
        raise OptionError(f"full_weights is {number!r:.40}, expected the number of a source, from 1 to {len(sources)}")
    if not any(_weights(source.adapter) for source in sources):
        raise OptionError(f"full_weights is {number}, but no source holds a whole weight or a token row to choose")
    return sources[number - 1]


def _left_out(sources: Sequence[Source], chosen: Source) -> tuple[str, ...]:
    """The weights of other sources that the chosen one does not have, or has with other values."""
    kept = _weights(chosen.adapter)
    return tuple(
        f"{name} of {source}"
        for source in sources
        for name, weight in _weights(source.adapter).items()
        if source is not chosen and source.weight and not (name in kept and _same(kept[name], weight))
    )


def _common_weights(sources: Sequence[Source], notes: list[str]) -> dict[str, FullWeight | RowWeights]:
    """The weights that sources have alike, and those that one has alone.

    Raises: UnsupportedFeatureError that names all that differ
    """
    kept: dict[str, FullWeight | RowWeights] = {}
    differing: dict[str, None] = {}
    for source in sources:
        for name, weight in _weights(source.adapter).items():
            if not _same(kept.setdefault(name, weight), weight):
                differing[name] = None
    if differing:
        holders = [source for source in sources if differing.keys() & _weights(source.adapter).keys()]
        raise UnsupportedFeatureError(
            f"whole weights differ between {', '.join(map(str, holders))}: {', '.join(differing)}. "
            f"They replace those of the base model, so they do not add up; {_CHOOSE}"
        )
    notes += _partial_notes(sources, kept)
    return kept


def _partial_notes(sources: Sequence[Source], names: Iterable[str]) -> list[str]:
    """A line on the weights that some sources hold and others lack, for each set of holders."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        holders = tuple(str(source) for source in sources if name in _weights(source.adapter))
        if len(holders) < len(sources):
            groups.setdefault(holders, []).append(name)
    return [f"only in {', '.join(holders)}, and kept: {', '.join(held)}" for holders, held in groups.items()]


def _weights(adapter: Adapter) -> dict[str, FullWeight | RowWeights]:
    return {**adapter.full_weights, **adapter.row_weights}


def _same(one: FullWeight | RowWeights, other: FullWeight | RowWeights) -> bool:
    """Whether two weights put the same bits into the same places."""
    if isinstance(one, FullWeight) and isinstance(other, FullWeight):
        return same_bits(one.weight, other.weight)
    if isinstance(one, RowWeights) and isinstance(other, RowWeights):
        return sorted(one.indices) == sorted(other.indices) and same_bits(_sorted(one), _sorted(other))
    return False


def _sorted(weights: RowWeights) -> Tensor:
    order = sorted(range(len(weights.indices)), key=weights.indices.__getitem__)
    return weights.rows[order]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit: NaN equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(left, right)


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
