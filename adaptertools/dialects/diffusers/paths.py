"""Flat names of kohya's that turn back without the model, being of a closed set: Flux.1, the U-Net of SDXL, and CLIP.

For every format whose modules are called as in diffusers' models.
"""

from collections.abc import Sequence

from adaptertools.dialects.diffusers import flux, sgm
from adaptertools.module import LoraModule


def with_paths(modules: Sequence[LoraModule]) -> list[LoraModule]:
    """The modules under diffusers' names where theirs are flat ones of such a set, fused projections split.

    All others are as they are, those with module paths as well.

    Memory: the values of lora_B of fused projections are read
    Raises: UnsupportedFeatureError for rows of another number than Flux has
    """
    named = unflattened(modules)
    return flux.to_diffusers(named) if flux.has_native_names(named) and not flux.has_native_names(modules) else named


def unflattened(modules: Sequence[LoraModule]) -> list[LoraModule]:
    """The modules under module paths where theirs are flat ones of such a set; those of Flux are its publisher's."""
    return sgm.unflatten(flux.unflatten(modules))


def comparable(
    one: Sequence[LoraModule], other: Sequence[LoraModule]
) -> tuple[Sequence[LoraModule], Sequence[LoraModule]]:
    """The modules of two adapters for Flux, or the U-Net of SDXL, under the same names; else as they are.

    Memory: the values of lora_B of fused projections are read
    """
    return sgm.comparable(*flux.comparable(one, other))
