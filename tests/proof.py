"""The proof of a conversion: what `diff` measures is nothing, or within the error that was reported."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

import adaptertools
from adaptertools import api
from adaptertools.adapter import Adapter
from adaptertools.api import WriteReport
from adaptertools.operations.select import select

EPSILON = 2.0**-52

_BASES = Path(__file__).parents[1] / "fixtures" / "base" / "of_format"


def needed(name: str) -> dict[str, Any]:
    """What any adapter needs to be written in a format: the base model that the fixtures have for it, if they do."""
    base = _BASES / name.replace("-", "_")
    return {"base": base} if base.is_dir() else {}


def assert_diff_proves(before: Adapter, after: Adapter, *reports: WriteReport) -> None:
    """Nothing differs where the reports say exact; else delta weights and the rest are within the reported errors.

    A report's error is relative to each element of each factor, so that of a product is relative to |s|·|B|·|A|.
    """
    found = adaptertools.diff(before, after, tolerance=0.0)
    assert [row.target for row in found.modules if row.only_in] == []
    assert found.others == ()
    if all(report.exact for report in reports):
        assert found.same, found
        return
    error = math.prod(1 + report.max_relative_error for report in reports) ** 2 - 1 + 4 * EPSILON
    assert found.distance <= error * size_of_factors(before)
    for weight in found.weights:
        assert weight.relative_distance <= error, weight


def without_component(adapter: Adapter) -> Adapter:
    """The adapter of a single model without that model's name, which some formats do not record and others ask for."""
    if len({module.target.component for module in adapter.modules}) > 1:
        return adapter
    return adapter.map_modules(lambda module: replace(module, target=replace(module.target, component="")))


def size_of_factors(adapter: Adapter) -> float:
    """The norm of |s|·|B|·|A| over all modules, by the Gram matrices: nothing cancels where no number is negative."""
    return math.hypot(
        *(_norm_of_product(m.lora_B.double().abs(), m.lora_A.double().abs()) * m.scaling for m in adapter.modules)
    )


def _norm_of_product(lora_B: Tensor, lora_A: Tensor) -> float:
    return float(((lora_B.mT @ lora_B) * (lora_A @ lora_A.mT)).sum().sqrt())


def proven(convert: Callable[..., WriteReport]) -> Callable[..., WriteReport]:
    """`adaptertools.convert` that proves every conversion it makes: what was meant to be written is what is read."""

    @functools.wraps(convert)
    def converting(src: str | Path, dst: str | Path, **options: Any) -> WriteReport:
        try:
            before = _meant(src, options)
        except adaptertools.AdapterToolsError:
            return convert(src, dst, **options)  # which says the same
        report = convert(src, dst, **options)
        if not options.get("allow_nonfinite"):
            assert_diff_proves(before, adaptertools.read(dst, format=report.format), report)
        return report

    return converting


def _meant(src: str | Path, options: Mapping[str, Any]) -> Adapter:
    """What a conversion with these options is to write."""
    adapter = adaptertools.read(src, **(options.get("read_options") or {}))
    chosen = {name: options[name] for name in ("only", "exclude", "rename") if options.get(name)}
    return api.without(select(adapter, **chosen) if chosen else adapter, options.get("drop", ()))
