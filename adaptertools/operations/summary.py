"""What there is to say about an adapter before using it."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from adaptertools.adapter import Adapter, LoraModule, expect_adapter, merge_notes
from adaptertools.errors import few
from adaptertools.linalg import delta_norm
from adaptertools.names import leaf
from adaptertools.tensors import all_finite, dtype_name, tensor_bytes

_WEAK, _STRONG = 0.5, 4.0
_LEARNING_RATE = 2e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSummary:
    """One module. `delta_norm` is ‖s·B·A‖ in the Frobenius norm, without DoRA's magnitude."""

    target: str
    kind: str
    rank: int
    alpha: float
    scale_rule: str
    scaling: float
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    features: tuple[str, ...]
    delta_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """An adapter in numbers. Mappings count the modules for each value; `oddities` are what deserves a second look.

    `parameters` counts all stored values, `factor_parameters` those of the modules, and `full_rank_parameters` those
    of the weights that the modules change.
    """

    format: str | None
    container: str | None
    source: str | None
    bases: Mapping[str, str]
    modules: int
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    scalings: Mapping[float, int]
    scale_rules: Mapping[str, int]
    kinds: Mapping[str, int]
    dtypes: Mapping[str, int]
    nbytes: int
    parameters: int
    factor_parameters: int
    full_rank_parameters: int
    targets: Mapping[str, int]
    features: tuple[str, ...]
    full_weights: Mapping[str, tuple[int, ...]]
    token_rows: Mapping[str, int]
    history: tuple[Mapping[str, Any], ...]
    oddities: tuple[str, ...]
    rows: tuple[ModuleSummary, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The summary in JSON's own terms: keys are text, and NaN or infinity is null."""
        document: dict[str, Any] = _plain(asdict(self))
        return document


def summarize(adapter: Adapter, *, values: bool = False) -> Summary:
    """Sum up an adapter: from shapes alone, or with `values` also what takes reading every factor.

    `values` gives each module's `delta_norm`, and finds NaN, all-zero factors and modules with the same factors.

    Memory: none; with `values` one module in float64
    Raises: OptionError for what is no adapter
    """
    expect_adapter(adapter)
    modules, origin = adapter.modules, adapter.origin
    tensors = _distinct(adapter.named_tensors)
    factors = _distinct({name: tensor for module in modules for name, tensor in _named(module)})
    rows = tuple(_row(module) for module in modules) if values else ()
    found = _odd_values(adapter, rows) if values else []
    return Summary(
        format=origin.format if origin else None,
        container=origin.container if origin else None,
        source=origin.label if origin else None,
        bases={name: _base(adapter, name) for name in adapter.bases if _base(adapter, name)},
        modules=len(modules),
        ranks=_count(module.nominal_rank for module in modules),
        alphas=_count(float(module.alpha) for module in modules),
        scalings=_count(module.scaling for module in modules),
        scale_rules=_count(module.scale_rule.value for module in modules),
        kinds=_count(module.kind.value for module in modules),
        dtypes=_count(dtype_name(tensor.dtype) for tensor in tensors),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        parameters=sum(tensor.numel() for tensor in tensors),
        factor_parameters=sum(tensor.numel() for tensor in factors),
        full_rank_parameters=sum((m.experts or 1) * m.out_features * m.in_features for m in modules),
        targets=_count(leaf(module.target.parameter) for module in modules),
        features=tuple(sorted(adapter.features)),
        full_weights={name: tuple(weight.weight.shape) for name, weight in adapter.full_weights.items()},
        token_rows={name: len(weights.indices) for name, weights in adapter.row_weights.items()},
        history=tuple(entry.to_json() for entry in adapter.history),
        oddities=merge_notes(adapter.notes, _unusual_scaling(modules), found),
        rows=rows,
    )


def _row(module: LoraModule) -> ModuleSummary:
    return ModuleSummary(
        target=str(module.target),
        kind=module.kind.value,
        rank=module.nominal_rank,
        alpha=float(module.alpha),
        scale_rule=module.scale_rule.value,
        scaling=module.scaling,
        shape=module.weight_shape,
        dtypes=tuple(sorted({dtype_name(tensor.dtype) for tensor in module.tensors.values()})),
        features=tuple(sorted(module.features)),
        delta_norm=delta_norm(module),
    )


def _unusual_scaling(modules: Iterable[LoraModule]) -> list[str]:
    """A word on every scaling that practice advises against."""
    words = []
    for scaling, count in _count(abs(module.scaling) for module in modules).items():
        where = f"scaling {scaling:g} ({_modules(count)})"
        if scaling == 0:
            words.append(f"{where}: these change nothing")
        elif scaling < _WEAK:
            words.append(f"{where} is below 0.5, so the adapter acts weakly: was the rank raised and alpha left alone?")
        elif scaling > _STRONG:
            words.append(
                f"{where} is above 4, where training tends to be unstable: a starting learning rate of "
                f"2e-4 / scaling = {_LEARNING_RATE / scaling:.2g} is advised"
            )
    return words


def _odd_values(adapter: Adapter, rows: Iterable[ModuleSummary]) -> list[str]:
    bad = [name for name, tensor in adapter.named_tensors.items() if not all_finite(tensor)]
    words = [f"NaN or infinity in {few(bad)}"] if bad else []
    zero = [row.target for row in rows if row.delta_norm == 0 and row.scaling]
    if zero:
        words.append(f"a factor that is all zero, so that nothing changes, in {_modules(len(zero))}: {few(zero)}")
    same: dict[bytes, list[str]] = {}
    for module in adapter.modules:
        same.setdefault(_digest(module), []).append(str(module.target))
    words += [f"the same factors, bit by bit, in {few(names)}" for names in same.values() if len(names) > 1]
    return words


def _digest(module: LoraModule) -> bytes:
    digest = hashlib.blake2b()
    for factor in (module.lora_A, module.lora_B):
        digest.update(f"{tuple(factor.shape)}{factor.dtype}".encode())
        digest.update(tensor_bytes(factor))
    return digest.digest()


def _named(module: LoraModule) -> list[tuple[str, Tensor]]:
    return [(f"{module.target}.{name}", tensor) for name, tensor in module.tensors.items()]


def _distinct(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Each tensor once, though several modules may share one."""
    return list({_identity(tensor): tensor for tensor in tensors.values()}.values())


def _identity(tensor: Tensor) -> tuple[object, ...]:
    place = id(tensor) if tensor.is_meta else tensor.data_ptr()
    return place, tuple(tensor.shape), tensor.stride(), tensor.dtype


def _base(adapter: Adapter, component: str) -> str:
    base = adapter.bases[component]
    name = f"{base.id or ''}{f'@{base.revision}' if base.revision else ''}"
    said = [f"changed by {base.change}"] if base.change else []
    if base.layer_replication:
        said.append(f"built of layers {[list(layers) for layers in base.layer_replication]}")
    return f"{name or 'unnamed'} ({', '.join(said)})" if said else name


def _count(values: Iterable[Any]) -> dict[Any, int]:
    return dict(sorted(Counter(values).items()))


def _modules(count: int) -> str:
    return f"{count} module{'' if count == 1 else 's'}"


def _plain(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {f"{key:g}" if isinstance(key, float) else str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value
