"""The strings in the header of a kohya file: what training said, what we add, and the hashes of sd-scripts.

    ss_network_dim, ss_network_alpha    those of all modules but k×k convolutions; "Dynamic" where they differ
    ss_network_args                     JSON; conv_dim and conv_alpha are those of the k×k convolutions
    sshs_model_hash, sshs_legacy_hash   of the tensors; the second of the header's ss_ entries too
    modelspec.hash_sha256               where it stood before: sshs_model_hash behind 0x
    adaptertools                        JSON: history; under `kohya` the names before flattening, and the bases
    any other                           kept as it is

Source: kohya-ss/sd-scripts library/train_util.py (precalculate_safetensors_hashes), networks/resize_lora.py
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from adaptertools.adapter import Adapter, Base
from adaptertools.containers import safetensors
from adaptertools.containers.history import HEADER_KEY
from adaptertools.containers.jsonfile import parse_object
from adaptertools.dialects.kohya.keys import ALPHA, DOWN
from adaptertools.dialects.kohya.names import flatten
from adaptertools.errors import ConfigError
from adaptertools.module import LoraModule
from adaptertools.tensors import NamedTensors, computed, materialize, tensor_bytes

_DYNAMIC = "Dynamic"
_MODULE, _DIM, _ALPHA, _ARGS = "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"
_HASHES = {"sshs_model_hash": 64, "sshs_legacy_hash": 8}
_SPEC_HASH = "modelspec.hash_sha256"
_TRAINING = "ss_"
_OWN = "kohya"

_LEGACY_START, _LEGACY_STOP = 0x100000, 0x110000
"""The bytes of a file that its legacy hash is of."""

_DTYPE_ORDER = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The order in which the safetensors library stores tensors, before that of their names."""


def kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of a header is carried along: all but the hashes, and our own entry, which is read apart."""
    return {key: value for key, value in metadata.items() if key not in (*_HASHES, HEADER_KEY)}


def plain_lora(metadata: Mapping[str, str]) -> dict[str, str]:
    """A header without what it says of a network that is no LoRA any more."""
    return {key: value for key, value in metadata.items() if key not in (_MODULE, _ARGS, _DIM, _ALPHA)}


def record_of(label: str, metadata: Mapping[str, str]) -> tuple[dict[str, tuple[str, str]], dict[str, Base]]:
    """The names before flattening, and the bases, as we wrote them; nothing from files of others.

    A name counts only where flattening it gives the end of the name that it is recorded for.

    Raises: ConfigError, DamagedFileError
    """
    if HEADER_KEY not in metadata:
        return {}, {}
    where = f"{label}: header entry {HEADER_KEY!r}"
    said = parse_object(where, metadata[HEADER_KEY]).get(_OWN, {})
    names = said.get("names", {}) if isinstance(said, dict) else None
    bases = said.get("bases", {}) if isinstance(said, dict) else None
    if not isinstance(names, dict) or not all(_is_texts(value, str) for value in names.values()):
        raise ConfigError(f"{where}: names is no object of [component, parameter]")
    if not isinstance(bases, dict) or not all(_is_texts(value, str | None) for value in bases.values()):
        raise ConfigError(f"{where}: bases is no object of [id, revision]")
    found = {name: (pair[0], pair[1]) for name, pair in names.items() if pair[1] and name.endswith(flatten(pair[1]))}
    return found, {name: Base(id=pair[0], revision=pair[1]) for name, pair in bases.items()}


def _is_texts(value: object, kind: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, kind) for text in value)


@dataclass(frozen=True, slots=True)
class Stated:
    """The rank and the alpha that the file states for a module, and whether it is a k×k convolution."""

    rank: int
    alpha: float
    wide: bool


def renewed(
    adapter: Adapter, named: Mapping[str, LoraModule], tensors: NamedTensors, carried: Mapping[str, str]
) -> dict[str, str]:
    """The header of a file of these modules; in place of the hashes stands something of their length."""
    stated = [_stated(name, tensors) for name in named]
    convolutions = [one for one in stated if one.wide]
    ordinary = [one for one in stated if not one.wide] or convolutions
    header = {_MODULE: "networks.lora", **kept(carried)}
    header[_DIM] = _unless_same(carried.get(_DIM), _common(one.rank for one in ordinary))
    header[_ALPHA] = _unless_same(carried.get(_ALPHA), _common(one.alpha for one in ordinary))
    if _ARGS in header:
        header[_ARGS] = _renewed_args(header[_ARGS], convolutions)
    header |= {name: "0" * length for name, length in _HASHES.items()}
    if _SPEC_HASH in header:
        header[_SPEC_HASH] = "0" * 66
    own = _record(adapter, named)
    return {**header, HEADER_KEY: json.dumps({_OWN: own}, sort_keys=True)} if own else header


def _record(adapter: Adapter, named: Mapping[str, LoraModule]) -> dict[str, Any]:
    targets = {name: module.target for name, module in named.items() if not module.target.opaque}
    names = {name: [target.component, target.parameter] for name, target in targets.items()}
    bases = {name: [base.id, base.revision] for name, base in adapter.bases.items() if base.id or base.revision}
    return {**({"names": names} if names else {}), **({"bases": bases} if bases else {})}


def _stated(name: str, tensors: NamedTensors) -> Stated:
    down, alpha = tensors[f"{name}.{DOWN}"], materialize(tensors[f"{name}.{ALPHA}"])
    return Stated(rank=down.shape[0], alpha=float(alpha), wide=math.prod(down.shape[2:]) > 1)


def _common(values: Iterable[float]) -> str:
    """The one value as text; Dynamic, as sd-scripts says, if they differ."""
    different = set(values)
    return str(different.pop()) if len(different) == 1 else _DYNAMIC


def _unless_same(old: str | None, new: str) -> str:
    """The old words where they mean the same: 16 and 16.0."""
    with suppress(TypeError, ValueError):
        if float(old) == float(new):  # type: ignore[arg-type]
            return str(old)
    return new


def _renewed_args(text: str, convolutions: Sequence[Stated]) -> str:
    """ss_network_args with what it says of convolutions as it is now; unchanged where it says nothing of them."""
    try:
        args = json.loads(text)
    except ValueError:
        return text
    if not isinstance(args, dict) or not convolutions:
        return text
    now = {
        "conv_dim": _common(one.rank for one in convolutions),
        "conv_alpha": _common(one.alpha for one in convolutions),
    }
    changed = {key: _unless_same(str(args[key]), value) for key, value in now.items() if key in args}
    stale = {key: value for key, value in changed.items() if value != str(args[key])}
    return json.dumps({**args, **stale}) if stale else text


def in_library_order(tensors: NamedTensors) -> dict[str, Any]:
    """The tensors in the order in which the safetensors library stores them, which the hashes follow."""
    order = {dtype: place for place, dtype in enumerate(_DTYPE_ORDER)}
    return dict(sorted(tensors.items(), key=lambda item: (order.get(item[1].dtype, len(order)), item[0])))


def hashes(tensors: NamedTensors, header: Mapping[str, str]) -> dict[str, str]:
    """The hashes that sd-scripts writes of these tensors, given in the order of the safetensors library.

    They are of the file that the library would make with the ss_ entries alone: the first of the tensors' bytes, the
    second of the 64 KiB behind its first MiB.

    Memory: two tensors; each is computed here and again when it is written
    """
    training = {key: value for key, value in header.items() if key.startswith(_TRAINING)}
    start, _ = safetensors.lay_out("hashes", tensors, training)
    whole, part = hashlib.sha256(), hashlib.sha256(start[_LEGACY_START:_LEGACY_STOP])
    position = len(start)
    for tensor in computed(tensors.values()):
        data = tensor_bytes(tensor)
        whole.update(data)
        if position < _LEGACY_STOP:
            part.update(data[max(0, _LEGACY_START - position) : _LEGACY_STOP - position])
        position += data.nbytes
    found = dict(zip(_HASHES, (whole.hexdigest(), part.hexdigest()[:8]), strict=True))
    return found | ({_SPEC_HASH: f"0x{whole.hexdigest()}"} if _SPEC_HASH in header else {})
