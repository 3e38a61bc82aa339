"""Names: GGUF's `blk.N.attn_q` and what transformers calls the same parameter, turned both ways.

From transformers to GGUF by the gguf package's own map; back by the names that the base model has, else by those that
transformers gives every model of the family.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from adaptertools.dialects.gguf.base import BaseFacts
from adaptertools.dialects.gguf.families import CONVERTER, EMBEDDING, HEAD, Family
from adaptertools.errors import MatchError, MissingExtraError, UnsupportedFeatureError

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_ANY_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_OTHER_MODELS = re.compile(r"(^|\.)(visual|vision\w*|audio\w*|multi_modal_projector|mm_projector|talker)\.")
"""Parts of multimodal models that GGUF stores in another file."""


def tensor_namer(facts: BaseFacts) -> Callable[[str], str]:
    """What turns a parameter's name into GGUF's, both without `.weight`.

    Raises, when called: UnsupportedFeatureError for a parameter that has no place, or one not known to be exact;
            MatchError for a layer that the base does not have
    """
    name_map = _name_map(facts.family, facts.layers)

    def name(parameter: str) -> str:
        tensor = _tensor(name_map, parameter)
        if tensor is None and (layer := _ANY_LAYER.search(parameter)):
            _check_layer(parameter, int(layer[1]), facts)
        if tensor is None or kind_of(tensor) not in (*facts.family.top, *facts.family.block):
            taken = ", ".join((*facts.family.top.values(), *facts.family.block.values()))
            raise UnsupportedFeatureError(
                f"{parameter}: {_why(tensor, facts)}. What is taken of a {facts.model_type} model are {taken}; for "
                f"more there is {CONVERTER}"
            )
        return tensor

    return name


def _why(found: str | None, facts: BaseFacts) -> str:
    if found is not None:
        return f"it would be {found}, of which it is not proven that it means the same there"
    return f"it has no name in GGUF's {facts.family.architecture!r} of {facts.layers} layers"


def check_layers(tensors: Iterable[str], facts: BaseFacts) -> None:
    """Raises: MatchError for a tensor of a layer that the base does not have"""
    for tensor in tensors:
        if found := _BLOCK.fullmatch(tensor):
            _check_layer(f"{tensor}.weight", int(found[1]), facts)


def _check_layer(name: str, layer: int, facts: BaseFacts) -> None:
    if layer >= facts.layers:
        raise MatchError(
            f"{name}: it is of layer {layer}, and the base has only {facts.layers} layers, counted from 0. Is it the "
            "right base model?"
        )


def kind_of(tensor: str) -> str:
    """A tensor's name without its block: `attn_q` of `blk.3.attn_q`."""
    found = _BLOCK.fullmatch(tensor)
    return found[2] if found else tensor


def is_tensor(name: str) -> bool:
    """Whether it may be a tensor's name, without `.weight`."""
    return name in (EMBEDDING, HEAD) or _BLOCK.fullmatch(name) is not None


def parameter_names(tensors: Iterable[str], family: Family, names: Iterable[str]) -> dict[str, str]:
    """Parameters by tensor, both without `.weight`: among the `names` of a base, else as transformers calls them.

    Raises: MatchError if the base has no such parameter; UnsupportedFeatureError for tensors of no known meaning
    """
    wanted = list(tensors)
    for tensor in wanted:
        if kind_of(tensor) not in (*family.top, *family.block):
            raise UnsupportedFeatureError(
                f"{tensor}.weight: of the architecture {family.architecture!r} this tensor is not read"
                f"{': a stack of experts' * tensor.endswith('_exps')}"
            )
    known = by_tensor(family, names, wanted)
    if not known:
        return {tensor: template(tensor, family) for tensor in wanted}
    for tensor in wanted:
        if tensor not in known:
            raise MatchError(f"{tensor}.weight: the base model has no such parameter. Is it the right base model?")
    return {tensor: in_memory(known[tensor]) for tensor in wanted}


def template(tensor: str, family: Family) -> str:
    """What transformers calls the parameter in a model of the family."""
    found = _BLOCK.fullmatch(tensor)
    return f"{family.root}.layers.{found[1]}.{family.block[found[2]]}" if found else family.top[tensor]


def template_namer(family: Family) -> Callable[[str], str]:
    """What turns a parameter's name into GGUF's, if it is what transformers calls it in a model of the family."""
    top = {path: tensor for tensor, path in family.top.items()}
    block = {path: tensor for tensor, path in family.block.items()}

    def name(parameter: str) -> str:
        found = _LAYER.fullmatch(parameter)
        if parameter in top:
            return top[parameter]
        if found is None or found[2] not in block:
            raise UnsupportedFeatureError(
                f"{parameter}: no parameter of {family.architecture!r} is called so. Give base=DIR (--base DIR)"
            )
        return f"blk.{found[1]}.{block[found[2]]}"

    return name


def by_tensor(family: Family, names: Iterable[str], tensors: Iterable[str]) -> dict[str, str]:
    """The parameters of a base by GGUF's name of them, as far as blocks of these tensors go, both without `.weight`."""
    parameters = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    if not parameters:
        return {}
    blocks = (found for found in map(_BLOCK.fullmatch, tensors) if found)
    name_map = _name_map(family, 1 + max((int(found[1]) for found in blocks), default=0))
    found: dict[str, str] = {}
    for parameter in parameters:
        tensor = _tensor(name_map, parameter)
        if tensor is not None:
            found.setdefault(tensor, parameter)
    return found


def in_memory(parameter: str) -> str:
    """What transformers calls a parameter that it stores as of before 4.52, where the language model came first."""
    return parameter.replace("language_model.model.", "model.language_model.").replace(
        "language_model.lm_head", "lm_head"
    )


def _tensor(name_map: Any, parameter: str) -> str | None:
    if _OTHER_MODELS.search(parameter):
        return None
    plain = parameter.replace("language_model.", "")
    found: str | None = name_map.get_name(f"{plain}.weight", try_suffixes=(".weight",))
    return found and found.removesuffix(".weight")


def _name_map(family: Family, layers: int) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(
            "the names of GGUF's tensors come from the gguf package: pip install adaptertools[gguf]"
        ) from error
    by_name: Mapping[str, Any] = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if family.architecture not in by_name:
        raise MissingExtraError(
            f"this version of the gguf package does not know {family.architecture!r}: pip install -U gguf"
        )
    return gguf.get_tensor_name_map(by_name[family.architecture], layers)
