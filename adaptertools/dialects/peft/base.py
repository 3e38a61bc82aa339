"""What a base model's headers settle for PEFT adapters: shapes, orientation, and how its experts are stored."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from adaptertools.errors import count
from adaptertools.module import LoraModule

CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
"""Models of transformers whose projections are `Conv1D`, with weights stored (in, out)."""

_LAYER = re.compile(r"((?:^|.*?\.)(?:layers|layer|h)\.)(\d+)(?=\.)")
"""What PEFT replicates: the first list of layers in a name, as llama, bert and falcon call it."""

_CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")

TRANSPOSED_EXPERT_TYPES = ("gpt_oss", "aria", "openai_privacy_filter")
"""Models of transformers whose stacks of experts are marked `is_transposed`: (E, in, out)."""


class Checkpoint(Protocol):
    """The headers of a base model: the shape of every tensor, and its configuration."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def config(self) -> Mapping[str, Any]: ...


class BaseModel:
    """A base model's headers, or nothing where none were given: then every question is answered with None.

    `layer_replication` says of which of its layers the model is built that the questions are about.
    """

    def __init__(self, checkpoint: Checkpoint | None, layer_replication: Sequence[tuple[int, int]] = ()) -> None:
        self._layer_replication = layer_replication
        self._shapes = checkpoint.shapes if checkpoint is not None else {}
        config = checkpoint.config if checkpoint is not None else {}
        text = config.get("text_config")
        kinds = [part.get("model_type") for part in (config, text) if isinstance(part, Mapping)]
        self.model_types = frozenset(str(kind) for kind in kinds if kind)
        self.known = bool(self._shapes)
        self._by_leaf: dict[str, list[str]] = {}
        for name in self._shapes:
            self._by_leaf.setdefault(".".join(name.split(".")[-2:]), []).append(name)

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """The shape of a parameter, its `.weight` left out; under another prefix too where only one fits."""
        published = self._published(parameter)
        if published is None:
            return None
        parameter = published
        for name in (f"{parameter}.weight", parameter):
            if name in self._shapes:
                return tuple(self._shapes[name])
            alike = self._by_leaf.get(".".join(name.split(".")[-2:]), ())
            found = [other for other in alike if other.endswith(f".{name}") or name.endswith(f".{other}")]
            if len(found) == 1:
                return tuple(self._shapes[found[0]])
        return None

    def _published(self, parameter: str) -> str | None:
        """The name of a parameter in the model as published; None where layer replication has no such layer."""
        found = _LAYER.match(parameter) if self._layer_replication else None
        if found is None:
            return parameter
        layer = int(found[2])
        for first, end in self._layer_replication:
            if layer < end - first:
                return f"{found[1]}{first + layer}{parameter[found.end() :]}"
            layer -= end - first
        return None

    def notes(self, modules: Iterable[LoraModule]) -> Iterator[str]:
        """What modules change that the base model does not have, or has in another shape."""
        if not self.known:
            return
        absent, other = [], []
        for module in modules:
            name, wanted, found = module.target.parameter, module.weight_shape, self.shape(module.target.parameter)
            if found is None:
                absent.append(name)
            elif found != wanted:
                other.append(f"{name} in shape {found}, the adapter is for {wanted}")
        if absent:
            lacking = count(len(absent), "parameter")
            yield f"the base model lacks {lacking} that the adapter changes, such as {absent[0]}"
        if other:
            unfit = count(len(other), "parameter", ("does", "do"))
            yield f"of the base model {unfit} not fit: it has {other[0]}"

    def linear_is_transposed(self, parameter: str, out_features: int, in_features: int) -> bool | None:
        """Whether a linear weight is stored (in, out); None where nothing tells."""
        shape = self.shape(parameter)
        if shape is None or len(shape) != 2:
            return None
        if out_features != in_features:
            return {(out_features, in_features): False, (in_features, out_features): True}.get((shape[0], shape[1]))
        if not self.model_types or shape != (out_features, in_features):
            return None
        return bool(self.model_types.intersection(CONV1D_TYPES)) and parameter.split(".")[-1] in _CONV1D_NAMES

    @property
    def experts_are_transposed(self) -> bool | None:
        """Whether its stacks of experts are marked `is_transposed`; None where the model's type is not known."""
        return bool(self.model_types.intersection(TRANSPOSED_EXPERT_TYPES)) if self.model_types else None
