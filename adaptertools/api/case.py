"""One consumer in one version, and the base model that is at hand: what `check` and `fix` ask about adapters."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from adaptertools import consumers
from adaptertools.adapter import Adapter, Feature, LoraModule, Target
from adaptertools.api.base_weights import BaseWeights
from adaptertools.api.places import Given
from adaptertools.api.reading import open_base
from adaptertools.api.writing import stored_size
from adaptertools.consumers.judge import Finding, judge
from adaptertools.consumers.layers import absent, stand_in
from adaptertools.consumers.rule import Consumer
from adaptertools.consumers.subject import Subject
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.pipeline import Model, Pipeline
from adaptertools.containers.source import Located, Source
from adaptertools.dialects.peft import files as peft_files
from adaptertools.errors import AdapterToolsError, MatchError, OptionError, UnsupportedFeatureError
from adaptertools.operations.plain import Plain, hollow, joined, plain
from adaptertools.operations.sizes import READ_AT_ONCE
from adaptertools.tensors import all_finite

_CONFIG = "adapter_config.json"
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_FOLDERS = ("peft", "mlx")
"""Formats of which a consumer opens files by name, beside a configuration."""

_NEED_BASE = ("gguf",)
"""Formats that are not written without a base model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A consumer with the version and the rank cap that count, and the base model by its headers, if one is given."""

    consumer: Consumer
    version: str
    cap: int | None
    base: Given | None
    token: str | None
    model: Model | None
    headers: BaseWeights | None
    """Of the same model: names, shapes and dtypes."""

    @classmethod
    def of(cls, name: str, version: str | None, max_rank: int | None, base: Given | None, token: str | None) -> Self:
        """Raises: OptionError; HubError and the like for the base model"""
        _expect_types(version, max_rank)
        consumer = consumers.get(name)
        read = consumer.read_version(version)
        cap = consumer.cap(read, max_rank)
        model = None if base is None else open_base(base, token)
        headers = None if model is None else BaseWeights(model)
        return cls(consumer=consumer, version=read, cap=cap, base=base, token=token, model=model, headers=headers)

    def judge_files(
        self, source: Source, adapter: Adapter, adapter_name: str | None, nonfinite: tuple[str, ...] | None
    ) -> tuple[Finding, ...]:
        """What every rule says of an adapter and of the files that it was read from."""
        assert adapter.origin is not None
        stands_as = adapter.origin.format
        if stands_as not in self.consumer.formats:
            return self.judge(adapter, stands_as, nonfinite)
        if stands_as == "peft":
            source = peft_files.open_adapter(source, adapter_name)[0].source
        known: dict[str, Any] = {"config": source.document(_CONFIG) or {}}
        if stands_as in _FOLDERS:
            known["files"] = source.file_names
        if stands_as != "peft":
            held = [source.tensors(name) for name in source.tensor_names]
            known["keys"] = frozenset(key for file in held for key in file.tensors)
        return self.judge(adapter, stands_as, nonfinite, known)

    def judge(
        self,
        adapter: Adapter,
        format: str,
        nonfinite: tuple[str, ...] | None,
        known: Mapping[str, Any] | None = None,
    ) -> tuple[Finding, ...]:
        """What every rule says of an adapter in this format; `known` is what its files say, if it stands in any.

        `nonfinite` is `nonfinite_tensors`, for which all values are read: once for all that is asked of an adapter.
        """
        subject = Subject(
            adapter=adapter,
            format=format,
            cap=self.cap,
            nonfinite=nonfinite,
            unmatched=tuple(self._unmatched(adapter)) if self.knows_weights else None,
            misshapen=tuple(self._misshapen(adapter)) if self.knows_weights else None,
            has_base=self.model is not None,
            base_option=self._base_option,
            model_type=self._config.get("model_type"),
            tied=self._config.get("tie_word_embeddings") is True,
            num_layers=self._num_layers,
            **(known or {}),
        )
        return judge(subject, self.consumer, self.version)

    def plain(self, adapter: Adapter, *, allow_nonfinite: bool) -> Plain:
        """The adapter as this consumer reads it.

        Raises: UnsupportedFeatureError, NonFiniteError; MatchError for DoRA on weights that the base does not have
        """
        weights = None
        if self.base is not None and Feature.DORA in adapter.features:
            weights = BaseWeights.at(self.base, self.token).weight
        return plain(
            adapter,
            max_rank=self.cap,
            least_rank=self.consumer.least_rank,
            multiple=self.consumer.multiple,
            fill=[self._zeros(target, adapter) for target in self._absent(adapter)],
            base_weight=weights,
            allow_nonfinite=allow_nonfinite,
        )

    def refusal(self, adapter: Adapter, format: str) -> str:
        """Why the file that `fix` makes could not be written, so that its command is not named; empty if it could.

        The writer is asked with modules of zeros in the place of the adapter's own.

        Memory: a vector or two for each module
        """
        modules = [hollow(module) for module in adapter.modules]
        if all(rule.name != "DoRA" for rule in self.consumer.rules):
            pairs = zip(modules, adapter.modules, strict=True)
            modules = [replace(m, magnitude=of.magnitude, magnitude_axis=of.magnitude_axis) for m, of in pairs]
        try:
            modules += [hollow(self._zeros(target, adapter)) for target in self._absent(adapter)]
            asked = joined(replace(adapter, modules=tuple(modules), full_weights={}, row_weights={}))
            stored_size(asked, format=format, base=self.base, token=self.token)
        except AdapterToolsError as error:
            return str(error)
        return ""

    @property
    def knows_weights(self) -> bool:
        """Whether the base model is known by more than its configuration."""
        return isinstance(self.model, Pipeline) or (self.model is not None and bool(self.model.shapes))

    @property
    def _base_option(self) -> tuple[str, ...]:
        """What `convert` to this consumer's format has to be given: the base that is known, or a word for it."""
        if self.base is None:
            return ("--base", "BASE") if self.consumer.writes in _NEED_BASE else ()
        return "--base", str(self.base.path if isinstance(self.base, Located) else self.base)

    def _absent(self, adapter: Adapter) -> list[Target]:
        return absent(adapter.modules, self.consumer.layers, num_layers=self._num_layers)

    def _zeros(self, target: Target, adapter: Adapter) -> LoraModule:
        """A module of the shapes that one at this target has: those of one in another layer, or of the base model.

        Raises: UnsupportedFeatureError where neither is known
        """
        like = stand_in(target, adapter.modules, self.consumer.layers.together)
        if like is None:
            like = self._of_base(target)
        if like is None:
            raise UnsupportedFeatureError(
                f"{target}: {self.consumer.title} wants this module too, and nothing here tells its shape. "
                "Give the base model: --base"
            )
        return LoraModule(
            target=target,
            lora_A=like.lora_A,
            lora_B=like.lora_B,
            alpha=1.0,
            kind=like.kind,
            shape=like.shape,
            transposed=like.transposed,
        )

    def _of_base(self, target: Target) -> LoraModule | None:
        _, shape = self._stored(target)
        if shape is None or len(shape) != 2:
            return None
        rows, columns = shape
        return LoraModule(target=target, lora_A=torch.zeros(1, columns), lora_B=torch.zeros(rows, 1), alpha=1.0)

    def _unmatched(self, adapter: Adapter) -> Iterator[str]:
        """Modules whose name the base model does not have."""
        for target in (module.target for module in adapter.modules if not module.target.opaque):
            model = self.headers.component(target.component) if self.headers is not None else None
            if self.headers is None or model is None:
                continue
            try:
                found = self.headers.find(target)
            except MatchError:
                yield f"{target} fits several"
                continue
            if found is None and not _is_tied_head(target, model):
                yield f"{target} is not there"

    def _misshapen(self, adapter: Adapter) -> Iterator[str]:
        """Modules whose name the base model has for a weight of another shape."""
        for module in adapter.modules:
            target, wanted = module.target, module.weight_shape
            dtype, shape = (None, None) if target.opaque else self._stored(target)
            if shape is None or dtype is None or not dtype.is_floating_point:
                continue
            if shape != wanted and (module.transposed is not None or shape != wanted[::-1]):
                yield f"{target} has shape {shape} there, {wanted} here"

    def _stored(self, target: Target) -> tuple[torch.dtype, tuple[int, ...]] | tuple[None, None]:
        """The dtype and the shape of a target's weight; None where the base model has none, or several."""
        model = self.headers.component(target.component) if self.headers is not None else None
        if self.headers is None or model is None:
            return None, None
        with suppress(MatchError):
            if found := self.headers.find(target):
                return model.dtypes[found], tuple(model.shapes[found])
        return None, None

    @property
    def _config(self) -> Mapping[str, Any]:
        return self.model.config if isinstance(self.model, Checkpoint) else {}

    @property
    def _num_layers(self) -> int | None:
        text = self._config.get("text_config")
        stated = [part.get(name) for part in (self._config, text) if isinstance(part, Mapping) for name in _LAYERS]
        return next((count for count in stated if type(count) is int), None)


def _expect_types(version: object, max_rank: object) -> None:
    """Raises: OptionError"""
    if version is not None and not isinstance(version, str):
        raise OptionError(f"version is {version!r}, expected text such as '0.11.0'")
    if max_rank is not None and (not isinstance(max_rank, int) or isinstance(max_rank, bool)):
        raise OptionError(f"max rank is {max_rank!r}, expected a number from 1 on")


def nonfinite_tensors(adapter: Adapter) -> tuple[str, ...] | None:
    """The tensors that hold NaN or infinity; None for an adapter that is too large to be read for that."""
    tensors = adapter.named_tensors
    if sum(tensor.nbytes for tensor in tensors.values()) > READ_AT_ONCE:
        return None
    return tuple(name for name, tensor in tensors.items() if not all_finite(tensor))


def _is_tied_head(target: Target, model: Checkpoint) -> bool:
    """Whether it is the output head of a model that stores it as the input embedding alone."""
    return target.parameter.endswith("lm_head") and model.config.get("tie_word_embeddings") is not False
