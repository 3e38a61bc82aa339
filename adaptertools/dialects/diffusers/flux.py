"""Flux.1 under two names: those of its publisher, which kohya and ComfyUI use, and those of diffusers.

The publisher's model fuses projections that diffusers keeps apart, one row block after the other:

    double_blocks.N.img_attn.qkv   transformer_blocks.N.attn.{to_q, to_k, to_v}
    double_blocks.N.txt_attn.qkv   transformer_blocks.N.attn.{add_q_proj, add_k_proj, add_v_proj}
    single_blocks.N.linear1        single_transformer_blocks.N.{attn.to_q, attn.to_k, attn.to_v, proj_mlp}

Every other layer has one name here and one there; of final_layer.adaLN_modulation.1 the halves change places (shift and
scale against scale and shift). The names are a closed set, so that kohya's flat ones (dots as `_`) turn
back without the model.

Shapes: attention is as wide as the model, the MLP four times that, so that lora_A tells how the rows are split
Source: black-forest-labs/flux `model.py`; huggingface/diffusers 58eb52c, `scripts/convert_flux_to_diffusers.py`
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from adaptertools.dialects.diffusers.projections import joined, split, with_halves_swapped
from adaptertools.dialects.diffusers.text_encoders import unflattened
from adaptertools.encoding import Encoder
from adaptertools.errors import UnsupportedFeatureError
from adaptertools.module import LoraModule, RowSlice, Target

TRANSFORMER = "transformer"
HOMES = ("", TRANSFORMER, "diffusion_model")
"""The components under which the layers of Flux may stand."""

DOUBLE_BLOCKS, SINGLE_BLOCKS = 19, 38

_SWAPPED = "final_layer.adaLN_modulation.1"

_DOUBLE = "transformer_blocks.{n}"
_SINGLE = "single_transformer_blocks.{n}"
_EMBEDDERS = "time_text_embed"

_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("double_blocks.{n}.img_attn.qkv", tuple(f"{_DOUBLE}.attn.{name}" for name in ("to_q", "to_k", "to_v"))),
    ("double_blocks.{n}.img_attn.proj", (f"{_DOUBLE}.attn.to_out.0",)),
    ("double_blocks.{n}.img_mlp.0", (f"{_DOUBLE}.ff.net.0.proj",)),
    ("double_blocks.{n}.img_mlp.2", (f"{_DOUBLE}.ff.net.2",)),
    ("double_blocks.{n}.img_mod.lin", (f"{_DOUBLE}.norm1.linear",)),
    (
        "double_blocks.{n}.txt_attn.qkv",
        tuple(f"{_DOUBLE}.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")),
    ),
    ("double_blocks.{n}.txt_attn.proj", (f"{_DOUBLE}.attn.to_add_out",)),
    ("double_blocks.{n}.txt_mlp.0", (f"{_DOUBLE}.ff_context.net.0.proj",)),
    ("double_blocks.{n}.txt_mlp.2", (f"{_DOUBLE}.ff_context.net.2",)),
    ("double_blocks.{n}.txt_mod.lin", (f"{_DOUBLE}.norm1_context.linear",)),
    (
        "single_blocks.{n}.linear1",
        (*(f"{_SINGLE}.attn.{name}" for name in ("to_q", "to_k", "to_v")), f"{_SINGLE}.proj_mlp"),
    ),
    ("single_blocks.{n}.linear2", (f"{_SINGLE}.proj_out",)),
    ("single_blocks.{n}.modulation.lin", (f"{_SINGLE}.norm.linear",)),
    ("img_in", ("x_embedder",)),
    ("txt_in", ("context_embedder",)),
    ("time_in.in_layer", (f"{_EMBEDDERS}.timestep_embedder.linear_1",)),
    ("time_in.out_layer", (f"{_EMBEDDERS}.timestep_embedder.linear_2",)),
    ("vector_in.in_layer", (f"{_EMBEDDERS}.text_embedder.linear_1",)),
    ("vector_in.out_layer", (f"{_EMBEDDERS}.text_embedder.linear_2",)),
    ("guidance_in.in_layer", (f"{_EMBEDDERS}.guidance_embedder.linear_1",)),
    ("guidance_in.out_layer", (f"{_EMBEDDERS}.guidance_embedder.linear_2",)),
    ("final_layer.linear", ("proj_out",)),
    (_SWAPPED, ("norm_out.linear",)),
)


def _blocks(native: str) -> range:
    count = DOUBLE_BLOCKS if native.startswith("double") else SINGLE_BLOCKS if native.startswith("single") else 1
    return range(count)


DIFFUSERS_NAMES = {
    native.format(n=n): tuple(part.format(n=n) for part in parts) for native, parts in _NAMES for n in _blocks(native)
}
"""What diffusers calls each layer of the published model: several names for a fused projection, in order of rows."""

NATIVE_NAMES = {part: (native, index) for native, parts in DIFFUSERS_NAMES.items() for index, part in enumerate(parts)}
"""The published name of each layer of diffusers, and which part of the fused projection it is."""

_FLAT_NAMES = {native.replace(".", "_"): native for native in DIFFUSERS_NAMES}
_FLAT_HOMES = ("", "unet", TRANSFORMER)
"""The components that kohya's prefix may have been taken for."""
_CERTAIN_FLAT = re.compile(r"(double|single)_blocks_\d+_.+")
_CERTAIN_NATIVE = re.compile(r"double_blocks\.\d+\..+|single_blocks\.\d+\..+")
_CERTAIN_DIFFUSERS = re.compile(r"single_transformer_blocks\.\d+\..+")


def has_native_names(modules: Iterable[LoraModule]) -> bool:
    """Whether these are layers of Flux by their published names, all of them that belong to the transformer."""
    names = [module.target.parameter for module in modules if module.target.component in HOMES]
    return any(map(_CERTAIN_NATIVE.fullmatch, names)) and all(name in DIFFUSERS_NAMES for name in names)


def has_diffusers_names(modules: Iterable[LoraModule], *, certain: bool = True) -> bool:
    """Whether these are layers of Flux by diffusers' names, all of them that belong to the transformer.

    `certain` wants one that no other model has: SD3 and others have some of the names too.
    """
    names = [module.target.parameter for module in modules if module.target.component in HOMES]
    sure = any(map(_CERTAIN_DIFFUSERS.fullmatch, names)) or not certain
    return bool(names) and sure and all(name in NATIVE_NAMES for name in names)


def unflatten(modules: Sequence[LoraModule]) -> list[LoraModule]:
    """Opaque modules of a kohya file for Flux under the names of its layers; the modules as they are if it is another.

    Names belong to Flux only if all of the same model do: HunyuanVideo has some of them too. Those of CLIP, the text
    encoder beside it, turn back as well; those of T5 stay opaque.
    """
    flat = [m.target.parameter for m in modules if m.target.opaque and m.target.component in _FLAT_HOMES]
    if not any(map(_CERTAIN_FLAT.fullmatch, flat)) or not all(name in _FLAT_NAMES for name in flat):
        return list(modules)
    return [replace(module, target=_unflattened(module.target)) for module in modules]


def _unflattened(target: Target) -> Target:
    if target.opaque and target.component in _FLAT_HOMES:
        return replace(target, parameter=_FLAT_NAMES[target.parameter], component=TRANSFORMER, opaque=False)
    return unflattened(target)


def to_diffusers(modules: Iterable[LoraModule]) -> list[LoraModule]:
    """Modules with published names under those of diffusers, fused projections split; other modules as they are.

    The parts share lora_A. Where lora_B is block-sparse, as stacking separate projections makes it, each part gets back
    the factors that it had, and one that had none is left out.

    Memory: the values of lora_B of fused projections are read
    Raises: UnsupportedFeatureError for a slice that is no part, and for rows of another number than Flux has
    """
    found: list[LoraModule] = []
    for module in modules:
        parts = DIFFUSERS_NAMES.get(module.target.parameter) if module.target.component in HOMES else None
        found += _split(module, parts) if parts else [module]
    return found


def to_native(modules: Iterable[LoraModule]) -> list[LoraModule]:
    """Modules with diffusers' names under the published ones, as slices where those are fused; others as they are.

    No number changes but the order of norm_out's rows. Writers join slices: ranks add up, lora_B is block-diagonal.
    """
    return [_as_slice(module) if _is_diffusers(module) else module for module in modules]


def fused(modules: Sequence[LoraModule], encoder: Encoder, *, certain: bool = True) -> list[LoraModule]:
    """Slices of one fused projection as one module; layers of Flux with diffusers' names under the published ones.

    Parts that share lora_A share it there too; of the rest the ranks add up. Where scalings differ, each is folded into
    its part of lora_B relative to the largest.

    Memory: the factors of fused projections
    Raises: UnsupportedFeatureError for DoRA on some of the parts
    """
    named = to_native(modules) if has_diffusers_names(modules, certain=certain) else modules
    found: dict[Target, list[LoraModule]] = {}
    for module in named:
        found.setdefault(replace(module.target, rows=None), []).append(module)
    return [joined(target, parts, encoder) if parts[0].target.rows else parts[0] for target, parts in found.items()]


def comparable(
    one: Sequence[LoraModule], other: Sequence[LoraModule]
) -> tuple[tuple[LoraModule, ...], tuple[LoraModule, ...]]:
    """The modules of two adapters for Flux under the same names; as they are where they have those already.

    Those of diffusers where both then have the same layers, so that parts which are equal meet as equals; else the
    published ones, in which a part that is not there is a part of zeros.

    Memory: the values of lora_B of fused projections are read
    """
    namings = {_naming(one), _naming(other)}
    if len(namings) == 1 or None in namings:
        return tuple(one), tuple(other)
    both = [[_at_home(module) for module in unflatten(modules)] for modules in (one, other)]
    layers = [to_diffusers(modules) for modules in both]
    if len({frozenset(module.target for module in modules) for modules in layers}) > 1:
        layers = [to_native(modules) for modules in both]
    return tuple(layers[0]), tuple(layers[1])


def _naming(modules: Sequence[LoraModule]) -> str | None:
    if has_native_names(modules):
        return "published"
    if has_diffusers_names(modules, certain=False):
        return "diffusers"
    return "flat" if has_native_names(unflatten(modules)) else None


def _is_layer(name: str) -> bool:
    return name in DIFFUSERS_NAMES or name in NATIVE_NAMES


def _at_home(module: LoraModule) -> LoraModule:
    """A layer of the transformer as one of the component that diffusers calls so."""
    is_flux = module.target.component in HOMES and _is_layer(module.target.parameter)
    return replace(module, target=replace(module.target, component=TRANSFORMER)) if is_flux else module


def _is_diffusers(module: LoraModule) -> bool:
    return module.target.component in HOMES and module.target.parameter in NATIVE_NAMES and not module.target.rows


def _as_slice(module: LoraModule) -> LoraModule:
    native, index = NATIVE_NAMES[module.target.parameter]
    target = replace(module.target, parameter=native)
    if native == _SWAPPED:
        return with_halves_swapped(module, target)
    if len(DIFFUSERS_NAMES[native]) > 1:
        rows = _rows(native, module.in_features)[index]
        if rows.stop - rows.start != module.out_features:
            raise UnsupportedFeatureError(
                f"{module.target} has {module.out_features} rows, but {rows.stop - rows.start} in Flux.1 at a width of "
                f"{module.in_features}: it cannot be made a part of {native}"
            )
        target = replace(target, rows=rows)
    return replace(module, target=target)


def _rows(native: str, width: int) -> list[RowSlice]:
    """The rows of a fused projection that each of its parts has."""
    sizes = [width, width, width, 4 * width][: len(DIFFUSERS_NAMES[native])]
    stops = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [RowSlice(start=stop - size, stop=stop, total=stops[-1]) for size, stop in zip(sizes, stops, strict=True)]


def _split(module: LoraModule, names: Sequence[str]) -> list[LoraModule]:
    target = replace(module.target, component=TRANSFORMER, rows=None)
    if module.target.parameter == _SWAPPED:
        return [with_halves_swapped(module, replace(target, parameter=names[0]))]
    if len(names) == 1:
        return [replace(module, target=replace(target, parameter=names[0]))]
    rows = _rows(module.target.parameter, module.in_features)
    if module.target.rows in rows:
        return [replace(module, target=replace(target, parameter=names[rows.index(module.target.rows)]))]
    if module.target.rows or module.out_features != rows[-1].total:
        found = module.target.rows or f"{module.out_features} rows"
        raise UnsupportedFeatureError(
            f"{module.target}: {found} at a width of {module.in_features}, where Flux.1 has {rows[-1].total} in parts "
            f"for {', '.join(names)}; it cannot be split"
        )
    return split(module, {replace(target, parameter=name): span for name, span in zip(names, rows, strict=True)})
