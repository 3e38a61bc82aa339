"""Bytes: how many an adapter takes where it is stored, and how many the user allows it."""

import json
import re
from decimal import Decimal, InvalidOperation

import torch

from adaptertools.adapter import Adapter
from adaptertools.containers import safetensors
from adaptertools.errors import OptionError

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}

READ_AT_ONCE = 256_000_000
"""Bytes of an adapter up to which its values are looked at unasked; of a larger one the headers must do."""

_LONGER_NAME = "-" * 60
"""How much longer the name of a tensor may be in a file than in a message."""

_ROOM_PER_MODULE = 200
"""Beside two mentions of its name: rank, alpha and quotation marks in a configuration."""

_ROOM = 1500
"""The rest of a configuration, and what writing adds to the history."""


def stored_bytes(adapter: Adapter, dtype: torch.dtype | None = None) -> int:
    """At most how many bytes a PEFT folder with a safetensors file takes, configuration and history included.

    `dtype` is what floating-point tensors are cast to. Other formats may need more: those that fold scalings into half
    precision, or that put several modules into one pair of tensors. `adaptertools.stored_size` knows each to the byte.
    """
    cast = {
        name + _LONGER_NAME: torch.empty_like(
            tensor, device="meta", dtype=dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        )
        for name, tensor in adapter.named_tensors.items()
    }
    names = [str(module.target) for module in adapter.modules]
    said = {"history": [entry.to_json() for entry in adapter.history], "metadata": dict(adapter.metadata)}
    return (
        safetensors.size(cast, {})
        + sum(2 * len(name.encode()) + _ROOM_PER_MODULE for name in names)
        + 2 * len(json.dumps(said, default=str).encode())  # quotation marks in quotation marks
        + _ROOM
    )


def parse_size(size: int | str, whole: int) -> int:
    """A number of bytes: as such, with a unit (`20MB` is 20·10⁶, `20MiB` is 20·2²⁰), or as a percentage of `whole`.

    Raises: OptionError
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise OptionError(f"size is {size!r:.40}, expected bytes such as 300000, 20MB, 1.5MiB or 50%")
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?|\.[0-9]+)\s*([a-z]*|%)\s*", str(size).lower())
    unit = match[2] if match else "?"
    if not match or unit not in (*_UNITS, "%"):
        raise OptionError(f"size is {size!r:.40}, expected bytes such as 300000, 20MB, 1.5MiB or 50%")
    try:
        number = Decimal(match[1])
    except InvalidOperation:
        raise OptionError(f"size is {size!r:.40}, expected a number before the unit") from None
    if unit == "%" and number > 100:
        raise OptionError(f"size is {size!r:.40}, expected at most 100%: truncating makes nothing larger")
    found = int(number * whole / 100) if unit == "%" else int(number * _UNITS[unit])
    if found < 1:
        raise OptionError(f"size is {size!r:.40}, expected more than nothing")
    return found
