"""The modules of one component -> the tensors and the metadata of a diffusers file."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from adaptertools.dialects.diffusers.metadata import component_fields, layer_alphas
from adaptertools.dialects.peft.factors import Layer, layers
from adaptertools.dialects.peft.keys import MAGNITUDE
from adaptertools.encoding import Encoder
from adaptertools.errors import UnsupportedFeatureError, count, few
from adaptertools.module import LoraModule, ScaleRule
from adaptertools.names import join, leaf
from adaptertools.tensors import Deferred, combine

Scale = Literal["fold", "metadata"]

_KNOWN_IN_TEXT_ENCODERS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The layers by whose keys diffusers recognises the spelling of a text encoder's; a file without any it refuses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What one component becomes: tensors by key, the fields of its LoraConfig, and what to say."""

    tensors: dict[str, Deferred]
    fields: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def component_tensors(
    component: str, modules: Sequence[LoraModule], encoder: Encoder, scale: Scale, conv: str | None
) -> Written:
    """The tensors of one component.

    With `scale="fold"` each scaling goes into lora_B and all layers get the highest rank; with "metadata" factors stay
    as they are and the fields say rank and alpha.

    Raises: UnsupportedFeatureError for DoRA on a part of the layers, and for what no layer of PEFT is
    """
    _check_uniform(component, modules)
    fused = list(dict.fromkeys(module.target.parameter for module in modules if module.target.rows))
    notes: tuple[str, ...] = ()
    if fused:
        projections = count(len(fused), "fused projection")
        notes = (f"the slices of {projections} became one pair of factors each: {few(fused)}",)
    if scale == "metadata":
        rule = _rule(modules)
        made = layers(modules, encoder, rule, conv)
        fields = component_fields(component, made, layer_alphas(made, rule, encoder), rule)
        tensors = _tensors(component, made, {layer.parameter: layer.lora_B(1.0) for layer in made})
        return Written(tensors=tensors, fields=fields, notes=notes)
    bare = [replace(module, lora_bias=None) for module in modules]
    made = layers(bare, encoder, ScaleRule.ALPHA_OVER_RANK, conv)
    ranks = {layer.rank for layer in made}
    if len(ranks) > 1:
        made = [_widened(layer, max(ranks)) for layer in made]
        notes += (f"ranks {min(ranks)} to {max(ranks)} of {component or 'the model'} are all written as {max(ranks)}",)
    for layer in made:
        biased = [m for m in modules if m.target.parameter == layer.parameter and m.lora_bias is not None]
        if biased:
            layer.extra["lora_bias"] = _folded_bias(biased, encoder)
    tensors = _tensors(component, made, {layer.parameter: layer.lora_B(layer.scaling) for layer in made})
    return Written(tensors=tensors, notes=notes)


def _rule(modules: Sequence[LoraModule]) -> ScaleRule:
    """use_rslora holds for all layers of a component or none."""
    root = all(module.scale_rule is ScaleRule.ALPHA_OVER_SQRT_RANK for module in modules)
    return ScaleRule.ALPHA_OVER_SQRT_RANK if root else ScaleRule.ALPHA_OVER_RANK


def _check_uniform(component: str, modules: Sequence[LoraModule]) -> None:
    """diffusers has one switch for DoRA and one for lora_bias in each component.

    Raises: UnsupportedFeatureError that names the modules which stand in the way
    """
    plain = [str(module.target) for module in modules if module.magnitude is None]
    biased = [str(module.target) for module in modules if module.lora_bias is not None]
    if plain and len(plain) < len(modules):
        raise UnsupportedFeatureError(
            f"{few(plain)} without DoRA beside modules with it: diffusers switches it on for all of "
            f"{component or 'a model'} or none. Give it up with --drop dora"
        )
    if biased and not plain:
        raise UnsupportedFeatureError(
            f"{few(biased)}: PEFT, by which diffusers loads, has no DoRA with lora_bias. Give one up: --drop dora or "
            "--drop lora-bias"
        )


def _tensors(component: str, made: Sequence[Layer], factors: dict[str, Deferred]) -> dict[str, Deferred]:
    with_bias = any("lora_bias" in layer.extra for layer in made)
    down, up = _spelling(component, made)
    tensors: dict[str, Deferred] = {}
    for layer in made:
        home, lora_B = join(component, layer.parameter), factors[layer.parameter]
        tensors |= {f"{home}.{down}.weight": layer.lora_A, f"{home}.{up}.weight": lora_B}
        if with_bias:
            tensors[f"{home}.{up}.bias"] = layer.extra.get("lora_bias") or _zeros(lora_B.shape[0], lora_B.dtype)
        if "magnitude" in layer.extra:
            tensors[f"{home}.{MAGNITUDE}"] = layer.extra["magnitude"]
    return tensors


def _spelling(component: str, made: Sequence[Layer]) -> tuple[str, str]:
    """lora_A and lora_B; for a text encoder without adapted attention the older names, by which diffusers knows it."""
    known = any(leaf(layer.parameter) in _KNOWN_IN_TEXT_ENCODERS for layer in made)
    if component.startswith("text_encoder") and not known:
        return "lora_linear_layer.down", "lora_linear_layer.up"
    return "lora_A", "lora_B"


def _widened(layer: Layer, rank: int) -> Layer:
    """The layer at a higher rank, filled up with zeros; convolutions included."""
    if layer.rank == rank:
        return layer

    def widen(factor: float) -> Deferred:
        return _padded(layer.lora_B(factor), 1, rank)

    return replace(layer, rank=rank, alpha=None, lora_A=_padded(layer.lora_A, 0, rank), lora_B=widen)


def _padded(part: Deferred, axis: int, size: int) -> Deferred:
    shape = (*part.shape[:axis], size, *part.shape[axis + 1 :])
    missing = (*part.shape[:axis], size - part.shape[axis], *part.shape[axis + 1 :])
    return combine([part], shape, lambda ts: torch.cat([ts[0], ts[0].new_zeros(missing)], dim=axis))


def _folded_bias(modules: Sequence[LoraModule], encoder: Encoder) -> Deferred:
    """lora_bias times the scaling; those of slices in their rows, zero elsewhere."""
    kept = [
        encoder.fold(f"{module.target}.lora_bias", module.lora_bias, module.scaling)
        for module in modules
        if module.lora_bias is not None
    ]
    spans = [module.target.rows for module in modules if module.target.rows]
    if not spans:
        return kept[0]
    total = spans[0].total

    def place(pieces: list[Tensor]) -> Tensor:
        whole = pieces[0].new_zeros(total)
        for piece, span in zip(pieces, spans, strict=True):
            whole[span.start : span.stop] = piece
        return whole

    return combine(kept, (total,), place)


def _zeros(size: int, dtype: torch.dtype) -> Deferred:
    return Deferred(shape=(size,), dtype=dtype, compute=lambda: torch.zeros(size, dtype=dtype))
