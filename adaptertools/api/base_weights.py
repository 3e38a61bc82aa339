"""The weights of a base model, found by the names that adapters have for them."""

import threading
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from adaptertools.adapter import LoraModule, Target
from adaptertools.api.places import Given, localize
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.pipeline import Model, Pipeline, open_model
from adaptertools.errors import MatchError, UnsupportedFeatureError
from adaptertools.merging.match import Names

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that hold a weight as it is, not quantised."""


class BaseWeights:
    """A base model, or a pipeline of several, by the targets of adapters. It may be asked from several threads."""

    def __init__(self, model: Model | Callable[[], Model]) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._names: dict[str, Names] = {}

    @classmethod
    def at(cls, given: Given, token: str | None = None) -> Self:
        """Those of a model here or on the Hub, which is opened, and downloaded whole, when the first is asked for."""
        return cls(lambda: open_model(localize(given, "model", token=token), config_suffices=True))

    @property
    def _label(self) -> str:
        return self._model.label if isinstance(self._model, Model) else "it"

    def component(self, name: str) -> Checkpoint | None:
        """The model that a target's component means: the only one, or that of a pipeline; None if it has none."""
        with self._lock:
            model = self._model = self._model if isinstance(self._model, Model) else self._model()
        return model.components.get(name) if isinstance(model, Pipeline) else model

    def find(self, target: Target) -> str | None:
        """The name of the tensor that a target means, None if there is none.

        Raises: MatchError if several fit
        """
        model = self.component(target.component)
        if model is None:
            return None
        with self._lock:
            if target.component not in self._names:
                self._names[target.component] = Names(model)
        return self._names[target.component].find(target.parameter)

    def weight(self, module: LoraModule) -> Tensor:
        """The weight that a DoRA module renormalises, mapped from disk.

        Raises: MatchError if it is not there; UnsupportedFeatureError if it is quantised
        """
        model, found = self.component(module.target.component), self.find(module.target)
        if model is not None and not model.shapes:
            raise MatchError(
                f"{module.target}: DoRA renormalises the base model's weights, and {model.label} has a config.json "
                "alone. Give the folder with its weights"
            )
        if not found or model is None:
            raise MatchError(
                f"{module.target}: the base model has no such weight, and DoRA renormalises it. Is {self._label} the "
                "right base model?"
            )
        if model.dtypes[found] not in _PLAIN:
            raise UnsupportedFeatureError(
                f"{found} of the base model is quantised, and DoRA renormalises the weight that it stands for. Give "
                "the model that was quantised"
            )
        return model.tensor(found)
