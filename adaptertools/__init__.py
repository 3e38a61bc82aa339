"""Convert, rescale and inspect LoRA adapters. Importing this imports no torch: names load what they need when used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptertools.adapter import Adapter, Base, Feature, FullWeight, Kind, LoraModule, RowSlice, ScaleRule, Target
    from adaptertools.api import WriteReport, convert, from_state_dict, read, to_state_dict, write
    from adaptertools.errors import AdapterToolsError
    from adaptertools.operations.rescale import rescale
    from adaptertools.operations.summary import summarize

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapter",
    "AdapterToolsError": "errors",
    "Base": "adapter",
    "Feature": "adapter",
    "FullWeight": "adapter",
    "Kind": "adapter",
    "LoraModule": "adapter",
    "RowSlice": "adapter",
    "ScaleRule": "adapter",
    "Target": "adapter",
    "WriteReport": "api",
    "convert": "api",
    "from_state_dict": "api",
    "read": "api",
    "rescale": "operations.rescale",
    "summarize": "operations.summary",
    "to_state_dict": "api",
    "write": "api",
}

__all__ = [
    "Adapter",
    "AdapterToolsError",
    "Base",
    "Feature",
    "FullWeight",
    "Kind",
    "LoraModule",
    "RowSlice",
    "ScaleRule",
    "Target",
    "WriteReport",
    "convert",
    "from_state_dict",
    "read",
    "rescale",
    "summarize",
    "to_state_dict",
    "write",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
