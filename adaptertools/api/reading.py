"""Read adapters: from a path, from an address on the Hub, or from tensors in memory."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from adaptertools import formats
from adaptertools.adapter import Adapter
from adaptertools.api.places import Given, localize
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.pipeline import Model, Pipeline, open_model
from adaptertools.containers.source import Source
from adaptertools.errors import OptionError, UnknownFormatError


def read(
    path: Given,
    *,
    format: str | None = None,
    alpha: float | None = None,
    slots: str | None = None,
    base: Given | Model | None = None,
    revision: str | None = None,
    token: str | None = None,
    **options: Any,
) -> Adapter:
    """Read an adapter. Its tensors are mapped from disk where the container allows it; values are not looked at.

    `path` may be an address on the Hub: `org/name`, `org/name@revision`, `hf://org/name@revision/sub/folder`. What the
    format needs of it is downloaded to the shared cache; `revision` and `token` are for that. `format` is told by the
    content unless given. `alpha` is for files that cannot state it; `slots` for fused projections of loralib files;
    `base` is a base model, here or on the Hub, whose headers settle names and shapes, or a folder of several, as
    diffusers stores a pipeline; `options` are those of the format itself.

    Memory: headers only, for safetensors, npz and torch files
    Raises: AdapterToolsError
    """
    source = Source(localize(path, revision=revision, token=token))
    name = format or formats.detect(source)
    model = None if base is None else open_base(base, token, format=name)
    given = {"alpha": alpha, "slots": slots, "base": model}
    return _read(source, name, {key: value for key, value in given.items() if value is not None}, options)


def from_state_dict(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, format: str, **options: Any
) -> Adapter:
    """The adapter that these tensors and this configuration describe, as if read from a file of the format.

    Raises: AdapterToolsError
    """
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise OptionError(f"{key!r} is {type(tensor).__name__}, expected a torch.Tensor")
    module = formats.get(format)
    name = module.CONFIG if module.FOLDER else f"memory{module.CONFIG}"
    source = Source.in_memory(tensors, {name: config} if config is not None else {})
    return _read(source, format, {}, options)


def detect(path: Given, *, revision: str | None = None, token: str | None = None) -> str:
    """The name of the format of the adapter at `path`, told by its content.

    Raises: SourceNotFoundError, UnknownFormatError, AmbiguousFormatError
    """
    return formats.detect(Source(localize(path, revision=revision, token=token)))


def oddities(path: Given, *, format: str, **options: Any) -> tuple[str, ...]:
    """What is odd about the files of an adapter and shows only in values: two copies of the weights that differ.

    Memory: none; the values of the files are read
    Raises: AdapterToolsError
    """
    look = getattr(formats.get(format), "oddities", None)
    if look is None:
        return ()
    known = option_types(look, ())
    found: tuple[str, ...] = look(Source(localize(path)), **{key: options[key] for key in options if key in known})
    return found


def open_base(base: Given | Model, token: str | None = None, *, format: str | None = None) -> Model:
    """A base model by its headers, or by its config.json alone; one that is open already is returned.

    `format` is that of the adapter that it is opened for.

    Raises: SourceNotFoundError, UnknownFormatError, HubError and the like
    """
    if isinstance(base, Checkpoint | Pipeline):
        return base
    try:
        return open_model(localize(base, "model", token=token, headers=True), config_suffices=True)
    except UnknownFormatError as error:
        advice = getattr(formats.get(format), "BASE_ADVICE", None) if format else None
        if advice is None:
            raise
        raise UnknownFormatError(f"{error}. {advice}") from error


def read_options(format: str) -> dict[str, inspect.Parameter]:
    """The options of a format's reader that are its own: `alpha`, `slots` and `base` are those of every reader."""
    return option_types(formats.get(format).read, ("alpha", "slots", "base"))


def reads_with(format: str, option: str) -> bool:
    """Whether a format's reader takes `alpha`, `slots`, `base`, or an option of its own."""
    return option in option_types(formats.get(format).read, ())


def option_types(function: Callable[..., Any], reserved: Collection[str]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a format's `read` or `write` that are its own options."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in reserved}


def _read(source: Source, name: str, given: Mapping[str, Any], options: Mapping[str, Any]) -> Adapter:
    module = formats.get(name)
    accepted = option_types(module.read, ())
    for key in {**given, **options}:
        if key not in accepted and key != "base":
            raise OptionError(f"reading {name} takes no {key!r}; it takes {', '.join(accepted) or 'no option'}")
    adapter = module.read(source, **{key: value for key, value in {**given, **options}.items() if key in accepted})
    if given.get("base") is None or adapter.origin is None:
        return adapter
    return replace(adapter, origin=replace(adapter.origin, base=given["base"].label))
