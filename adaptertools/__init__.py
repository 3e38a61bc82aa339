"""Convert, rescale, truncate, stack, merge and compare LoRA adapters, on this machine and on the Hugging Face Hub.

Importing this imports no torch: names load what they need when used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaptertools.adapter import Adapter, Base, Feature, FullWeight, Kind, LoraModule, RowSlice, ScaleRule, Target
    from adaptertools.api import (
        WriteReport,
        convert,
        estimate,
        from_state_dict,
        merge_into,
        plan_merge,
        push,
        read,
        stored_size,
        to_state_dict,
        verify_merge,
        write,
    )
    from adaptertools.api.checking import check, fix
    from adaptertools.api.verdict import Check, Fixed
    from adaptertools.errors import AdapterToolsError
    from adaptertools.hub.pull import PullReport, pull
    from adaptertools.hub.push import PushReport
    from adaptertools.merging.memory import Merged
    from adaptertools.merging.plan import MergePlan
    from adaptertools.merging.record import MergeReport
    from adaptertools.merging.run import run_merge
    from adaptertools.merging.verify import Verification
    from adaptertools.operations.difference import Difference
    from adaptertools.operations.estimate import Estimate
    from adaptertools.operations.rescale import rescale
    from adaptertools.operations.stack import Stacked, stack
    from adaptertools.operations.summary import summarize
    from adaptertools.operations.truncate import Outlook, Truncation, truncate, truncation_table

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapter",
    "AdapterToolsError": "errors",
    "Base": "adapter",
    "Check": "api.verdict",
    "Difference": "operations.difference",
    "Estimate": "operations.estimate",
    "Feature": "adapter",
    "Fixed": "api.verdict",
    "FullWeight": "adapter",
    "Kind": "adapter",
    "LoraModule": "adapter",
    "MergePlan": "merging.plan",
    "MergeReport": "merging.record",
    "Merged": "merging.memory",
    "Outlook": "operations.truncate",
    "PullReport": "hub.pull",
    "PushReport": "hub.push",
    "RowSlice": "adapter",
    "ScaleRule": "adapter",
    "Stacked": "operations.stack",
    "Target": "adapter",
    "Truncation": "operations.truncate",
    "Verification": "merging.verify",
    "WriteReport": "api",
    "check": "api.checking",
    "convert": "api",
    "diff": "api",
    "estimate": "api",
    "fix": "api.checking",
    "from_state_dict": "api",
    "merge_into": "api",
    "plan_merge": "api",
    "pull": "hub.pull",
    "push": "api",
    "read": "api",
    "rescale": "operations.rescale",
    "run_merge": "merging.run",
    "stack": "operations.stack",
    "stored_size": "api",
    "summarize": "operations.summary",
    "to_state_dict": "api",
    "truncate": "operations.truncate",
    "truncation_table": "operations.truncate",
    "verify_merge": "api",
    "write": "api",
}

__all__ = [
    "Adapter",
    "AdapterToolsError",
    "Base",
    "Check",
    "Difference",
    "Estimate",
    "Feature",
    "Fixed",
    "FullWeight",
    "Kind",
    "LoraModule",
    "MergePlan",
    "MergeReport",
    "Merged",
    "Outlook",
    "PullReport",
    "PushReport",
    "RowSlice",
    "ScaleRule",
    "Stacked",
    "Target",
    "Truncation",
    "Verification",
    "WriteReport",
    "check",
    "convert",
    "diff",
    "estimate",
    "fix",
    "from_state_dict",
    "merge_into",
    "plan_merge",
    "pull",
    "push",
    "read",
    "rescale",
    "run_merge",
    "stack",
    "stored_size",
    "summarize",
    "to_state_dict",
    "truncate",
    "truncation_table",
    "verify_merge",
    "write",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
