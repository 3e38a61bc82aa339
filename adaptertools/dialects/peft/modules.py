"""The tensors of one PEFT module -> LoraModule: linear, embedding, convolution, attention, fused and block layouts."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from adaptertools.dialects.peft.base import BaseModel
from adaptertools.dialects.peft.config import PeftConfig
from adaptertools.dialects.peft.keys import MAGNITUDE, Group
from adaptertools.dialects.peft.leftovers import check_gathered
from adaptertools.errors import ConfigError, ShapeError, UnpairedFactorError, UnsupportedFeatureError
from adaptertools.module import Kind, LoraModule, RowSlice, ScaleRule, Target

OUT_PROJ = ".base_layer.out_proj"
"""Where the second pair of an `nn.MultiheadAttention` stands, behind the path of the first."""

_MOST_INPUTS = 1 << 24
"""More than any layer has; groups are not expanded beyond."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What is known beyond the tensors themselves."""

    config: PeftConfig
    base: BaseModel
    dora: bool

    def note(self, text: str) -> None:
        """Something found odd, to be said once."""
        if text not in self.config.notes:
            self.config.notes.append(text)


def paired(group: Group, label: str) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of a group, also those of an embedding.

    Raises: UnpairedFactorError
    """
    for one, other in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if one in group.tensors and other in group.tensors:
            return group.tensors[one], group.tensors[other]
    found = ", ".join(sorted(group.tensors))
    raise UnpairedFactorError(
        f"{label}: {group.path} has {found} alone; lora_A and lora_B belong together. "
        "The file was cut or filtered: save the adapter again"
    )


def read_module(group: Group, reading: Reading) -> list[LoraModule]:
    """The module that a group of tensors describes; several for the slots of a fused projection.

    Raises: AdapterError and UnsupportedFeatureError, each naming the module
    """
    config, path = reading.config, group.module_path
    for leaf in group.tensors.keys() & {MAGNITUDE, "lora_bias"}:
        check_gathered(f"{path}.{leaf}", group.tensors[leaf])
    lora_A, lora_B = paired(group, config.label)
    alpha = config.alpha_of(path)
    module: LoraModule
    if "lora_embedding_A" in group.tensors:
        if "lora_A" in group.tensors or "lora_B" in group.tensors:
            raise ShapeError(f"{config.label}: {path} is both an embedding and a linear layer")
        module = _module(reading, path, lora_A, lora_B, alpha, kind=Kind.EMBEDDING, transposed=True)
    elif lora_A.ndim == 2 and lora_B.ndim == 3 and lora_A.numel() and lora_B.numel():
        return list(_enable_lora_modules(path, lora_A, lora_B, alpha, reading))
    elif lora_A.ndim >= 3 and lora_A.numel() and lora_B.numel():
        module = _convolution(path, lora_A, lora_B, alpha, reading)
    else:
        lora_A, lora_B, alpha = _expand(path, lora_A, lora_B, alpha, reading)
        module = _module(reading, path, lora_A, lora_B, alpha)
        transposed = reading.base.linear_is_transposed(path, module.out_features, module.in_features)
        module = replace(module, transposed=transposed)
    _check_rank(module, config)
    return [replace(module, magnitude=_magnitude(group, module, reading), lora_bias=group.tensors.get("lora_bias"))]


def read_attention(inner: Group, outer: Group, reading: Reading) -> list[LoraModule]:
    """Both projections of an `nn.MultiheadAttention`.

    PEFT adds the delta weight of out_proj twice, in forward as in merging (huggingface/peft#3774), so the adapter was
    trained with twice the weights. lora_B is doubled, not alpha: both projections have the alpha of the configuration.
    """
    path = inner.module_path
    alpha = reading.config.alpha_of(path)
    for group in (inner, outer):
        extra = group.tensors.keys() - {"lora_A", "lora_B"}
        if extra:
            raise UnsupportedFeatureError(f"{reading.config.label}: {group.path} is an attention with {sorted(extra)}")
    first, second = paired(inner, reading.config.label), paired(outer, reading.config.label)
    in_proj = _module(reading, f"{path}.in_proj_weight", *first, alpha, kind=Kind.PARAMETER, transposed=False)
    lora_A, lora_B = second
    out_proj = _module(reading, f"{path}.out_proj", lora_A, 2 * lora_B, alpha, transposed=False)
    _check_rank(replace(in_proj, target=Target(parameter=path)), reading.config)
    return [in_proj, out_proj]


def _module(
    reading: Reading,
    path: str,
    lora_A: Tensor,
    lora_B: Tensor,
    alpha: float,
    *,
    kind: Kind = Kind.LINEAR,
    transposed: bool | None = None,
    shape: tuple[int, ...] | None = None,
) -> LoraModule:
    return LoraModule(
        target=Target(parameter=path),
        lora_A=lora_A,
        lora_B=lora_B,
        alpha=alpha,
        scale_rule=reading.config.scale_rule,
        kind=kind,
        transposed=transposed,
        shape=shape,
    )


def _check_rank(module: LoraModule, config: PeftConfig) -> None:
    claimed = config.rank_of(module.target.parameter)
    if claimed not in (None, module.rank):
        text = f"{config.label}: claims other ranks than the tensors have, which are used"
        if text not in config.notes:
            config.notes.append(text)


def _convolution(path: str, lora_A: Tensor, lora_B: Tensor, alpha: float, reading: Reading) -> LoraModule:
    rank, n_in, *kernel = lora_A.shape
    if lora_B.ndim != lora_A.ndim or any(size != 1 for size in lora_B.shape[2:]):
        shapes = f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}"
        raise ShapeError(f"{path}: {shapes} are no convolution: expected (r, in, *kernel) and (out, r, 1, …)")
    shape = (lora_B.shape[0], n_in, *kernel)
    found = reading.base.shape(path)
    grouped_base = found is not None and len(found) == len(shape) and found[1] < n_in and n_in % found[1] == 0
    if grouped_base or (lora_B.shape[1] < rank and rank % lora_B.shape[1] == 0):
        raise UnsupportedFeatureError(
            f"{path}: a grouped convolution. PEFT's lora_A mixes the channels of all groups, which the grouped weight "
            "cannot hold, so there is no delta weight"
        )
    flat_A, flat_B = lora_A.reshape(rank, n_in * math.prod(kernel)), lora_B.flatten(1)
    return _module(reading, path, flat_A, flat_B, alpha, kind=Kind.CONV, shape=shape)


def _magnitude(group: Group, module: LoraModule, reading: Reading) -> Tensor | None:
    """DoRA's magnitude, one value for each output; of convolutions stored (1, out, 1, …)."""
    magnitude = group.tensors.get(MAGNITUDE)
    if not reading.dora:
        return None
    if magnitude is None:
        raise ConfigError(
            f"{reading.config.label}: use_dora is true, but {module.target} has no {MAGNITUDE}. The file is not whole; "
            "dora=false reads it as plain LoRA"
        )
    return magnitude.flatten() if module.kind is Kind.CONV else magnitude


def _expand(path: str, lora_A: Tensor, lora_B: Tensor, alpha: float, reading: Reading) -> tuple[Tensor, Tensor, float]:
    """Factors that BD-LoRA or QALoRA stores in part, written out in full; all others as they are."""
    config = reading.config
    blocks = config.raw.get("use_bdlora")
    if blocks:
        if not isinstance(blocks, dict) or type(blocks.get("nblocks", 1)) is not int or blocks.get("nblocks", 1) < 1:
            raise ConfigError(f"{config.label}: use_bdlora is {blocks!r:.80}, expected target modules and nblocks")
        count = blocks.get("nblocks", 1)
        if any(str(part) in path for part in blocks.get("target_modules_bd_a") or ()):
            lora_A = _block_diagonal(lora_A, count, path)
        elif any(str(part) in path for part in blocks.get("target_modules_bd_b") or ()):
            lora_B = _block_diagonal(lora_B, count, path)
        reading.note(f"{config.label}: use_bdlora; its blocks are read as whole factors")
    if config.flag("use_qalora"):
        return _expand_pooled(path, lora_A, lora_B, alpha, reading)
    return lora_A, lora_B, alpha


def _block_diagonal(factor: Tensor, count: int, path: str) -> Tensor:
    if factor.ndim != 2 or factor.shape[0] % count:
        raise ShapeError(f"{path}: a factor of shape {tuple(factor.shape)} is not made of {count} blocks")
    blocks: Tensor = torch.block_diag(*factor.chunk(count))  # type: ignore[no-untyped-call]
    return blocks


def _expand_pooled(
    path: str, lora_A: Tensor, lora_B: Tensor, alpha: float, reading: Reading
) -> tuple[Tensor, Tensor, float]:
    """QALoRA feeds lora_A with the means of groups of inputs, times the number of groups."""
    config = reading.config
    size = config.raw.get("qalora_group_size", 16)
    if type(size) is not int or size < 1:
        raise ConfigError(f"{config.label}: qalora_group_size is {size!r}, expected a whole number from 1 on")
    found, pooled = reading.base.shape(path), lora_A.shape[-1]
    if pooled * size > _MOST_INPUTS:
        raise ConfigError(f"{config.label}: qalora_group_size {size} makes {pooled * size} inputs of {path}")
    if found is not None and pooled in found and pooled * size not in found:
        return lora_A, lora_B, alpha  # PEFT pools the inputs of GPTQ layers alone
    reading.note(f"{config.label}: use_qalora; lora_A is read with one column for each input")
    return lora_A.repeat_interleave(size, dim=-1), lora_B, alpha * pooled / size


def _enable_lora_modules(
    path: str, lora_A: Tensor, lora_B: Tensor, alpha: float, reading: Reading
) -> Iterator[LoraModule]:
    """The slots of a fused projection in files of PEFT up to 0.2: a grouped convolution as lora_B.

    Shapes: lora_A (n·r, in); lora_B (n·out/L, c, 1) in n·r/c groups
    """
    enabled = reading.config.raw.get("enable_lora")
    if not isinstance(enabled, list) or not any(enabled) or not all(isinstance(slot, bool) for slot in enabled):
        raise ConfigError(
            f"{reading.config.label}: {path} has a three-dimensional lora_B, as PEFT below 0.3 wrote for enable_lora, "
            f"but that is {enabled!r:.40}; expected a list such as [true, false, true]"
        )
    columns, count = lora_B.shape[1], sum(enabled)
    groups = lora_A.shape[0] // columns
    if (
        lora_B.shape[2] != 1
        or lora_A.shape[0] % columns
        or lora_A.shape[0] % count
        or lora_B.shape[0] % groups
        or lora_B.shape[0] % count
    ):
        shapes = f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}"
        raise ShapeError(f"{path}: {shapes} do not fit {count} enabled slots")
    slot, chunk = lora_B.shape[0] // count, lora_B.shape[0] // groups
    rule, rank = reading.config.scale_rule, lora_A.shape[0] // count
    if rank != columns:
        rule, alpha = ScaleRule.DIRECT, rule.scaling(alpha, rank)
    places = [index * slot for index, on in enumerate(enabled) if on]
    cuts = sorted({*range(0, lora_B.shape[0], slot), *range(0, lora_B.shape[0], chunk), lora_B.shape[0]})
    for start, stop in pairwise(cuts):
        group, first = start // chunk, places[start // slot] + start % slot
        rows = RowSlice(start=first, stop=first + stop - start, total=slot * len(enabled))
        yield LoraModule(
            target=Target(parameter=path, rows=rows),
            lora_A=lora_A[group * columns : (group + 1) * columns],
            lora_B=lora_B[start:stop, :, 0],
            alpha=alpha,
            scale_rule=rule,
            transposed=reading.base.linear_is_transposed(path, rows.total, lora_A.shape[1]),
        )


def settle_dora(
    config: PeftConfig, groups: Iterable[Group], wanted: bool | None, *, stated: bool | None, fate: str
) -> bool:
    """Whether the magnitudes count. Where file and configuration disagree, only the caller can say.

    `stated` is what the configuration says, None where there is none; `fate` what happens to magnitudes that it denies.

    Raises: ConfigError
    """
    present = any(MAGNITUDE in group.tensors for group in groups)
    said = present if stated is None else stated
    if wanted is None and present and not said:
        raise ConfigError(
            f"{config.label}: use_dora is false, but the file has magnitudes, which {fate}. Read it with dora=true "
            "(--in dora=true) if it was trained with DoRA, with dora=false to do so too"
        )
    use = said if wanted is None else wanted
    if present and not use:
        config.notes.append("left out: the DoRA magnitudes, as asked for")
    return use
