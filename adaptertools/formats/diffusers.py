"""diffusers: the file `pytorch_lora_weights.safetensors` that pipelines save and load, and AI-toolkit's variant of it.

    <component>.<module path>.lora_A.weight (r, in)           .lora_B.weight (out, r)          linear
                             .lora_A.weight (r, in, k, k)     .lora_B.weight (out, r, 1, 1)    convolution
                             .lora_magnitude_vector (out)     (1, out, 1, 1) for convolutions  DoRA
                             .lora_B.bias (out)                                                lora_bias
                             .alpha ()                                                         read, not written

`<component>` is unet, transformer, transformer_2, text_encoder, text_encoder_2, connectors …; `diffusion_model` in
files of AI-toolkit and for ComfyUI, where alpha is always the rank. A file that one model alone saved
(`save_lora_adapter`) has none. Older spellings are read too (`.lora.down`, `.lora_linear_layer.down`,
`.processor.to_q_lora.down`): diffusers/keys.py.

Scaling is that of `lora_adapter_metadata` in the header where that stands, verbatim as PEFT's LoraConfig, patterns and
rsLoRA included; else alpha / r where the file has alphas, else 1. Both together are an error, here as there.
ΔW = s · B A.

A folder may hold the adapter as .safetensors and as .bin; where they are not the same, the file must be named.
Reading takes `component` (the model that keys without one belong to) and `dora` (whether magnitudes count that the
metadata denies).

Writing folds the scaling into lora_B, and fills lower ranks of a component up with zeros: so every version loads it, of
which those before August 2026 scale mixed ranks wrongly. `scale="metadata"` states scalings and ranks in the header
instead, exactly where an alpha does; versions before 0.34 do not look there. `prefix` is the component that the keys of
the model get, text encoders apart: prefix=unet for an adapter that has none, prefix=diffusion_model for AI-toolkit.
`conv="svd"` factors loralib's convolutions anew. Layers of Flux in the names that kohya uses are written in those of
diffusers, their fused projections split; with prefix=diffusion_model the other way round: diffusers/flux.py. Double
blocks alone could be SD3's too; `model="flux"` then says whose they are. kohya's names of SDXL's U-Net become those of
diffusers as well: diffusers/sgm.py.

Read in huggingface/diffusers 58eb52c (0.42): `loaders/`, `utils/state_dict_utils.py`; ostris/ai-toolkit 27a03a9.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from adaptertools.adapter import Adapter, Base, Feature, LoraModule, Origin, merge_notes
from adaptertools.containers import sidecar
from adaptertools.containers.artifact import Artifact
from adaptertools.containers.history import HEADER_KEY, read_history, read_settings
from adaptertools.containers.pipeline import Model, Pipeline
from adaptertools.containers.source import Source
from adaptertools.containers.tensorfile import TensorFile
from adaptertools.dialects.diffusers import files, flux, metadata
from adaptertools.dialects.diffusers.keys import COMPONENT, DIFFUSION_MODEL, Contents, sort_keys
from adaptertools.dialects.diffusers.paths import unflattened
from adaptertools.dialects.diffusers.write import Scale, component_tensors
from adaptertools.dialects.peft.base import BaseModel, Checkpoint
from adaptertools.dialects.peft.config import PeftConfig
from adaptertools.dialects.peft.modules import Reading, read_module, settle_dora
from adaptertools.encoding import Encoder
from adaptertools.errors import OptionError, UnknownFormatError, UnsupportedFeatureError, count, few
from adaptertools.names import join, parent
from adaptertools.tensors import Deferred, natural_order

SUMMARY = "Hugging Face diffusers: pytorch_lora_weights.safetensors, also of AI-toolkit"
CONTAINERS = ("safetensors",)
FOLDER = False
CONFIG = sidecar.SUFFIX
FILES = files.NAMES
CARRIES = frozenset({Feature.DORA, Feature.LORA_BIAS, Feature.CONV, Feature.FUSED_ROWS})

_OWN_ENTRIES = ("format", HEADER_KEY, metadata.KEY)
_STALE_ENTRIES = ("sshs_", "modelspec.hash", "ss_network_dim", "ss_network_alpha")
"""Header entries that speak of the very bytes or factors, and are wrong once those change."""


def detect(source: Source) -> bool:
    names = files.adapter_files(source)
    return len(names) == 1 or tuple(names) == files.NAMES


def read(
    source: Source, *, base: Model | None = None, component: str | None = None, dora: bool | None = None
) -> Adapter:
    """Read a diffusers file, or the one in a folder.

    `component` names the model of keys that name none. `dora` says whether magnitudes count where the metadata
    contradicts the file. `base`, a pipeline or the one model, says which names and shapes it has not.

    Raises: ConfigError, UnpairedFactorError, UnclaimedTensorError, AmbiguousFormatError; and others of the tree
    """
    name, file_notes = files.adapter_file(source)
    file = source.tensors(name)
    said = files.mark(file) or {}
    prefixed = said.get("prefixed") is not False
    contents = sort_keys(file.tensors, file.label, prefixed=prefixed, component=_checked(component))
    if not any(found.groups for found in contents.values()):
        raise UnknownFormatError(f"{file.label}: none of its {count(len(file.tensors), 'tensor')} is a factor of LoRA")
    stated = metadata.stated(file)
    modules: list[LoraModule] = []
    bases: dict[str, Base] = _bases(said)
    notes: list[str] = []
    further: dict[str, Any] = {}
    for home, found in contents.items():
        fields_prefixed = prefixed and home != "" and component is None
        config = metadata.component_config(stated, home, found, file.label, prefixed=fields_prefixed)
        model = BaseModel(_model(base, home, alone=len(contents) == 1))
        read_here = _modules(found, Reading(config=config, base=model, dora=_dora(found, config, dora)), home)
        modules += read_here
        notes += [*config.notes, *model.notes(read_here)]
        further |= {join(home, key): value for key, value in metadata.further_fields(config).items()}
        if config.base != Base():
            bases[home] = config.base
    return Adapter(
        modules=tuple(sorted(modules, key=lambda module: natural_order(str(module.target)))),
        bases=bases,
        history=read_history(file.metadata),
        metadata={
            **read_settings(file.metadata),
            "diffusers": {"header": _kept_entries(file), **({"fields": further} if further else {})},
        },
        notes=merge_notes(file_notes, notes),
        origin=Origin(
            format="diffusers",
            container=file.container,
            label=source.label,
            path=source.path,
            name=source.name,
            options={} if stated is None else {"scale": "metadata"},
        ),
    )


def _model(base: Model | None, component: str, *, alone: bool) -> Checkpoint | None:
    if isinstance(base, Pipeline):
        return base.components.get(component)
    return base if alone else None


def _checked(component: str | None) -> str | None:
    """Raises: OptionError for a name that is none of a model that diffusers loads adapters into"""
    if component is not None and not COMPONENT.fullmatch(component):
        raise OptionError(
            f"{component!r} is no component of a pipeline: expected unet, transformer, transformer_2, text_encoder, "
            f"text_encoder_2, connectors or {DIFFUSION_MODEL}"
        )
    return component


def _modules(contents: Contents, reading: Reading, component: str) -> list[LoraModule]:
    found = [module for group in contents.groups.values() for module in read_module(group, reading)]
    return [replace(module, target=replace(module.target, component=component)) for module in found]


def _bases(said: Mapping[str, Any]) -> dict[str, Base]:
    """The base models that this package noted in the header."""
    noted = said.get("bases")
    entries = noted.items() if isinstance(noted, dict) else ()
    return {str(home): Base(id=_text(base.get("id")), revision=_text(base.get("revision"))) for home, base in entries}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _kept_entries(file: TensorFile) -> dict[str, str]:
    """The header entries of others that stay true when the tensors change."""
    if file.container != "safetensors":
        return {}
    return {
        key: value
        for key, value in file.metadata.items()
        if key not in _OWN_ENTRIES and not key.startswith(_STALE_ENTRIES)
    }


def write(
    adapter: Adapter,
    encoder: Encoder,
    *,
    container: str,
    scale: Scale = "fold",
    prefix: str | None = None,
    model: Literal["flux"] | None = None,
    conv: Literal["svd"] | None = None,
) -> Artifact:
    """Write a file that pipelines of diffusers load, and models of it by `load_lora_adapter`.

    `scale`, `prefix`, `model` and `conv` are told of at the top of this file.

    Raises: UnsupportedFeatureError for opaque names and for what no layer of PEFT is; OptionError
    """
    if scale not in ("fold", "metadata") or conv not in (None, "svd") or model not in (None, "flux"):
        found = f"{scale!r}, {conv!r} and {model!r}"
        raise OptionError(
            f'scale is "fold" or "metadata", conv "svd" or nothing, model "flux" or nothing; found {found}'
        )
    modules = _named(adapter.modules, _checked(prefix), certain=model is None)
    components: dict[str, list[LoraModule]] = {}
    for module in modules:
        components.setdefault(module.target.component, []).append(module)
    _check_components(components, adapter.naming_advice)
    tensors: dict[str, Deferred] = {}
    fields: dict[str, Any] = {}
    notes: list[str] = []
    for home, members in components.items():
        written = component_tensors(home, members, encoder, scale, conv)
        tensors |= written.tensors
        fields |= {join(home, key): value for key, value in written.fields.items()}
        notes += written.notes
    carried = adapter.metadata.get("diffusers", {})
    header = dict(carried.get("header", {}))
    if scale == "metadata":
        fields |= {key: value for key, value in carried.get("fields", {}).items() if parent(key) in components}
        header[metadata.KEY] = json.dumps(fields, indent=2, sort_keys=True)
        notes.append(f"diffusers before 0.34 does not read {metadata.KEY} and would leave the scalings out")
    if said := _mark(adapter.bases, components):
        header[HEADER_KEY] = json.dumps({files.MARK: said}, sort_keys=True)
    return Artifact(
        tensors=tensors,
        stem=files.STEM,
        metadata={**header, "format": "pt"},
        sidecar=CONFIG,
        notes=(*_name_notes(components, prefix), *notes),
    )


def _named(modules: Sequence[LoraModule], prefix: str | None, *, certain: bool) -> list[LoraModule]:
    """The modules under the names and the component that they are written with."""
    named = unflattened(modules)
    if prefix == DIFFUSION_MODEL and flux.has_diffusers_names(named, certain=certain):
        named = flux.to_native(named)
    elif flux.has_native_names(named) and any(_is_to_translate(module, prefix) for module in named):
        named = flux.to_diffusers(named)
    if prefix is None:
        return named
    homes = sorted({m.target.component for m in named if not m.target.component.startswith("text_encoder")})
    if len(homes) > 1:
        raise OptionError(f"prefix={prefix} would put {', '.join(map(repr, homes))} together: write each with --only")
    return [replace(m, target=replace(m.target, component=prefix)) if m.target.component in homes else m for m in named]


def _is_to_translate(module: LoraModule, prefix: str | None) -> bool:
    """Whether a layer of Flux with its published name goes where diffusers' names are wanted."""
    return (prefix or module.target.component) != DIFFUSION_MODEL and module.target.parameter in flux.DIFFUSERS_NAMES


def _check_components(components: Mapping[str, Sequence[LoraModule]], advice: str) -> None:
    if not components:
        raise UnsupportedFeatureError("the adapter has no module, and diffusers loads no file without factors")
    opaque = [module.target.parameter for members in components.values() for module in members if module.target.opaque]
    if opaque:
        raise UnsupportedFeatureError(
            f"{few(opaque)}: names that could not be turned back into module paths, which diffusers needs. {advice}"
        )
    if "" in components and len(components) > 1:
        bare = components[""][0].target.parameter
        others = ", ".join(name for name in components if name)
        raise UnsupportedFeatureError(
            f"{bare} belongs to no component and other modules to {others}: diffusers would leave it out. "
            "Write each with --only 'COMPONENT:*'"
        )


def _mark(bases: Mapping[str, Base], components: Mapping[str, Sequence[LoraModule]]) -> dict[str, Any]:
    """What the keys cannot say: that no component stands in front of them, and the base models."""
    known = {home: {"id": base.id, "revision": base.revision} for home, base in bases.items() if base.id}
    stated = {home: {key: value for key, value in entry.items() if value} for home, entry in known.items()}
    return ({"prefixed": False} if "" in components else {}) | ({"bases": stated} if stated else {})


def _name_notes(components: Mapping[str, Sequence[LoraModule]], prefix: str | None) -> Iterator[str]:
    if "" in components:
        yield (
            "no component is named in front of the keys: a model loads them with load_lora_adapter(…, prefix=None), a "
            "pipeline none of them. To name it: prefix=unet, prefix=transformer … (--out prefix=…)"
        )
    if prefix == DIFFUSION_MODEL and not flux.has_native_names(components[DIFFUSION_MODEL]):
        of_flux = flux.has_diffusers_names(components[DIFFUSION_MODEL], certain=False)
        how = "; if it is for Flux.1, model=flux (--out model=flux) turns them into those" if of_flux else ""
        yield f"the names behind {DIFFUSION_MODEL} are the adapter's own; ComfyUI wants the published model's{how}"


def _dora(contents: Contents, config: PeftConfig, wanted: bool | None) -> bool:
    fate = "diffusers then leaves out with a warning"
    return settle_dora(config, contents.groups.values(), wanted, stated=config.flag("use_dora"), fate=fate)
