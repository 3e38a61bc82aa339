"""kohya (sd-scripts, musubi-tuner, ComfyUI, A1111): one safetensors file with LoRA for one or several models.

    <flat name>.lora_down.weight    (r, in);   convolution (r, in, k, k)
    <flat name>.lora_up.weight      (out, r);  convolution (out, r, 1, 1)
    <flat name>.lora_mid.weight     Tucker ("cp") of LoCon: (r, r, k, k), with lora_down (r, in, 1, 1)
    <flat name>.alpha               one number
    <flat name>.dora_scale          DoRA: (out, 1[, 1, 1]) norms of rows, or (1, in[, 1, 1]) norms of columns

    ΔW = alpha / r · Σ_r up · down, with r = lora_down.shape[0]; a module without alpha has the scaling 1.
    alpha 0 is refused: sd-scripts reads it as r, ComfyUI as 0.

A flat name is a prefix and the module's path with `_` for `.`:

    lora_unet_                    the UNet; also transformers (Flux, SD3, Wan, Qwen-Image …)
    lora_te_                      the text encoder of Stable Diffusion 1 and 2
    lora_te1_ lora_te2_ lora_te3_ the text encoders of SDXL, SD3 and Flux
    lora_transformer_             the transformer, as OneTrainer calls it

Modules of no named model are written behind lora_te_ where their names are those of CLIP, else behind lora_unet_. A
note says so where that is a guess, and `prefix` of the writer chooses another: kohya has none for language models.

Flux has the names of its publisher here; those of diffusers are written so, q, k and v fused (diffusers/flux.py).
Names are turned back only by those of a base model (`base`: a model, or a pipeline with one folder for each), or by the
record in a header that we wrote. Else they stay as they are: `opaque`. SDXL's UNet has the names of the original (sgm)
model here. Writing diffusers turns back its names and Flux's without a base, since they are closed sets:
diffusers/sgm.py, diffusers/flux.py. Tucker's core is folded into lora_down when it is read.

Written is `.alpha` for every module, 0-dimensional, exactly alpha / r · r; where float32 holds no such number, the
scaling is folded into lora_up and alpha is r. diffusers 0.42 scales modules without alpha, and those of attention
whatever theirs is, by the commonest alpha of the file: `common_alpha` of the writer states one
for all.

Source: kohya-ss/sd-scripts 48d368f: networks/lora.py, networks/resize_lora.py, library/train_util.py; ComfyUI
comfy/lora.py, comfy/weight_adapter; KohakuBlueleaf/LyCORIS 4.1.3: modules/locon.py
"""

from dataclasses import replace
from typing import Literal

import torch

from adaptertools.adapter import Adapter, Feature
from adaptertools.containers.artifact import Artifact
from adaptertools.containers.pipeline import Model
from adaptertools.containers.source import Source
from adaptertools.dialects.diffusers import flux
from adaptertools.dialects.kohya import header, keys
from adaptertools.dialects.kohya import read as kohya_read
from adaptertools.dialects.kohya.factors import encode, lora_pair
from adaptertools.dialects.kohya.names import flat_names, prefix_notes
from adaptertools.encoding import Encoder
from adaptertools.errors import OptionError, UnsupportedFeatureError
from adaptertools.module import check_alpha
from adaptertools.tensors import DTYPES, NamedTensors

SUMMARY = "kohya's sd-scripts, ComfyUI and A1111: one safetensors file of flat names"
CONTAINERS = ("safetensors",)
FOLDER = False
CONFIG = kohya_read.CONFIG
FILES = ()
CARRIES = frozenset({Feature.CONV, Feature.DORA, Feature.FUSED_ROWS})


def detect(source: Source) -> bool:
    """Whether it is one file, or a folder with one, of flat names with lora_down or lora_up, and no LyCORIS's part."""
    return len(keys.adapter_files(source, lambda names: keys.is_lora(names) and not keys.is_lycoris(names))) == 1


def read(source: Source, *, base: Model | None = None) -> Adapter:
    """Read a kohya file. `base` turns flat names back into those of the model, or of a pipeline's models.

    Memory: headers and alphas only; with Tucker's cores the factors that they are folded into
    Raises: ConfigError for alpha 0; UnclaimedTensorError, UnpairedFactorError, ShapeError; MatchError where several
            names of the base model are flattened to one
    """
    return kohya_read.read_adapter(
        source,
        keys.adapter_file(source, keys.is_lora, "kohya's lora_down and lora_up"),
        format="kohya",
        base=base,
        claimed=keys.LORA,
        factorise=lora_pair,
    )


def write(
    adapter: Adapter,
    encoder: Encoder,
    *,
    container: str,
    prefix: str | None = None,
    common_alpha: float | None = None,
    model: Literal["flux"] | None = None,
) -> Artifact:
    """Write a kohya file. `prefix` is for all modules but those of text encoders; for those of no named model it may
    name one: lora_te_. `common_alpha` is stated for every module; the rest of the scaling is folded into lora_up.
    Slices of a fused projection become one pair, whose rank is the sum of theirs. `model="flux"` says so of an adapter
    on double blocks alone, whose names in diffusers could be those of SD3.

    Raises: UnsupportedFeatureError if two names are flattened to one, for a model that kohya has no prefix for, and for
            magnitudes that dora_scale has no shape for
    """
    if not adapter.modules:
        raise UnsupportedFeatureError("the adapter holds whole weights alone, and a kohya file has factors")
    if model not in (None, "flux"):
        raise OptionError(f'model is {model!r}, expected "flux" or nothing')
    certain = model is None
    alpha = None if common_alpha is None else float(torch.tensor(check_alpha(common_alpha), dtype=torch.float32))
    carried = adapter.metadata.get("kohya", {})
    if Feature.FUSED_ROWS in adapter.features or flux.has_diffusers_names(adapter.modules, certain=certain):
        adapter = replace(adapter, modules=tuple(flux.fused(adapter.modules, encoder, certain=certain)))
    said = carried.get("header", {})
    named = flat_names(adapter, carried.get("prefixes", {}), prefix, said.get("ss_base_model_version", ""))
    dtypes = carried.get("alpha_dtypes", {})
    tensors: NamedTensors = {
        key: tensor
        for name, module in named.items()
        for key, tensor in encode(name, module, encoder, _dtype(dtypes.get(str(module.target))), alpha).items()
    }
    tensors = header.in_library_order(tensors)
    strings = header.renewed(adapter, named, tensors, said)
    return Artifact(
        tensors=tensors,
        stem="lora",
        metadata=strings,
        hashes=lambda: header.hashes(tensors, strings),
        sidecar=CONFIG,
        notes=(*prefix_notes(named, prefix), *_notes(adapter)),
    )


def _dtype(name: str | None) -> torch.dtype | None:
    return DTYPES.get(name) if name else None


def _notes(adapter: Adapter) -> tuple[str, ...]:
    if Feature.DORA not in adapter.features:
        return ()
    return ("diffusers leaves dora_scale out and applies the factors alone; ComfyUI and LyCORIS apply it",)
