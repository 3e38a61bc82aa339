"""Which tensor of a base model an adapter means, where prefixes, wrappers and the names of experts differ.

A model's own name and `model.` stand in front or not, as the class says that saved it; models for several kinds of
input put `language_model.` before or after. Everything else about a name has to agree.
"""

import difflib
import re
from collections.abc import Mapping

from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.errors import MatchError
from adaptertools.names import leaf, strip_wrappers

_WRAPPERS = ("backbone", "base_model", "decoder", "language_model", "llm", "lm", "model", "module", "net", "text_model")
_MODELS = ("albert", "bert", "deberta", "distilbert", "electra", "gpt_neox", "mpnet", "roberta", "transformer", "vit")
_PREFIXES = frozenset((*_WRAPPERS, *_MODELS))
"""What stands in front of a name or not. A model's type, as its configuration says it, is one too."""

_EXPERT_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_RENAMED = {"block_sparse_moe": "mlp", "embed_out": "lm_head"}
_NUMBER = re.compile(r"\.\d+(?=\.)")
_NORM = {"gamma": "weight", "beta": "bias"}
_EXPERT = re.compile(r"(?P<home>.*\bexperts)\.(?P<number>\d+)\.(?P<part>\w+)$")
_WEIGHT = ".weight"

_FUSIONS = (
    (
        ("q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v", "wq", "wk", "wv"),
        ("qkv_proj", "qkv", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack", "in_proj", "in_proj_weight"),
    ),
    (("gate_proj", "up_proj", "w1", "w3"), ("gate_up_proj",)),
)
"""What some models hold apart and others as one tensor: to name it in messages."""


class Names:
    """The tensors of a base model, found by the names that adapters have for them."""

    def __init__(self, base: Checkpoint) -> None:
        self._label = base.label
        self._tensors = base.shapes
        self._prefixes = _PREFIXES | _model_types(base.config)
        self._alike: dict[str, list[str]] = {}
        self._by_end: dict[str, list[str]] = {}
        for name in self._tensors:
            self._alike.setdefault(self.canonical(name), []).append(name)
            self._by_end.setdefault(_end(_path(name)), []).append(name)

    def find(self, parameter: str) -> str | None:
        """The tensor of a parameter, whose name may lack its final `.weight`; None where the model has none.

        Raises: MatchError where several fit
        """
        path = _path(parameter)
        for name in (path + _WEIGHT, path):
            if name in self._tensors:
                return name
        alike = self.like(self.canonical(path))
        longer = [name for name in self._by_end.get(_end(path), ()) if _path(name).endswith(f".{path}")]
        found = list(dict.fromkeys((*alike, *longer)))
        if len(found) > 1:
            raise MatchError(
                f"{parameter}: several tensors of {self._label} fit: {', '.join(found[:4])}. Rename the adapter's "
                "module to the whole name of the one that is meant"
            )
        return alike[0] if alike else None

    def nearest(self, parameter: str) -> str:
        """What a message says of a parameter that the base model does not have."""
        path = _path(parameter)
        if other := self._otherwise_fused(path):
            return other
        pool = self._by_end.get(_end(path)) or list(self._tensors)
        near = difflib.get_close_matches(path + _WEIGHT, pool, n=3, cutoff=0.4)
        return f"the nearest are {', '.join(near)}" if near else f"its names are like {next(iter(self._tensors))}"

    def _otherwise_fused(self, path: str) -> str | None:
        """What it says where several projections are one tensor in the base, or in the adapter alone."""
        end, layer = leaf(path), _layer(self.canonical(path))
        for apart, fused in _FUSIONS:
            wanted = fused if end in apart else apart if end in fused else ()
            found = [name for name in self._tensors if leaf(_path(name)) in wanted]
            found = [name for name in found if _layer(self.canonical(name)) == layer]
            if found:
                how = "fused with others" if end in apart else "in parts"
                return (
                    f"it holds it {how}: {', '.join(found[:3])}. Their rows are ordered in other ways in other models: "
                    "merge into a checkpoint that is laid out as the adapter's own model was"
                )
        return None

    def like(self, canonical: str) -> list[str]:
        """The tensors whose names are this one, once what may stand in front is taken off."""
        return self._alike.get(canonical, [])

    def canonical(self, name: str) -> str:
        """The name without what may stand in front of it, and in the words that most models use."""
        parts = strip_wrappers(_path(name)).split(".")
        while len(parts) > 1 and parts[0] in self._prefixes:
            del parts[0]
        parts = [_RENAMED.get(part, part) for part in parts]
        if len(parts) > 2 and parts[-3] == "experts" and parts[-2].isdigit():
            parts[-1] = _EXPERT_PARTS.get(parts[-1], parts[-1])
        parts[-1] = _NORM.get(parts[-1], parts[-1])
        return ".".join(parts).removesuffix(_WEIGHT)


def expert_of(parameter: str) -> tuple[str, int, str] | None:
    """The module of all experts, the number of one, and the part of it that a name means, as `gate_proj` and the like.

    >>> expert_of("model.layers.0.mlp.experts.3.w1")
    ('model.layers.0.mlp.experts', 3, 'gate_proj')
    """
    match = _EXPERT.match(_path(parameter))
    if match is None:
        return None
    return match["home"], int(match["number"]), _EXPERT_PARTS.get(match["part"], match["part"])


def _path(name: str) -> str:
    return name.removesuffix(_WEIGHT)


def _layer(canonical: str) -> str:
    """The name up to its last number, which is that of a layer."""
    return canonical[: max((match.end() for match in _NUMBER.finditer(canonical)), default=0)]


def _end(path: str) -> str:
    return ".".join(path.split(".")[-2:])


def _model_types(config: Mapping[str, object]) -> frozenset[str]:
    parts = (config, *(part for part in config.values() if isinstance(part, Mapping)))
    return frozenset(str(part["model_type"]).replace("-", "_") for part in parts if part.get("model_type"))
