"""A file of flat names -> Adapter: what the formats kohya and lycoris have in common."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from adaptertools.adapter import Adapter, Origin, merge_notes
from adaptertools.containers import sidecar
from adaptertools.containers.history import read_history, read_settings
from adaptertools.containers.pipeline import Model
from adaptertools.containers.source import Source
from adaptertools.dialects.kohya import header
from adaptertools.dialects.kohya.factors import Pair, Rounding, magnitude, module_of
from adaptertools.dialects.kohya.keys import ALPHA, DORA, LOHA, LOKR, LORA, Group, groups, other_method
from adaptertools.dialects.kohya.names import Names, prefixes_of
from adaptertools.errors import AdapterToolsError, NotLoraError, UnclaimedTensorError, count
from adaptertools.module import LoraModule
from adaptertools.tensors import dtype_name, natural_order

CONFIG = sidecar.SUFFIX

Factorise = Callable[[Group, Rounding], Pair]


def read_adapter(
    source: Source,
    name: str,
    *,
    format: str,
    base: Model | None,
    claimed: frozenset[str],
    factorise: Factorise,
    ignore_other: bool = False,
) -> Adapter:
    """The adapter in the file `name` of a source.

    `factorise` makes the factors of a module's parts, which are those in `claimed`, alpha and dora_scale.
    `ignore_other` leaves aside what belongs to methods that are no low-rank product.

    Raises: NotLoraError, UnclaimedTensorError, and what reading a module raises
    """
    file = source.tensors(name)
    metadata = _metadata(source, name, file.metadata)
    found, others = groups(file.tensors)
    found, ignored = _sorted_out(file.label, found, ignore_other)
    _check_claimed(file.label, found, others, claimed)
    recorded, bases = header.record_of(file.label, metadata)
    names, rounding = Names(base, recorded), Rounding()
    try:
        modules = {group.name: _module(group, factorise(group, rounding), names) for group in found.values()}
    except AdapterToolsError as error:
        raise type(error)(f"{file.label}: {error}") from error
    is_plain = rounding.computed == 0 or format == "kohya"
    carried = {
        "header": header.kept(metadata) if is_plain else header.plain_lora(header.kept(metadata)),
        "prefixes": prefixes_of(found, file.label),
        "alpha_dtypes": _alpha_dtypes(found, modules),
    }
    return Adapter(
        modules=tuple(sorted(modules.values(), key=lambda module: natural_order(str(module.target)))),
        bases=bases,
        history=read_history(metadata),
        metadata={**read_settings(metadata), "kohya": carried},
        notes=merge_notes(names.notes(), _alpha_notes(found.values()), _rounding_notes(rounding), ignored),
        origin=Origin(format=format, container=file.container, label=source.label, path=source.path, name=source.name),
    )


def _metadata(source: Source, name: str, stored: Mapping[str, str]) -> Mapping[str, str]:
    """The strings of the header; for tensors in memory those that were given with them."""
    if source.path is not None:
        return stored
    return {str(key): str(value) for key, value in (source.document(f"{name}{CONFIG}") or {}).items()}


def _sorted_out(label: str, found: Mapping[str, Group], ignore: bool) -> tuple[dict[str, Group], list[str]]:
    """The modules without the tensors of other methods, and a note on what was left out.

    Raises: NotLoraError if there are any and they are not to be ignored
    """
    kept: dict[str, Group] = {}
    left: list[str] = []
    for group in found.values():
        methods = {part: method for part in group.parts if (method := other_method(group.name, part))}
        for part, method in methods.items():
            if not ignore:
                raise NotLoraError(
                    f"{label}: {group.name}.{part} is {method}, which is no low-rank product. "
                    "--in ignore_other=true (format lycoris) leaves such tensors out"
                )
            left.append(f"{group.name}.{part}")
        parts = {part: tensor for part, tensor in group.parts.items() if part not in methods}
        if not methods or (LORA | LOHA | LOKR).intersection(parts):
            kept[group.name] = Group(group.name, parts)
    return kept, [_left_out(left)] if left else []


def _left_out(tensors: list[str]) -> str:
    return f"left out, as asked for: {count(len(tensors), 'tensor')} of other methods, such as {tensors[0]}"


def _check_claimed(label: str, found: Mapping[str, Group], others: Iterable[str], claimed: frozenset[str]) -> None:
    for group in found.values():
        for part in group.parts:
            if part not in claimed and part not in (ALPHA, DORA):
                raise UnclaimedTensorError(
                    f"{label}: {group.name}.{part} belongs to no LoRA; expected {', '.join(sorted(claimed))}, {ALPHA} "
                    f"and {DORA}"
                )
        if not claimed.intersection(group.parts):
            part = next(iter(group.parts))
            raise UnclaimedTensorError(f"{label}: {group.name}.{part} stands without factors. The file is not whole")
    for key in others:
        raise UnclaimedTensorError(f"{label}: {key} is no key of a module: expected <flat name>.<part>")


def _module(group: Group, pair: Pair, names: Names) -> LoraModule:
    target, shape = names.target(group.name, pair.shape)
    if shape is not None and shape != pair.shape:
        pair = replace(pair, shape=shape)
    return module_of(group, pair, {"target": target, **magnitude(group, pair)})


def _alpha_dtypes(found: Mapping[str, Group], modules: Mapping[str, LoraModule]) -> dict[str, str]:
    """The dtypes of alphas that differ from those of their factors, by target, to write them as they were."""
    dtypes: dict[str, str] = {}
    for name, group in found.items():
        alpha = group.parts.get(ALPHA)
        if alpha is not None and alpha.dtype != modules[name].lora_A.dtype:
            dtypes[str(modules[name].target)] = dtype_name(alpha.dtype)
    return dtypes


def _alpha_notes(found: Iterable[Group]) -> Iterable[str]:
    lacking = [group.name for group in found if ALPHA not in group.parts]
    if lacking:
        few = lacking[0] + (" …" if len(lacking) > 1 else "")
        without = count(len(lacking), "module", ("has", "have"))
        yield f"{without} no alpha, which is then the rank, so that the scaling is 1: {few}"


def _rounding_notes(rounding: Rounding) -> Iterable[str]:
    if rounding.computed:
        some = count(rounding.rounded, "factor", ("was", "were"))
        rounded = f"{some} rounded to float32, by {rounding.worst:.1e} at most"
        lost = rounded if rounding.rounded else "without a loss"
        yield f"the factors of {count(rounding.computed, 'module')} were computed: {lost}"
