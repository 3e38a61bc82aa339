"""Flat names and module paths: the prefixes that name a model, and names turned back by those of a base model.

`_` for `.` cannot be undone without knowing the names: `to_out_0` is `to.out.0`, `to_out.0` or `to_out_0`. So a name is
turned back only where a base model has exactly one that is flattened to it, and whose weight has the right shape; or
where the file itself says from which name it was made.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from adaptertools.adapter import Adapter, Target
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.pipeline import Model, Pipeline
from adaptertools.errors import ConfigError, MatchError, OptionError, UnsupportedFeatureError, count
from adaptertools.module import LoraModule

COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "lora_unet_": ("unet", "transformer", "prior"),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",),
    "lora_transformer_": ("transformer",),
}
"""The models that a prefix may mean, as a diffusers pipeline calls them; the first where nothing tells."""

_BARE = "lycoris_"
"""What LyCORIS puts in front of the names of a model of any kind."""

_DEFAULT = "lora_unet_"

_DENOISER = re.compile(
    r"(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks|transformer_blocks"
    r"|single_transformer_blocks|double_blocks|single_blocks|joint_blocks)\..+"
)
_CLIP = re.compile(r"text_model\.encoder\.layers\..+")
"""Names that tell what model they belong to where the adapter names none."""

_UNNUMBERED = frozenset({"unet", "text_encoder", ""})
"""The models of Stable Diffusion 1 and 2, whose one text encoder has no number."""
_NUMBERED = ("sdxl", "sd3", "flux")
"""How the versions of base models begin that number their text encoders."""

_INSIDE: Mapping[str, tuple[str, ...]] = {
    "unet": ("model.diffusion_model.",),
    "transformer": ("model.diffusion_model.",),
    "text_encoder": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
}
"""What stands in front of a model's names where a checkpoint of one file holds all models of a pipeline."""


def flatten(parameter: str) -> str:
    """The name with `_` for `.`, as sd-scripts and LyCORIS name their modules."""
    return parameter.replace(".", "_")


def prefix_of(name: str) -> str:
    """The known prefix of a flat name, "" if it has none."""
    return next((prefix for prefix in COMPONENTS if name.startswith(prefix)), "")


def prefixes_of(names: Iterable[str], label: str) -> dict[str, str]:
    """The prefix of each component in a file.

    Raises: ConfigError if two prefixes mean the same model
    """
    found: dict[str, str] = {}
    for prefix in dict.fromkeys(map(prefix_of, names)):
        component = COMPONENTS[prefix][0] if prefix else ""
        if component in found:
            raise ConfigError(
                f"{label}: {found[component]} and {prefix} both stand for {component}; is it made of two adapters? "
                "Keep the keys of one"
            )
        found[component] = prefix
    return found


@dataclass(slots=True)
class Names:
    """The names of a base model, or of each model of a pipeline, by what flattening makes of them.

    `recorded` is what the file says of its own names: component and parameter by flat name. It goes before the base.
    """

    base: Model | None
    recorded: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    """Flat names that the base model has no name for."""
    _flat: dict[str, dict[str, dict[str, tuple[int, ...]]]] = field(default_factory=dict)

    def target(self, name: str, shape: tuple[int, ...]) -> tuple[Target, tuple[int, ...] | None]:
        """What a flat name means, for a weight of this shape; and the shape that the base model's weight has.

        Raises: MatchError where several names of the base model fit; OptionError for a base without names
        """
        if name in self.recorded:
            component, parameter = self.recorded[name]
            return Target(parameter=parameter, component=component), None
        if isinstance(self.base, Checkpoint) and not self.base.shapes:
            raise OptionError(
                f"{name}: a flat name is turned back by the names of the base model's weights, and {self.base.label} "
                "has a config.json alone. Give the folder with its weights, whose headers are enough; without --base "
                "the name stays flat"
            )
        prefix = prefix_of(name)
        rest = name.removeprefix(prefix or _BARE)
        for component in self._components(prefix):
            fitting = {k: v for k, v in self._names(component).get(rest, {}).items() if _same_shape(v, shape)}
            if len(fitting) > 1:
                raise MatchError(
                    f"{name}: {' and '.join(fitting)} of the base model are both flattened to this name. "
                    "Rename one (--rename), or read the adapter without --base"
                )
            for parameter, found in fitting.items():
                return Target(parameter=parameter, component=component), found
        if self.base is not None:
            self.missed.append(name)
        opaque = name.removeprefix(prefix)
        component = COMPONENTS[prefix][0] if prefix else ""
        return Target(parameter=opaque, component=component, opaque=True), None

    def notes(self) -> Iterable[str]:
        """How many names could not be turned back."""
        if self.missed:
            few = ", ".join(self.missed[:3]) + (" …" if len(self.missed) > 3 else "")
            yield f"the base model has no weight of that name and shape for {count(len(self.missed), 'module')}: {few}"

    def _components(self, prefix: str) -> Sequence[str]:
        """The components that a name with this prefix is looked for in."""
        wanted = COMPONENTS.get(prefix)
        if isinstance(self.base, Pipeline):
            held = self.base.components
            return [component for component in wanted or held if component in held]
        if self.base is None:
            return ()
        if wanted is None:
            return ("",)
        is_transformer = "Transformer" in str(self.base.config.get("_class_name", ""))
        return ("transformer",) if is_transformer and "transformer" in wanted else wanted[:1]

    def _names(self, component: str) -> dict[str, dict[str, tuple[int, ...]]]:
        """The names and shapes of a component by flat name."""
        if component not in self._flat:
            model = self.base.components[component] if isinstance(self.base, Pipeline) else self.base
            found: dict[str, dict[str, tuple[int, ...]]] = {}
            for key, shape in (model.shapes if model is not None else {}).items():
                if len(shape) > 1 and key.endswith(".weight"):
                    name = _short(key.removesuffix(".weight"), component)
                    found.setdefault(_flat(name, component), {})[name] = shape
            self._flat[component] = found
        return self._flat[component]


def _short(name: str, component: str) -> str:
    """The name of a parameter in its own model, where it stands in a checkpoint of several."""
    return next((name.removeprefix(inside) for inside in _INSIDE.get(component, ()) if name.startswith(inside)), name)


def _flat(parameter: str, component: str) -> str:
    """The flat name without its prefix. Transformers 5 has CLIP without `text_model.`, which flat names have."""
    is_clip = component.startswith("text_encoder") and parameter.startswith("encoder.layers.")
    return ("text_model_" if is_clip else "") + flatten(parameter)


def _same_shape(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether the shapes are equal; 1×1 convolutions and linear layers stand for one another.

    LyCORIS flattens the kernel of a convolution, so that (out, in·k·k) stands for it.
    """
    if one[0] != other[0]:
        return False
    return _trimmed(one) == _trimmed(other) or (len(other) == 2 and _size(one[1:]) == other[1])


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    end = len(shape)
    while end > 2 and shape[end - 1] == 1:
        end -= 1
    return shape[:end]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for one in shape:
        size *= one
    return size


def flat_names(
    adapter: Adapter, carried: Mapping[str, str], prefix: str | None, base_version: str
) -> dict[str, LoraModule]:
    """Every module by the flat name that it is written under.

    `carried` are the prefixes of the file that the adapter was read from; `prefix` is for all but text encoders.
    `base_version` is what the header of that file says of the base model.

    Raises: UnsupportedFeatureError if two names become one, or a component has no prefix
    """
    is_first = base_version.startswith(_NUMBERED) or not {m.target.component for m in adapter.modules} <= _UNNUMBERED
    known = {"text_encoder": "lora_te1_" if is_first else "lora_te_", **carried}
    named: dict[str, LoraModule] = {}
    for module in adapter.modules:
        target = module.target
        if target.opaque and not target.component:
            name = target.parameter
        else:
            name = _prefix(target, known, prefix) + _flat(target.parameter, target.component)
        if "." in name:
            raise UnsupportedFeatureError(f"{target}: a name of kohya's has no dot; change it with --rename")
        if name in named:
            raise UnsupportedFeatureError(
                f"{named[name].target} and {target} would both be written as {name}: flattening makes them one name. "
                "Change one with --rename, or write them to two files with --only"
            )
        named[name] = module
    return named


def prefix_notes(named: Mapping[str, LoraModule], prefix: str | None) -> Iterator[str]:
    """What stands in front of the names of modules of no named model, where it was chosen here."""
    if prefix:
        return
    nameless = {n: m.target for n, m in named.items() if not m.target.component and not m.target.opaque}
    clip = [name for name, target in nameless.items() if _CLIP.fullmatch(target.parameter)]
    other = [t for n, t in nameless.items() if n not in clip and not _DENOISER.fullmatch(t.parameter)]
    if other:
        yield (
            f"the adapter names no model: {other[0]} and the like are written behind {_DEFAULT}, kohya's prefix for "
            "the UNet or transformer that denoises. kohya has none for language models. prefix=… (--out prefix=…) "
            "chooses another"
        )
    if clip:
        yield (
            f"the adapter names no model: by their names, {nameless[clip[0]]} and the like are of a text encoder and "
            f"are written behind {prefix_of(clip[0])}. prefix=… (--out prefix=…) chooses another, such as lora_te1_"
        )


def _prefix(target: Target, known: Mapping[str, str], prefix: str | None) -> str:
    component = target.component
    if prefix and not component.startswith("text_encoder"):
        return prefix
    if known.get(component):
        return known[component]
    if not component:
        return known["text_encoder"] if _CLIP.fullmatch(target.parameter) else _DEFAULT
    found = next((prefix for prefix, meant in COMPONENTS.items() if component in meant), None)
    if found is None:
        raise UnsupportedFeatureError(
            f"{component}: kohya has no prefix for this model, only for {', '.join(_all_components())}. "
            "Leave its modules out with --exclude, or give a name with --rename"
        )
    return found


def _all_components() -> list[str]:
    return list(dict.fromkeys(component for meant in COMPONENTS.values() for component in meant))
