"""Shapes: from the factors of a Flax leaf to lora_A (r, in) and lora_B (out, r), layer by layer and part by part.

In every dialect `a` has the contracted axes and then the rank, `b` the rank and then the weight's other axes.

    dense          a (in, r)              b (r, out)
    einsum         a (N, H, r) or (D, r)  b (r, D) or (r, N, H)      rows of Hugging Face run n * H + h
    fused          a (D, r)               b (r, parts, …)            the parts share lora_A
    scanned        one leaf for L layers: axis 0 a (L, in, r), b (L, r, out); axis 1 a (in, L, r), b (r, L, out)

Source: qwix/_src/providers/lora.py at aa623ac, gemma/peft/_lora.py at 7691fd4, each run
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptertools.dialects.flax.names import Naming, Path, Rule, module_name, place_of
from adaptertools.dialects.flax.tree import Pair
from adaptertools.errors import EmptyFactorError, ShapeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """How layers are stacked: along which axis, and which part of a path stands for the stack."""

    axis: int | None
    at: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """One module as it stands in the file: still with the scale and the rank of its leaf.

    `name` is the module's Hugging Face name under the layer prefix asked for, `key` the one under the prefix that
    the file was written with, under which its sidecar knows it. `head_dim` and `stack`, the axis of stacked layers and
    their number, are what the leaf's shape shows.
    """

    name: str
    key: str
    lora_A: Tensor
    lora_B: Tensor
    head_dim: int | None
    stack: tuple[int, int] | None


def unpack(
    pair: Pair, chosen: Naming | None, scan: Scan, *, layer_prefix: str, written_prefix: str
) -> Iterator[Factors]:
    """The modules of one leaf pair. Views where the layout allows it: nothing is copied.

    Raises: ShapeError, also if the scanned axis cannot be told; EmptyFactorError
    """
    for factor in (pair.a, pair.b):
        if factor.ndim < 2 or factor.numel() == 0:
            raise EmptyFactorError(
                f"{pair.key}: a factor of shape {tuple(factor.shape)}, expected two dimensions or more"
            )
    rule, layer = _rule(pair, chosen)
    axis = _scan_axis(pair, rule, layer, chosen, scan)
    stack = (axis, pair.a.shape[axis]) if axis is not None else None
    for index in range(stack[1]) if stack else (layer,):
        a, b = (factor if axis is None else factor.select(axis, index or 0) for factor in (pair.a, pair.b))
        lora_A, parts, head_dim = _matrices(pair.key, rule, a, b)
        for part, lora_B in zip(rule.parts, parts, strict=True):
            if chosen is None:
                path = rule.path if stack is None else insert_layer(rule.path, scan.at, index or 0)
                name = key = ".".join(path)
            else:
                name = module_name(part, rule, chosen, index, layer_prefix)
                key = module_name(part, rule, chosen, index, written_prefix)
            yield Factors(name=name, key=key, lora_A=lora_A, lora_B=lora_B, head_dim=head_dim, stack=stack)


def _rule(pair: Pair, chosen: Naming | None) -> tuple[Rule, int | None]:
    if chosen is not None:
        place = place_of(pair.path, chosen)
        return place.rule, place.layer
    path = pair.path if pair.weight in ("", "kernel", "w") else (*pair.path, pair.weight)
    if not path:
        raise ShapeError(
            f"{pair.key} stands at the root of the tree and so names no module; put it under the module's name"
        )
    return Rule(path=path, parts=(".".join(path),)), None


def _scan_axis(pair: Pair, rule: Rule, layer: int | None, chosen: Naming | None, scan: Scan) -> int | None:
    """The axis along which this leaf stacks layers, None if it is of one layer."""
    if chosen is not None:
        stacked = layer is None and rule not in chosen.outside
    else:
        stacked = stands_for_layers(rule.path, scan.at)
    a, b = pair.a.shape, pair.b.shape
    deep = len(a) >= 3 and len(b) >= 3
    shapes = f"{pair.key}: lora_a {tuple(a)} and lora_b {tuple(b)}"
    if not stacked:
        if deep:
            raise ShapeError(
                f"{shapes} both have three axes or more, as stacks of layers have, but no part of the path stands for "
                "a stack; if one does, name it with scan_at"
            )
        return None
    if scan.axis is None and not deep and chosen is None:
        return None
    fitting = [axis for axis in (0, 1) if deep and _stacks(a, b, axis)]
    if scan.axis is not None and scan.axis in fitting:
        return scan.axis
    if scan.axis is None and len(fitting) == 1:
        return fitting[0]
    if scan.axis is None and fitting:
        raise ShapeError(f"{shapes} may stack layers along axis 0 or axis 1; say which with scan_axis")
    expected = "axis 0 or 1" if scan.axis is None else f"axis {scan.axis}"
    raise ShapeError(f"{shapes} do not stack layers along {expected} with one rank")


def _stacks(a: torch.Size, b: torch.Size, axis: int) -> bool:
    return a[axis] == b[axis] and a[-1] == b[1 - axis]


def _matrices(key: str, rule: Rule, a: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor], int | None]:
    """lora_A, and lora_B of every part; and the size of a head where the leaf shows it."""
    rank, parts = a.shape[-1], len(rule.parts)
    if b.shape[0] != rank:
        raise ShapeError(
            f"{key}: lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)} disagree about the rank: "
            f"{rank} and {b.shape[0]}"
        )
    if parts > 1 and (b.ndim < 3 or b.shape[1] != parts):
        raise ShapeError(
            f"{key}: lora_b has shape {tuple(b.shape)}, expected ({rank}, {parts}, …) for {', '.join(rule.parts)}"
        )
    blocks = [b[:, part] for part in range(parts)] if parts > 1 else [b]
    shown = {"out": blocks[0].shape[-1] if blocks[0].ndim == 3 else None, "in": a.shape[-2] if a.ndim == 3 else None}
    return a.reshape(-1, rank).T, [block.reshape(rank, -1).T for block in blocks], shown.get(rule.heads)


def stands_for_layers(path: Path, at: str) -> bool:
    """Whether a part of the path stands for a stack of layers: it is there, and no index behind it."""
    return at in path and not (*path, "")[path.index(at) + 1].isdecimal()


def insert_layer(path: Path, at: str, layer: int) -> Path:
    """The path with a layer index behind the part that stands for the stack."""
    cut = path.index(at) + 1
    return (*path[:cut], str(layer), *path[cut:])


def remove_layer(path: Path, at: str) -> tuple[Path, int | None]:
    """The path without its layer index, and the index."""
    if at in path:
        cut = path.index(at) + 1
        if cut < len(path) and path[cut].isdecimal():
            return (*path[:cut], *path[cut + 1 :]), int(path[cut])
    return path, None


def join_halves(lora_B: Tensor, head_dim: int) -> Tensor:
    """Rows as MaxText keeps them for Llama 3.1, rotary pairs side by side, put back as halves of each head.

    Source: unpermute_from_match_maxtext_rope in MaxText's max_utils.py
    """
    heads = _heads(lora_B, head_dim)
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).reshape(lora_B.shape)


def interleave_halves(lora_B: Tensor, head_dim: int) -> Tensor:
    """The inverse: the two halves of each head, row by row in turn.

    Source: permute_to_match_maxtext_rope in MaxText's max_utils.py
    """
    heads = _heads(lora_B, head_dim)
    return torch.stack(heads.chunk(2, dim=1), dim=2).reshape(lora_B.shape)


def _heads(lora_B: Tensor, head_dim: int) -> Tensor:
    if head_dim % 2 or lora_B.shape[0] % head_dim:
        raise ShapeError(f"lora_B of {lora_B.shape[0]} rows does not divide into heads of an even head_dim {head_dim}")
    return lora_B.reshape(-1, head_dim, lora_B.shape[1])
