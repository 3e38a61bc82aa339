"""The singular values of every module's B·A, and the modules made again at a lower rank.

On a CPU every module is a task of its own, one thread a core; on a GPU modules of the same shapes are one batch.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from adaptertools.adapter import LoraModule
from adaptertools.errors import NonFiniteError
from adaptertools.linalg import ProductSVD, inner_product, svd_of_product, svds_of_products
from adaptertools.tensors import check_finite, dtype_name, in_parallel

Result = TypeVar("Result")

_BATCH_BYTES = 4 << 30
"""Float64 bytes of factors in one batch on a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rebuilt:
    """New factors of a module. `rounding` is the norm of what storing them in their dtype changed in B·A."""

    lora_A: Tensor
    lora_B: Tensor
    rounding: float


def decompose(
    modules: Sequence[LoraModule], device: torch.device, on_progress: Callable[[int, int], None] | None = None
) -> list[ProductSVD]:
    """The singular value decomposition of B·A of every module, without its scaling; of every expert of a stack.

    Singular values are on the CPU, the small matrices beside them on `device`.

    Memory: two r by r matrices a module, and a batch of factors in float64
    Raises: NonFiniteError that names the tensor
    """
    found: list[ProductSVD | None] = [None] * len(modules)
    done = 0
    for batch, decomposition in _decomposed(modules, device):
        values = decomposition.singular_values.cpu()
        sound = torch.isfinite(values).flatten(1).all(dim=1).tolist()
        parts = zip(values.unbind(), decomposition.left.unbind(), decomposition.right.unbind(), strict=True)
        for index, fine, (singular_values, left, right) in zip(batch, sound, parts, strict=True):
            if not fine:
                _explain(modules[index])
            found[index] = ProductSVD(singular_values=singular_values, left=left, right=right)
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(modules))
    return [decomposition for decomposition in found if decomposition is not None]


def _decomposed(modules: Sequence[LoraModule], device: torch.device) -> Iterator[tuple[Sequence[int], ProductSVD]]:
    """The decompositions of batches of modules, by index. On a GPU those of all batches come together."""
    if device.type == "cpu":
        one = in_parallel(lambda module: svd_of_product(*_stacked([module], device)), modules)
        yield from (((index,), decomposition) for index, decomposition in enumerate(one))
        return
    keys = [(*module.lora_A.shape, *module.lora_B.shape, module.lora_A.dtype) for module in modules]
    batches = _batches(keys, modules)
    stacked = (_stacked([modules[i] for i in batch], device) for batch in batches)
    yield from zip(batches, svds_of_products(stacked), strict=True)


def rebuild(
    modules: Sequence[LoraModule],
    decompositions: Sequence[ProductSVD],
    ranks: Sequence[int],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> list[Rebuilt]:
    """The nearest factors of these ranks, rounded once: to `dtype`, else to that which each factor has.

    `ranks` count rows of lora_A. The results are where the module's factors are. Smaller ranks than asked for do not
    come out: directions beyond the weight's own rank are zero.

    Shapes: lora_A (…, r, in), lora_B (…, out, r) -> (…, rank, in), (…, out, rank)
    Memory: the results, and a batch of factors in float64
    Raises: NonFiniteError if a value is too large for the dtype
    """
    found: list[Rebuilt | None] = [None] * len(modules)

    def make(batch: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        first = modules[batch[0]]
        joined = ProductSVD(
            singular_values=torch.stack([decompositions[i].singular_values for i in batch]),
            left=torch.stack([decompositions[i].left for i in batch]),
            right=torch.stack([decompositions[i].right for i in batch]),
        )
        rank = ranks[batch[0]]
        wide_A, wide_B = joined.factors(*_stacked([modules[i] for i in batch], device), rank)
        missing = rank - wide_A.shape[-2]
        wide_A = torch.nn.functional.pad(wide_A, (0, 0, 0, missing))
        wide_B = torch.nn.functional.pad(wide_B, (0, missing))
        lora_A, lora_B = wide_A.to(dtype or first.lora_A.dtype), wide_B.to(dtype or first.lora_B.dtype)
        rounding = _rounding(wide_A, wide_B, lora_A, lora_B).reshape(len(batch), -1).norm(dim=1)
        return lora_A, lora_B, rounding

    keys = [
        (*m.lora_A.shape, *m.lora_B.shape, m.lora_A.dtype, m.lora_B.dtype, rank)
        for m, rank in zip(modules, ranks, strict=True)
    ]
    for batch, (lora_A, lora_B, rounding) in _batched(make, keys, modules, device):
        for place, (index, error) in enumerate(zip(batch, rounding.tolist(), strict=True)):
            module = modules[index]
            if not math.isfinite(error):
                kind = dtype_name(lora_A.dtype)
                raise NonFiniteError(f"{module.target}: a value of its new factors is too large for {kind}")
            found[index] = Rebuilt(
                lora_A=lora_A[place].to(module.lora_A.device),
                lora_B=lora_B[place].to(module.lora_B.device),
                rounding=error,
            )
    return [rebuilt for rebuilt in found if rebuilt is not None]


def cast_error(module: LoraModule, dtype: torch.dtype) -> float:
    """The norm of what casting both factors changes in B·A.

    Memory: four copies of the factors in float64
    Raises: NonFiniteError if a value is too large for the dtype
    """
    wide = module.lora_A.to(torch.float64), module.lora_B.to(torch.float64)
    error = float(_rounding(*wide, module.lora_A.to(dtype), module.lora_B.to(dtype)).norm())
    if not math.isfinite(error):
        raise NonFiniteError(f"{module.target}: a value of its factors is too large for {dtype_name(dtype)}")
    return error


def _rounding(wide_A: Tensor, wide_B: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """‖B'·A' − B·A‖ for rounded factors A', B': with their errors dA and dB it is ‖[dB B]·[A'; dA]‖.

    Shapes: wide_A, lora_A (…, k, in), wide_B, lora_B (…, out, k) -> (…)
    """
    near_A, near_B = lora_A.to(torch.float64), lora_B.to(torch.float64)
    stacked_A = torch.cat([near_A, near_A - wide_A], dim=-2)
    stacked_B = torch.cat([near_B - wide_B, wide_B], dim=-1)
    return inner_product(stacked_A, stacked_B, stacked_A, stacked_B).clamp(min=0.0).sqrt()


def _batched(
    work: Callable[[Sequence[int]], Result],
    keys: Sequence[Hashable],
    modules: Sequence[LoraModule],
    device: torch.device,
) -> Iterator[tuple[Sequence[int], Result]]:
    """`work` of batches of indices whose keys are equal: one module each on a CPU, as many as fit on a GPU."""
    if device.type == "cpu":
        yield from in_parallel(lambda index: ((index,), work((index,))), range(len(modules)))
    else:
        yield from ((batch, work(batch)) for batch in _batches(keys, modules))


def _batches(keys: Sequence[Hashable], modules: Sequence[LoraModule]) -> list[Sequence[int]]:
    """Indices of modules, those together whose keys are equal, as many as a batch may hold."""
    alike: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        alike.setdefault(key, []).append(index)
    batches: list[Sequence[int]] = []
    for group in alike.values():
        one = modules[group[0]]
        count = max(1, _BATCH_BYTES // (8 * (one.lora_A.numel() + one.lora_B.numel())))
        batches += [group[start : start + count] for start in range(0, len(group), count)]
    return batches


def _stacked(modules: Sequence[LoraModule], device: torch.device) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of modules of the same shapes, each with a leading dimension for the module."""
    return (
        torch.stack([module.lora_A.to(device) for module in modules]),
        torch.stack([module.lora_B.to(device) for module in modules]),
    )


def _explain(module: LoraModule) -> None:
    """Raises: NonFiniteError for the factor that is at fault."""
    for name in ("lora_A", "lora_B"):
        check_finite(f"{module.target}.{name}", module.tensors[name])
    raise NonFiniteError(f"{module.target}: its delta weight is beyond the range of float64")
