"""The fused projection of LitGPT, cut into what Hugging Face's model has in its place."""

from itertools import accumulate, combinations

from torch import Tensor

from adaptertools.dialects.litgpt.names import Attention, Family
from adaptertools.dialects.litgpt.settings import SLOTS, Model
from adaptertools.errors import ConfigError, EmptyFactorError, ShapeError
from adaptertools.module import LoraModule, RowSlice, Target

Slots = tuple[bool, bool, bool]


def adapted_slots(name: str, lora_A: Tensor, lora_B: Tensor, model: Model, stated: Slots | None) -> Slots:
    """Which of q, k and v are adapted, as stated or as far as only one choice fits the shapes.

    Shapes: lora_A (n·r, in); lora_B (rows of the n adapted slots, r)
    Raises: EmptyFactorError, ShapeError; ConfigError if several choices fit
    """
    for factor, side in ((lora_A, "lora_A"), (lora_B, "lora_B")):
        if factor.ndim < 2 or factor.numel() == 0:
            raise EmptyFactorError(
                f"{name}.{side} has shape {tuple(factor.shape)}, expected two dimensions and no zero"
            )
    shapes = f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}"
    fitting = [
        slots
        for count in (1, 2, 3)
        for slots in (_mask(chosen) for chosen in combinations(range(3), count))
        if lora_A.shape[0] == count * lora_B.shape[1] and lora_B.shape[0] == sum(_sizes(model, slots))
    ]
    if stated is not None and stated not in fitting:
        raise ShapeError(
            f"{name}: {shapes} are no factors of {_named(stated)} with {model.heads} heads and {model.groups} groups "
            f"of queries of size {model.head_size}"
        )
    if not fitting:
        raise ShapeError(f"{name}: {shapes} fit no choice of q, k and v of sizes {', '.join(map(str, model.slots))}")
    if stated is None and len(fitting) > 1:
        raise ConfigError(
            f"{name}: {shapes} may adapt {' or '.join(map(_named, fitting))}. Put hyperparameters.yaml of the run "
            "beside the file, which says so, or give slots, a T or an F for each of q, k and v, such as TFT (--slots)"
        )
    return stated or fitting[0]


def split(
    layer: str, lora_A: Tensor, lora_B: Tensor, slots: Slots, alpha: float, *, model: Model, family: Family
) -> list[LoraModule]:
    """The modules of Hugging Face's model that the fused projection of one layer is.

    Each adapted slot has its own r rows of lora_A. Where Hugging Face's rows are interleaved, one module of rank n·r
    with a lora_B of blocks changes them all; elsewhere each slot is a module, or rows of one.
    """
    rank, places = lora_B.shape[1], [index for index in range(3) if slots[index]]
    sizes = _sizes(model, slots)
    ends = list(accumulate(sizes))
    pieces = {
        slot: (lora_A[number * rank : (number + 1) * rank], lora_B[end - size : end])
        for number, (slot, size, end) in enumerate(zip(places, sizes, ends, strict=True))
    }
    home = f"{family.layers}.{layer}.{family.qkv}"
    if family.attention is Attention.INTERLEAVED:
        blocks = _interleaved({slot: B for slot, (_, B) in pieces.items()}, model)
        count = len(places)
        return [_module(Target(parameter=home), lora_A, blocks, count * alpha)]
    if family.attention is Attention.SEPARATE:
        return [
            _module(Target(parameter=f"{home}.{SLOTS[slot][0]}_proj"), A, B, alpha) for slot, (A, B) in pieces.items()
        ]
    starts = [0, model.slots[0], model.slots[0] + model.slots[1]]
    return [
        _module(Target(parameter=home, rows=_rows(starts[slot], model.slots[slot], sum(model.slots))), A, B, alpha)
        for slot, (A, B) in pieces.items()
    ]


def _interleaved(lora_B: dict[int, Tensor], model: Model) -> Tensor:
    """lora_B of all slots as one, each in its own columns and its rows where Hugging Face has them.

    Hugging Face's rows are, for each group of queries: q of all its heads, then k, then v.
    """
    first = next(iter(lora_B.values()))
    rank, per_group = first.shape[1], model.heads // model.groups
    whole = first.new_zeros(model.groups, per_group + 2, model.head_size, len(lora_B) * rank)
    heads = {0: slice(0, per_group), 1: slice(per_group, per_group + 1), 2: slice(per_group + 1, per_group + 2)}
    for number, (slot, block) in enumerate(lora_B.items()):
        columns = slice(number * rank, (number + 1) * rank)
        whole[:, heads[slot], :, columns] = block.reshape(model.groups, -1, model.head_size, rank)
    return whole.reshape(-1, len(lora_B) * rank)


def _module(target: Target, lora_A: Tensor, lora_B: Tensor, alpha: float) -> LoraModule:
    return LoraModule(target=target, lora_A=lora_A, lora_B=lora_B, alpha=alpha, transposed=False)


def _rows(start: int, size: int, total: int) -> RowSlice:
    return RowSlice(start=start, stop=start + size, total=total)


def _sizes(model: Model, slots: Slots) -> list[int]:
    return [size for size, adapted in zip(model.slots, slots, strict=True) if adapted]


def _mask(chosen: tuple[int, ...]) -> Slots:
    return 0 in chosen, 1 in chosen, 2 in chosen


def _named(slots: Slots) -> str:
    return " and ".join(name for name, adapted in zip(("q", "k", "v"), slots, strict=True) if adapted) or "nothing"
