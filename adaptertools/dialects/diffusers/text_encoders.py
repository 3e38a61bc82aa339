"""The layers of CLIP's text model: a closed set of names, so that kohya's flat ones turn back without the model.

Source: huggingface/transformers 5, `models/clip/modeling_clip.py`
"""

import re
from dataclasses import replace

from adaptertools.module import Target

_HOMES = ("text_encoder", "text_encoder_2")
_FLAT = re.compile(
    r"text_model_encoder_layers_(?P<layer>\d+)_(?P<home>self_attn|mlp)_(?P<name>[qkv]_proj|out_proj|fc[12])"
)


def unflattened(target: Target) -> Target:
    """The target under the name of CLIP's layer; as it is where it is none."""
    found = _FLAT.fullmatch(target.parameter) if target.opaque and target.component in _HOMES else None
    if found is None:
        return target
    name = "text_model.encoder.layers.{layer}.{home}.{name}".format(**found.groupdict())
    return replace(target, parameter=name, opaque=False)
