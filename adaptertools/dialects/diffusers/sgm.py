"""The U-Net of Stable Diffusion XL under the names of its publisher (sgm), which kohya uses, and those of diffusers.

    input_blocks.I.J, output_blocks.I.J    down_blocks.B, up_blocks.B: one block of resnets and attentions a place
    middle_block.0, .1, .2                 mid_block.resnets.0, .attentions.0, .resnets.1
    input_blocks.I.0.op                    down_blocks.B.downsamplers.0.conv
    output_blocks.I.J.conv                 up_blocks.B.upsamplers.0.conv
    input_blocks.0.0, out.2                conv_in, conv_out
    time_embed.0, .2                       time_embedding.linear_1, .linear_2
    label_emb.0.0, .0.2                    add_embedding.linear_1, .linear_2

B and the place in it follow from I: a block has two layers and a sampler on the way down, three layers on the way up,
in every U-Net of Stable Diffusion. Names within an attention are the same; those of a resnet are in `_RESNET`. All
are a closed set, so that kohya's flat ones (dots as `_`) turn back without the model.

Source: Stability-AI/generative-models `sgm/modules/diffusionmodules/openaimodel.py`; kohya-ss/sd-scripts 48d368f,
`library/sdxl_original_unet.py`; huggingface/diffusers 0.42.1, `loaders/lora_conversion_utils.py`, which the tests ask
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from adaptertools.dialects.diffusers.text_encoders import unflattened
from adaptertools.module import LoraModule, Target

UNET = "unet"
_HOMES = ("", UNET)

_LAYERS = 2
"""`layers_per_block` of all U-Nets of Stable Diffusion."""

_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_ALONE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}

_BLOCK = re.compile(r"(?P<way>input|output)_blocks_(?P<index>\d+)_(?P<part>\d)_(?P<rest>.+)")
_MIDDLE_BLOCK = re.compile(r"middle_block_(?P<part>[012])_(?P<rest>.+)")
_ATTENTION = re.compile(
    r"proj_in|proj_out"
    r"|transformer_blocks_(?P<layer>\d+)_((?P<attn>attn[12])_to_(?P<to>[qkv]|out_0)|ff_net_(?P<ff>0_proj|2))"
)


def unflatten(modules: Sequence[LoraModule]) -> list[LoraModule]:
    """Opaque modules of a kohya file for this U-Net under diffusers' names; the modules as they are if it is another.

    Names belong to it only if all of the same model do. Those of CLIP, the text encoders beside it, turn back as well.
    """
    flat = [m.target.parameter for m in modules if m.target.opaque and m.target.component in _HOMES]
    if not flat or not all(map(diffusers_name, flat)):
        return list(modules)
    return [replace(module, target=_unflattened(module.target)) for module in modules]


def comparable(
    one: Sequence[LoraModule], other: Sequence[LoraModule]
) -> tuple[Sequence[LoraModule], Sequence[LoraModule]]:
    """The modules of two adapters for this U-Net under diffusers' names where one alone has kohya's."""
    turned = [unflatten(modules) for modules in (one, other)]
    changed = [any(a is not b for a, b in zip(x, y, strict=True)) for x, y in zip((one, other), turned, strict=True)]
    return (turned[0], turned[1]) if changed[0] != changed[1] else (one, other)


def diffusers_name(flat: str) -> str | None:
    """What diffusers calls the layer that kohya calls so; None for a name that this U-Net does not have."""
    if flat in _ALONE:
        return _ALONE[flat]
    if middle := _MIDDLE_BLOCK.fullmatch(flat):
        home = _MIDDLE[middle["part"]]
        inside = _inside(home, middle["rest"])
        return inside and f"mid_block.{home}.{inside}"
    block = _BLOCK.fullmatch(flat)
    return _name_in_block(block["way"], int(block["index"]), block["part"], block["rest"]) if block else None


def _name_in_block(way: str, index: int, part: str, rest: str) -> str | None:
    down = way == "input"
    if down and index == 0:
        return None
    number, place = divmod(index - 1 if down else index, _LAYERS + 1)
    home = f"{'down' if down else 'up'}_blocks.{number}"
    sampler = place == _LAYERS  # the last of a block, on the way up behind its layers
    if sampler and (down, rest) in ((True, "op"), (False, "conv")):
        return f"{home}.{'downsamplers' if down else 'upsamplers'}.0.conv"
    if part not in ("0", "1") or (down and sampler):
        return None
    layer = f"{'attentions' if part == '1' else 'resnets'}.{place}"
    inside = _inside(layer, rest)
    return inside and f"{home}.{layer}.{inside}"


def _inside(layer: str, rest: str) -> str | None:
    """The name within a resnet or an attention."""
    if layer.startswith("resnets"):
        return _RESNET.get(rest)
    found = _ATTENTION.fullmatch(rest)
    if found is None or found["layer"] is None:
        return found and rest
    block = f"transformer_blocks.{found['layer']}"
    if found["attn"]:
        return f"{block}.{found['attn']}.to_{found['to'].replace('_', '.')}"
    return f"{block}.ff.net.{found['ff'].replace('_', '.')}"


def _unflattened(target: Target) -> Target:
    name = diffusers_name(target.parameter) if target.opaque and target.component in _HOMES else None
    if name is None:
        return unflattened(target)
    return replace(target, parameter=name, component=UNET, opaque=False)
