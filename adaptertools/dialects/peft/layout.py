"""Where each layer stands in a PEFT model: its names in keys and configuration, and the wrappers around it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from adaptertools.dialects.peft.experts import registration_order
from adaptertools.dialects.peft.factors import Layer
from adaptertools.dialects.peft.keys import PREFIX
from adaptertools.errors import UnsupportedFeatureError
from adaptertools.module import Kind
from adaptertools.names import leaf, parent

IN_PROJ = "in_proj_weight"


@dataclass(slots=True)
class Place:
    """One layer, the path at which PEFT finds it, and the name by which its patterns match it."""

    layer: Layer
    path: str
    matched: str
    factor: float = 1.0
    nesting: int = 0
    """wrappers of the same module that stand around this one"""


@dataclass(slots=True)
class Layout:
    """All layers of an adapter in their places. `wrappers` counts the wrappers around the children of a module."""

    places: list[Place] = field(default_factory=list)
    target_modules: dict[str, None] = field(default_factory=dict)
    target_parameters: list[str] = field(default_factory=list)
    wrappers: dict[str, int] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    """layers that come with another one: out_proj with its attention"""

    def key(self, path: str, nesting: int = 0) -> str:
        """The path as it stands in a key, wrappers and prefix included."""
        parts: list[str] = []
        walked = ""
        pieces = path.split(".")
        for index, piece in enumerate(pieces):
            parts.append(piece)
            walked = f"{walked}.{piece}" if walked else piece
            if index < len(pieces) - 1:
                parts += ["base_layer"] * self.wrappers.get(walked, 0)
        return PREFIX + ".".join(parts + ["base_layer"] * nesting)

    def base_key(self, parameter: str) -> str:
        """The key of a base parameter, which moves into `base_layer` where its module is adapted."""
        module = parent(parameter)
        nesting = self.wrappers.get(module, 0) or int(self.adapts(module))
        return f"{self.key(module, nesting)}.{leaf(parameter)}" if module else PREFIX + parameter

    def adapts(self, module: str) -> bool:
        """Whether PEFT puts a LoRA layer in the place of this module."""
        return module in self.wrappers or module in self.hidden or module in self.target_modules


def arrange(layers: Sequence[Layer], orders: Sequence[Sequence[str]], original: Sequence[str]) -> Layout:
    """Put every layer in its place.

    `orders` are known orders of registration, `original` the target_parameters that the adapter once had: they tell a
    parameter called `weight`, which the adapter model leaves out, and an in_proj_weight adapted without its attention.

    Raises: UnsupportedFeatureError
    """
    layout = Layout()
    by_name = {layer.parameter: layer for layer in layers}
    bare: dict[str, dict[str, Layer]] = {}
    for layer in layers:
        home = parent(layer.parameter)
        alone = layer.experts or _names(original, layer.parameter) or f"{home}.out_proj" not in by_name
        if leaf(layer.parameter) == IN_PROJ and not alone:
            _place_attention(layout, home, layer, by_name[f"{home}.out_proj"])
        elif layer.kind is Kind.PARAMETER or leaf(layer.parameter) == IN_PROJ:
            weight = f"{layer.parameter}.weight"
            named = weight if _names(original, weight) else layer.parameter
            if not parent(named):
                raise UnsupportedFeatureError(f"{named}: PEFT cannot adapt a parameter of the outermost module")
            bare.setdefault(parent(named), {})[leaf(named)] = layer
    for module, members in bare.items():
        _place_parameters(layout, module, members, orders)
    placed = {id(place.layer) for place in layout.places} | {id(by_name[name]) for name in layout.hidden}
    for layer in layers:
        if id(layer) not in placed and leaf(layer.parameter) != IN_PROJ:
            layout.places.append(Place(layer, layer.parameter, layer.parameter))
            layout.target_modules[layer.parameter] = None
    clash = sorted(set(bare) & set(layout.target_modules))
    if clash:
        raise UnsupportedFeatureError(f"{clash[0]}: PEFT cannot adapt a module and a parameter of the same module")
    return layout


def _names(targets: Sequence[str], parameter: str) -> bool:
    """Whether target_parameters name the parameter, by its whole path or the end of it."""
    return any(parameter == name or parameter.endswith(f".{name}") for name in targets)


def _place_attention(layout: Layout, path: str, in_proj: Layer, out_proj: Layer) -> None:
    """Both projections of an `nn.MultiheadAttention`: one rank, one alpha, and out_proj counted twice by PEFT."""
    rank = max(in_proj.rank, out_proj.rank)
    inner, outer = in_proj.widened(rank), out_proj.widened(rank)
    scaling = inner.scaling or outer.scaling / 2
    factors = (inner.scaling / scaling, outer.scaling / (2 * scaling)) if scaling else (1.0, 1.0)
    if scaling != inner.scaling:
        inner = replace(inner, scaling=scaling, alpha=None)
    layout.places.append(Place(inner, path, path, factor=factors[0]))
    layout.places.append(Place(outer, f"{path}.out_proj", path, factor=factors[1]))
    layout.target_modules[path] = None
    layout.wrappers[path] = 1
    layout.hidden.add(f"{path}.out_proj")


def _place_parameters(layout: Layout, module: str, members: dict[str, Layer], orders: Sequence[Sequence[str]]) -> None:
    names = registration_order(list(members), orders, module)
    for index, name in enumerate(names):
        full = f"{module}.{name}"
        layout.places.append(Place(members[name], module, full, nesting=len(names) - 1 - index))
        layout.target_parameters.append(full)
    layout.wrappers[module] = len(names)
