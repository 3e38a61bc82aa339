"""The leaves of a Flax tree: how keys are spelled, which dialect they speak, and which leaves belong together.

    nnx            P/lora_a, P/lora_b                    nnx.LoRA; under P/lora for nnx.LoRALinear
    linen          P/lora_A, P/lora_B                    hand-written Linen modules
    qwix           P/<weight>_lora_a, P/<weight>_lora_b  tunix, MaxText
    gemma          P/lora/a, P/lora/b                    gemma.peft, gm.nn.LoRA
    maxtext-legacy P/lora_a.kernel, P/lora_b.kernel      MaxText before its move to qwix; the dot is part of the key
    openpi         P/gating_einsum_lora_a, or lora_a with a head axis; recognised only to be refused with a reason

In front of a path stand `params` and `lora`, behind it `value`, wherever a training loop or Orbax put them.
Source: google/flax 18f8f31, google/qwix aa623ac, google-deepmind/gemma 7691fd4, AI-Hypercomputer/maxtext e591f30,
Physical-Intelligence/openpi 15a9616
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from adaptertools.containers.tensorfile import TensorFile
from adaptertools.errors import (
    DuplicateTargetError,
    UnclaimedTensorError,
    UnpairedFactorError,
    UnsupportedFeatureError,
    count,
)
from adaptertools.tensors import natural_order

Path = tuple[str, ...]


class Dialect(StrEnum):
    """How the leaves of a tree are named."""

    NNX = "nnx"
    LINEN = "linen"
    QWIX = "qwix"
    GEMMA = "gemma"
    MAXTEXT_LEGACY = "maxtext-legacy"
    OPENPI = "openpi"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """The two factors of one weight as they stand in the tree, and where the first stands, for messages."""

    path: Path
    weight: str
    a: Tensor
    b: Tensor
    key: str


_KEY_PART = re.compile(r"""\[['"]([^'"]+)['"]\]|\[(\d+)\]|\.?([^/\[\].]+)""")
_OPTIMIZER = frozenset({"opt_state", "optimizer_state", "step"})
_DOTTED_ONLY_IN_FLAX = ("msgpack", "orbax")
"""Containers that MLX, whose dotted keys look like those of Flax, never writes."""

_EINSUMS = ("q_einsum", "kv_einsum", "qkv_einsum", "attn_vec_einsum")
_REFUSED = (
    (re.compile(r"(.*_)?lora_[ab]_experts"), "factors of single experts in a form that only one fork of openpi knows"),
    (re.compile(r"(dora_|lora_)?magnitude(_vector)?"), "a DoRA magnitude, which no Flax library applies"),
    (
        re.compile(r".*_lora_einsum_str"),
        "a debugging string of qwix and no parameter: save nnx.state(model, nnx.LoRAParam) alone",
    ),
)
_EXPERTS = re.compile(r"(?i)experts?(_\d+)?|moe.*|.*moeblock.*|router")


def tree_paths(file: TensorFile, *, own: bool = False) -> dict[Path, str]:
    """The names of a file as paths, without what wrappers put around them; an `own` file has nothing in front.

    Raises: DuplicateTargetError if two names become one path
    """
    dotted = not _separated(file)
    paths: dict[Path, str] = {}
    for name in file.tensors:
        path = _strip_value(_split(name, dotted))
        path = path if own else _strip_front(path)
        if path in paths:
            raise DuplicateTargetError(f"{file.label}: {name} and {paths[path]} are the same leaf of the tree")
        paths[path] = name
    return paths


def _split(name: str, dotted: bool) -> Path:
    if name.startswith("["):
        return tuple(next(filter(None, part)) for part in _KEY_PART.findall(name))
    if not dotted:
        return tuple(name.split("/"))
    parts = name.split(".")
    if parts[-2:] in (["lora_a", "kernel"], ["lora_b", "kernel"]):
        parts[-2:] = [".".join(parts[-2:])]
    return tuple(parts)


def _strip_value(path: Path) -> Path:
    return path[:-1] if len(path) > 1 and path[-1] == "value" else path


def _strip_front(path: Path) -> Path:
    while len(path) > 1 and path[0] == "params":
        path = path[1:]
    return _strip_front(path[1:]) if len(path) > 2 and path[0] == "lora" else path


def _separated(file: TensorFile) -> bool:
    return any("/" in name or name.startswith("[") for name in file.tensors)


def is_optimizer(path: Path) -> bool:
    """Whether a leaf belongs to the optimizer or counts its steps."""
    return path[0] in _OPTIMIZER


def certain(file: TensorFile) -> bool:
    """Whether names like `x.lora_a` can only be Flax's: MLX writes the same names, with dots, and the same shapes."""
    return _separated(file) or file.container in _DOTTED_ONLY_IN_FLAX or file.metadata.get("format") == "flax"


def recognise(file: TensorFile) -> Dialect | None:
    """The dialect of a file, told by its leaves; None if no leaf is a Flax LoRA factor."""
    shapes = {path: file.tensors[name].shape for path, name in _lenient_paths(file).items() if not is_optimizer(path)}
    leaves = {path[-1] for path in shapes}
    if any(path[-2:] == ("lora", "a") for path in shapes):
        return Dialect.GEMMA
    if "lora_a.kernel" in leaves:
        return Dialect.MAXTEXT_LEGACY
    if any(_is_openpi(path, len(shape)) for path, shape in shapes.items()):
        return Dialect.OPENPI
    if any(leaf.endswith(("_lora_a", "_lora_b")) and len(leaf) > len("_lora_a") for leaf in leaves):
        return Dialect.QWIX
    if leaves & {"lora_A", "lora_B"}:
        return Dialect.LINEN
    return Dialect.NNX if leaves & {"lora_a", "lora_b"} else None


def _lenient_paths(file: TensorFile) -> dict[Path, str]:
    try:
        return tree_paths(file)
    except DuplicateTargetError:
        return tree_paths(file, own=True)


def _is_openpi(path: Path, ndim: int) -> bool:
    """Per-head factors: openpi gives each factor the weight's own axes, where the einsum rule would drop some."""
    if path[-1] == "gating_einsum_lora_a":
        return ndim >= 3
    return path[-1] == "lora_a" and ndim >= 3 and any(part.startswith(_EINSUMS) for part in path[:-1])


def pairs(file: TensorFile, dialect: Dialect, *, own: bool, ignore_other: bool) -> tuple[list[Pair], tuple[str, ...]]:
    """The factors of a file, paired, in natural order, and notes about what was left aside.

    `own` files are those that a sidecar describes: their paths are taken as they are. `ignore_other` leaves aside
    what is no factor.

    Raises: UnpairedFactorError, UnclaimedTensorError, UnsupportedFeatureError
    """
    halves: dict[tuple[Path, str], dict[str, str]] = {}
    other: list[str] = []
    optimizer = 0
    for path, name in sorted(tree_paths(file, own=own).items(), key=lambda item: natural_order(item[1])):
        if not own and is_optimizer(path):
            optimizer += 1
            continue
        factor = _factor(path, dialect, own)
        if factor is None:
            _refuse(file.label, name, path[-1])
            other.append(name)
            continue
        parent, weight, which = factor
        half = halves.setdefault((parent, weight), {})
        if which in half:
            raise DuplicateTargetError(f"{file.label}: {name} and {half[which]} are the same factor")
        half[which] = name
    for key in file.metadata:
        _refuse(file.label, key, re.split(r"[/.]", key)[-1])
    if other and not ignore_other:
        raise UnclaimedTensorError(_unclaimed(file.label, other, dialect))
    found = [_pair(file, path, weight, half) for (path, weight), half in halves.items()]
    return found, (*_left_aside(optimizer, "of the optimizer"), *_left_aside(len(other), "that are no LoRA factors"))


def _factor(path: Path, dialect: Dialect, own: bool) -> tuple[Path, str, str] | None:
    """The module path, the weight's name and `a` or `b`, if the leaf is a factor."""
    leaf = path[-1]
    match dialect:
        case Dialect.GEMMA:
            return (path[:-2], "", leaf) if path[-2:] in (("lora", "a"), ("lora", "b")) else None
        case Dialect.QWIX:
            found = re.fullmatch(r"(.+)_lora_([ab])", leaf)
            return (path[:-1], found[1], found[2]) if found else None
        case Dialect.MAXTEXT_LEGACY:
            return (path[:-1], "", leaf[5]) if leaf in ("lora_a.kernel", "lora_b.kernel") else None
        case _:
            if leaf.lower() not in ("lora_a", "lora_b"):
                return None
            parent = path[:-2] if not own and len(path) > 2 and path[-2] == "lora" else path[:-1]
            return parent, "", leaf[-1].lower()


def _pair(file: TensorFile, path: Path, weight: str, half: Mapping[str, str]) -> Pair:
    for which, missing in (("a", "b"), ("b", "a")):
        if which not in half:
            raise UnpairedFactorError(
                f"{file.label}: {half[missing]} has no {which} beside it. Half a pair changes nothing: the file was "
                "saved or filtered incompletely"
            )
    a, b = file.tensors[half["a"]], file.tensors[half["b"]]
    if (a.ndim > 2 or b.ndim > 2) and any(_EXPERTS.fullmatch(part) for part in path):
        raise UnsupportedFeatureError(
            f"{file.label}: {half['a']} belongs to a mixture of experts. Which axis counts the experts is said by the "
            "model's einsum, not by the file, so it is not read"
        )
    return Pair(path=path, weight=weight, a=a, b=b, key=f"{file.label}: {half['a']}")


def _refuse(label: str, name: str, leaf: str) -> None:
    for pattern, reason in _REFUSED:
        if pattern.fullmatch(leaf):
            raise UnsupportedFeatureError(f"{label}: {name} is {reason}")


def _unclaimed(label: str, names: Sequence[str], dialect: Dialect) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"{label}: {shown} are no LoRA factors of the {dialect} dialect. If they are the base model's own weights, "
        "saved along with the factors, ignore_other=true leaves them aside"
    )


def _left_aside(number: int, what: str) -> Iterable[str]:
    return (f"left aside: {count(number, 'tensor')} {what}",) if number else ()
