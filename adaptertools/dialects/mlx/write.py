"""The tensors of an MLX adapter: padded to one rank, scaled alike, and turned as mlx-lm multiplies them."""

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.nn.functional import pad

from adaptertools.dialects.mlx.layout import Layer
from adaptertools.encoding import Encoder
from adaptertools.errors import UnsupportedFeatureError
from adaptertools.module import Kind, LoraModule
from adaptertools.tensors import Deferred, combine


def is_dora(modules: Sequence[LoraModule]) -> bool:
    """Whether the file is one of DoRA: all modules of an MLX adapter are, or none.

    Raises: UnsupportedFeatureError where some are; where a magnitude is along the axis that mlx-lm does not have
    """
    without = [module for module in modules if module.magnitude is None]
    if len(without) == len(modules):
        return False
    if without:
        raise UnsupportedFeatureError(
            f"{without[0].target} has no DoRA magnitude, other modules have. An MLX adapter is DoRA as a whole, and a "
            "module without DoRA could be one of it only with the norms of the changed base weights for a magnitude. "
            "Write the two kinds apart (--only, --exclude), or give the magnitudes up (--drop dora)"
        )
    for module in modules:
        axis, each = ("in", "token") if module.kind is Kind.EMBEDDING else ("out", "output feature")
        if module.magnitude_axis != axis:
            raise UnsupportedFeatureError(
                f"{module.target}: mlx-lm has a DoRA magnitude for each {each}, this module one along the other axis, "
                "which is for other norms. Give it up with --drop dora, or merge the adapter"
            )
    return True


def tensors(layer: Layer, encoder: Encoder, rank: int, scaling: float | None) -> dict[str, Deferred]:
    """What is stored of one layer; without a `scaling` that is common to the file, each is folded into lora_b.

    Shapes: lora_a (in, r), lora_b (r, out), m (out,); of experts (E, r, in), (E, out, r)
    """
    a, b = f"{layer.path}.lora_a", f"{layer.path}.lora_b"
    if layer.apart:
        return {a: _stacked(layer, encoder, a, rank, None), b: _stacked(layer, encoder, b, rank, scaling)}
    (module,) = layer.members
    assert module is not None
    lora_A = encoder.keep(a, module.lora_A)
    lora_B = encoder.fold(b, module.lora_B, _factor(module, scaling))
    if module.experts is not None:
        return {a: _padded(lora_A, rank, axis=1), b: _padded(lora_B, rank, axis=2)}
    stored = {a: _turned(_padded(lora_A, rank, axis=0)), b: _turned(_padded(lora_B, rank, axis=1))}
    if module.magnitude is not None:
        stored[f"{layer.path}.m"] = encoder.keep(f"{layer.path}.m", module.magnitude)
    return stored


def _factor(module: LoraModule, scaling: float | None) -> float:
    return module.scaling if scaling is None else 1.0


def _padded(part: Deferred, rank: int, axis: int) -> Deferred:
    """The factor with zeros up to the rank of the file, which change no product."""
    more = rank - part.shape[axis]
    if not more:
        return part
    shape = tuple(rank if number == axis else size for number, size in enumerate(part.shape))
    margins = (0, 0) * (len(shape) - 1 - axis) + (0, more)
    return combine([part], shape, lambda parts: pad(parts[0], margins))


def _turned(part: Deferred) -> Deferred:
    return combine([part], part.shape[::-1], lambda parts: parts[0].mT)


def _stacked(layer: Layer, encoder: Encoder, name: str, rank: int, scaling: float | None) -> Deferred:
    """One factor of all experts, zeros where one has none."""
    is_a = name.endswith("lora_a")
    parts = list(_of_experts(layer, encoder, name, is_a, scaling))
    kept = [_padded(part, rank, axis=0 if is_a else 1) for _, part in parts]

    def stack(tensors: list[Tensor]) -> Tensor:
        whole = tensors[0].new_zeros(len(layer.members), *tensors[0].shape)
        for (expert, _), tensor in zip(parts, tensors, strict=True):
            whole[expert] = tensor
        return whole

    return combine(kept, (len(layer.members), *kept[0].shape), stack)


def _of_experts(
    layer: Layer, encoder: Encoder, name: str, is_a: bool, scaling: float | None
) -> Iterator[tuple[int, Deferred]]:
    for expert, module in enumerate(layer.members):
        if module is not None:
            label = f"{name}[{expert}]"
            factor = _factor(module, scaling)
            yield (
                expert,
                encoder.keep(label, module.lora_A) if is_a else encoder.fold(label, module.lora_B, factor),
            )
