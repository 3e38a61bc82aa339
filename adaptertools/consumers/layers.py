"""Which modules a consumer wants in the layers of a model beside those that an adapter has."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from adaptertools.adapter import LoraModule, Target
from adaptertools.consumers.rule import Layers
from adaptertools.names import leaf, parent

_OF_LANGUAGE_MODEL = re.compile(
    r"(base_model[._]model[._])?"
    r"((model[._]|language_model[._])+layers[._]\d+[._](self_attn|mlp|block_sparse_moe|linear_attn)[._]"
    r"|(transformer[._])?h[._]\d+[._](attn|mlp|self_attention)[._]"
    r"|gpt_neox[._]layers[._]\d+[._])"
)
"""Names of layers in Llama and its kin, GPT-2 and its kin, and GPT-NeoX, also with `_` for `.`."""

_FLAT_PREFIX = re.compile(r"lora_(unet|transformer)_")
_LAYER = re.compile(r"^((?:[^.]+\.)*?)(\d+)(\..+)$")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module stands: `stack` is what comes before the number of the layer, `name` what comes after."""

    component: str
    stack: str
    layer: int
    name: str

    @property
    def target(self) -> Target:
        return Target(parameter=f"{self.stack}{self.layer}{self.name}", component=self.component)


def place(target: Target) -> Place | None:
    """The place of a target in its layer; None for one that stands in no layer, such as an output head."""
    match = _LAYER.match(target.parameter)
    return Place(target.component, match[1], int(match[2]), match[3]) if match else None


def is_of_language_model(target: Target) -> bool:
    """Whether a name is recognisably one of a language model, and not of the text encoder of an image model."""
    if target.component.startswith("text_encoder"):
        return False
    return _OF_LANGUAGE_MODEL.match(_FLAT_PREFIX.sub("", target.parameter, count=1)) is not None


def absent(modules: Sequence[LoraModule], layers: Layers, *, num_layers: int | None) -> list[Target]:
    """The targets that are wanted and not there. `num_layers` is the model's; else the last one adapted is the last.

    Shared experts, several stacks of layers and components are each counted for themselves.
    """
    places = [found for module in modules if (found := place(module.target)) is not None]
    present = {found.target for found in places}
    wanted = dict.fromkeys(found.target for found in _wanted(places, layers, num_layers))
    return [target for target in wanted if target not in present]


def _wanted(places: Sequence[Place], layers: Layers, num_layers: int | None) -> Iterator[Place]:
    for found in places:
        if leaf(found.name) in layers.together:
            home = parent(found.name)
            yield from (replace(found, name=f"{home}.{name}") for name in layers.wanted)
    if layers.every:
        depth: dict[tuple[str, str], int] = defaultdict(int)
        for found in places:
            stack = (found.component, found.stack)
            depth[stack] = max(depth[stack], found.layer + 1, num_layers or 0)
        for found in {(p.component, p.stack, p.name): p for p in places}.values():
            for layer in range(depth[found.component, found.stack]):
                yield replace(found, layer=layer)


def stand_in(target: Target, modules: Iterable[LoraModule], together: Sequence[str]) -> LoraModule | None:
    """A module with the shapes that one at this target has: of the same name in another layer, else beside it.

    Of projections that stand together, k has the shape of v, and v that of k.
    """
    wanted = place(target)
    assert wanted is not None
    alike = [(found, module) for module in modules if (found := place(module.target)) is not None]
    for found, module in alike:
        if (found.component, found.stack, found.name) == (wanted.component, wanted.stack, wanted.name):
            return module
    pair = {"k_proj": "v_proj", "v_proj": "k_proj"}.get(leaf(wanted.name))
    for found, module in alike:
        if pair in together and found.stack == wanted.stack and found.name == f"{parent(wanted.name)}.{pair}":
            return module
    return None
