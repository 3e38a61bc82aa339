"""The pickle in a torch file: written as torch.save writes it, and searched for what it would call, never run here."""

import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from adaptertools.tensors import Deferred, NamedTensors

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
"""Dtypes that have a storage class of their own."""

_NEWER_DTYPES = (torch.uint64, torch.uint32, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Those that are named beside an untyped storage."""


DTYPES = frozenset((*_STORAGES, *_NEWER_DTYPES))
"""The dtypes that a torch file is written in."""


def dump(tensors: NamedTensors) -> bytes:
    """The pickle of a state dict whose storages stand elsewhere, under `0`, `1` and so on in the order given."""
    buffer = BytesIO()
    entries = OrderedDict((name, _Entry(str(index), tensor)) for index, (name, tensor) in enumerate(tensors.items()))
    _Pickler(buffer, protocol=2).dump(entries)
    return buffer.getvalue()


def foreign_globals(content: bytes) -> list[str]:
    """The names that a pickle imports from elsewhere than torch, found without running it."""
    found: list[str] = []
    texts: list[str] = []
    with suppress(Exception):  # a damaged pickle names what it names until it breaks
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "GLOBAL":
                found.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                found.append(".".join(texts[-2:]))
            elif isinstance(argument, str):
                texts.append(argument)
    return [name for name in found if not name.startswith("torch.") and name != "collections.OrderedDict"]


class _Storage:
    """Stands for a tensor's bytes in the pickle."""

    def __init__(self, key: str, tensor: Tensor | Deferred) -> None:
        self.key, self.dtype, self.nbytes = key, tensor.dtype, tensor.nbytes

    @property
    def persistent_id(self) -> tuple[str, type, str, str, int]:
        storage_type = _STORAGES.get(self.dtype, torch.UntypedStorage)
        unit = self.dtype.itemsize if self.dtype in _STORAGES else 1
        return ("storage", storage_type, self.key, "cpu", self.nbytes // unit)


class _Entry:
    """Stands for a tensor in the pickle."""

    def __init__(self, key: str, tensor: Tensor | Deferred) -> None:
        self.storage = _Storage(key, tensor)
        self.shape = (*tensor.shape,)  # a new object each time: pickle refers back to those that it has seen

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        strides, step = [], 1
        for size in reversed(self.shape):
            strides.append(step)
            step *= max(size, 1)
        arguments: tuple[Any, ...] = (self.storage, 0, self.shape, tuple(reversed(strides)), False, OrderedDict())
        if self.storage.dtype in _STORAGES:
            return torch._utils._rebuild_tensor_v2, arguments
        return torch._utils._rebuild_tensor_v3, (*arguments, self.storage.dtype)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return obj.persistent_id if isinstance(obj, _Storage) else None
