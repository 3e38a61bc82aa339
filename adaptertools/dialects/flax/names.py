"""Name maps: paths in a Flax tree <-> module names of Hugging Face, and which weights a Flax model fuses.

    hf            the module's own name, split at its dots
    tunix-llama   layers/i/attn/q_proj …                        Llama 3, Qwen 2 and 3 in tunix
    tunix-gemma   layers/i/attn/{q,kv,qkv,attn_vec}_einsum …    Gemma 1 to 4 in tunix
    gemma         layer_i/attn/q_einsum/_LoRAEinsum_0 …         the gemma library
    maxtext       decoder/layers_i/self_attention/query …       MaxText; decoder/layers where the layers are scanned

Source: google/tunix c7d8950, google-deepmind/gemma 7691fd4, AI-Hypercomputer/maxtext e591f30
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from adaptertools.errors import OptionError, UnclaimedTensorError, UnsupportedFeatureError

Path = tuple[str, ...]

DEFAULT_LAYER_PREFIX = "model.layers"
LLAMA31 = "llama3.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One weight of a Flax layer and the module or, where it is fused, the modules that it stands for.

    `heads` says which factor has the head axis split off: that of the output for q, k and v, that of the input for o.
    """

    path: Path
    parts: tuple[str, ...]
    weight: str = "kernel"
    heads: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What stands at a path: its rule and its layer's index, None outside the layers and where they are scanned."""

    rule: Rule
    layer: int | None
    lead: Path = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """The layers of one family of models. `index` is how the index is joined to the stem: `/` or `_`."""

    name: str
    stem: Path
    index: str
    rules: tuple[Rule, ...]
    outside: tuple[Rule, ...] = ()

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        return (*self.rules, *self.outside)

    def path(self, rule: Rule, layer: int | None) -> Path:
        """The path of a weight, without a layer index where the layers are scanned."""
        if rule in self.outside:
            return rule.path
        if layer is None:
            return (*self.stem, *rule.path)
        if self.index == "/":
            return (*self.stem, str(layer), *rule.path)
        return (*self.stem[:-1], f"{self.stem[-1]}_{layer}", *rule.path)

    def place(self, path: Path) -> Place | None:
        """What stands at a path; None if this family has no such path."""
        for rule in self.outside:
            if path[-len(rule.path) :] == rule.path and set(path[: -len(rule.path)]) <= _LEADING:
                return Place(rule=rule, layer=None)
        for start in range(len(path)):
            layer, rest = _layer_index(self.stem, path[start:])
            if rest is not None and rest in self._rules and set(path[:start]) <= _LEADING:
                return Place(rule=self._rules[rest], layer=layer)
        return None

    @property
    def _rules(self) -> Mapping[Path, Rule]:
        return {rule.path: rule for rule in self.rules} | {
            rule.path[:-1]: rule for rule in self.rules if rule.path[-1] == _GEMMA_WRAPPER
        }


_LEADING = frozenset({"model", "base", "transformer"})
"""What some models put in front of their layers."""

_GEMMA_WRAPPER = "_LoRAEinsum_0"
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP = tuple(Rule(path=("mlp", name), parts=(f"mlp.{name}",)) for name in ("gate_proj", "up_proj", "down_proj"))


def _einsums(wrapper: Path) -> tuple[Rule, ...]:
    shapes = {
        "q_einsum": _ATTENTION[:1],
        "k_einsum": _ATTENTION[1:2],
        "kv_einsum": _ATTENTION[1:],
        "qkv_einsum": _ATTENTION,
    }
    rules = [
        Rule(path=("attn", name, *wrapper), parts=parts, weight="w", heads="out") for name, parts in shapes.items()
    ]
    output = Rule(path=("attn", "attn_vec_einsum", *wrapper), parts=("self_attn.o_proj",), weight="w", heads="in")
    return (*rules, output)


_TUNIX_LLAMA = Naming(
    name="tunix-llama",
    stem=("layers",),
    index="/",
    rules=(
        *(
            Rule(
                path=("attn", f"{name}_proj"),
                parts=(f"self_attn.{name}_proj",),
                weight="w",
                heads="in" if name == "o" else "out",
            )
            for name in "qkvo"
        ),
        *_MLP,
    ),
    outside=(Rule(path=("lm_head",), parts=("lm_head",), weight="w"),),
)
_TUNIX_GEMMA = Naming(name="tunix-gemma", stem=("layers",), index="/", rules=(*_einsums(()), *_MLP))
_GEMMA = Naming(
    name="gemma",
    stem=("layer",),
    index="_",
    rules=(
        *_einsums((_GEMMA_WRAPPER,)),
        Rule(path=("mlp", "_LoRAEinsum_gating_einsum"), parts=("mlp.gate_proj", "mlp.up_proj")),
        Rule(path=("mlp", "_LoRAEinsum_linear"), parts=("mlp.down_proj",)),
    ),
)
_MAXTEXT = Naming(
    name="maxtext",
    stem=("decoder", "layers"),
    index="_",
    rules=(
        Rule(path=("self_attention", "query"), parts=("self_attn.q_proj",)),
        Rule(path=("self_attention", "key"), parts=("self_attn.k_proj",)),
        Rule(path=("self_attention", "value"), parts=("self_attn.v_proj",)),
        Rule(path=("self_attention", "out"), parts=("self_attn.o_proj",)),
        Rule(path=("mlp", "wi_0"), parts=("mlp.gate_proj",)),
        Rule(path=("mlp", "wi_1"), parts=("mlp.up_proj",)),
        Rule(path=("mlp", "wo"), parts=("mlp.down_proj",)),
    ),
    outside=(Rule(path=("decoder", "logits_dense"), parts=("lm_head",)),),
)

NAMINGS: Mapping[str, Naming] = {naming.name: naming for naming in (_TUNIX_LLAMA, _TUNIX_GEMMA, _GEMMA, _MAXTEXT)}
"""Every naming but `hf`, which has no table."""

_INTERLEAVED = frozenset({"scanned_blocks", "layers_remainder"})


def _layer_index(stem: Path, path: Path) -> tuple[int | None, Path | None]:
    """The layer index behind the stem and the path that remains; no path where the stem is another."""
    *parents, last = stem
    if path[: len(parents)] != tuple(parents) or len(path) <= len(stem):
        return None, None
    token, rest = path[len(parents)], path[len(stem) :]
    if token == last:
        return (int(rest[0]), rest[1:]) if rest[0].isdecimal() else (None, rest)
    found = re.fullmatch(rf"{last}_(\d+)", token)
    return (int(found[1]), rest) if found else (None, None)


def naming(name: str, accepted: Iterable[str]) -> Naming | None:
    """The naming with this name; None for `hf`.

    Raises: OptionError for a name that is not accepted
    """
    if name not in (accepted := list(accepted)):
        raise OptionError(f"unknown naming {name!r}: expected one of {', '.join(accepted)}")
    return NAMINGS.get(name)


def infer_naming(paths: Iterable[Path], accepted: Iterable[str]) -> str:
    """The first naming under which every path has a place, and one a name that Hugging Face would not give; else `hf`.

    Raises: UnsupportedFeatureError for the interleaved layers of MaxText's Gemma
    """
    paths = list(paths)
    for path in paths:
        if _INTERLEAVED & set(path):
            raise UnsupportedFeatureError(
                f"{'/'.join(path)}: MaxText interleaves the layers of this model, and only its configuration says how. "
                "Save it with scan_layers=false"
            )
    for known in (NAMINGS[name] for name in accepted if name in NAMINGS):
        places = [known.place(path) for path in paths]
        if any(place and ".".join(place.rule.path) not in place.rule.parts for place in places) and all(places):
            return known.name
    return "hf"


def possible_namings(paths: Sequence[Path], accepted: Iterable[str]) -> list[str]:
    """The namings under which every path has a place, whether or not the paths prove one."""
    return [name for name in accepted if name in NAMINGS and all(NAMINGS[name].place(path) for path in paths)]


def place_of(path: Path, chosen: Naming) -> Place:
    """Raises: UnclaimedTensorError if the naming has no such path."""
    place = chosen.place(path)
    if place is None:
        raise UnclaimedTensorError(
            f"{'/'.join(path)} is no path of the naming {chosen.name}; naming=hf takes every path as it is"
        )
    return place


def module_name(part: str, rule: Rule, chosen: Naming, layer: int | None, layer_prefix: str) -> str:
    """The Hugging Face name of one part of a weight."""
    return part if rule in chosen.outside else f"{layer_prefix}.{layer}.{part}"


def find_layer_prefix(parameters: Iterable[str], chosen: Naming) -> str:
    """What stands before the layer index in the names of an adapter.

    Raises: OptionError if that is not one and the same
    """
    parts = {part for rule in chosen.rules for part in rule.parts}
    pattern = re.compile(rf"(.+)\.\d+\.({'|'.join(map(re.escape, sorted(parts)))})")
    found = {match[1] for match in map(pattern.fullmatch, parameters) if match}
    if len(found) > 1:
        raise OptionError(
            f"the adapter has layers under {' and '.join(sorted(found))}; name the one that {chosen.name} shall hold "
            "with layer_prefix, and leave the other out with --exclude"
        )
    return found.pop() if found else DEFAULT_LAYER_PREFIX


def locate(parameter: str, chosen: Naming, layer_prefix: str) -> tuple[int | None, str]:
    """The layer index and the part's name of a module.

    Raises: UnsupportedFeatureError if the naming has no place for it
    """
    found = re.fullmatch(rf"{re.escape(layer_prefix)}\.(\d+)\.(.+)", parameter)
    layer, part = (int(found[1]), found[2]) if found else (None, parameter)
    rules = chosen.rules if found else chosen.outside
    if not any(part in rule.parts for rule in rules):
        raise UnsupportedFeatureError(
            f"{parameter} has no place in the naming {chosen.name} with layer_prefix {layer_prefix!r}. Leave it out "
            "with --exclude, or write naming=hf"
        )
    return layer, part


def query_or_key(name: str) -> str:
    """`q` or `k` for the modules whose rows MaxText reorders for Llama 3.1, else nothing."""
    found = re.search(r"self_attn\.([qk])_proj$", name)
    return found[1] if found else ""
