"""Where the modules of an adapter stand in a GGUF file of its base, and whether llama.cpp would take them there."""

import re
from collections import Counter
from collections.abc import Callable, Mapping

from adaptertools.adapter import Adapter, Kind
from adaptertools.dialects.gguf.base import BaseFacts
from adaptertools.dialects.gguf.families import BY_ARCHITECTURE, EMBEDDING, HEAD
from adaptertools.dialects.gguf.names import is_tensor, template, template_namer, tensor_namer
from adaptertools.errors import OptionError, UnsupportedFeatureError

_DENOISERS = ("unet", "transformer", "transformer_2", "prior", "diffusion_model", "controlnet")
_IMAGE_NAMES = re.compile(
    r"(text_model[._]encoder[._]layers"
    r"|((down|up|input|output|transformer|single_transformer|double|single|joint)_blocks|mid_block|middle_block))[._]"
)
"""How names begin in the models of a diffusers pipeline: in CLIP, and in what denoises."""


def tensor_names(adapter: Adapter, facts: BaseFacts | None, read_from: str | None) -> dict[str, str]:
    """GGUF's name for each parameter. `read_from` is the architecture of the GGUF file that the adapter comes from.

    Raises: OptionError where nothing says what the base is; UnsupportedFeatureError for what GGUF has no place for
    """
    name = _namer(facts, read_from)
    architecture = facts.family.architecture if facts else read_from
    found: dict[str, str] = {}
    for module in adapter.modules:
        target = module.target
        known = not target.opaque or (is_tensor(target.parameter) and read_from == architecture is not None)
        if not known:
            raise UnsupportedFeatureError(
                f"{target}: the name could not be turned back into that of a parameter, which GGUF calls by another "
                f"one. {adapter.naming_advice}"
            )
        if module.transposed and module.kind is not Kind.EMBEDDING:
            raise UnsupportedFeatureError(f"{target}: its weight is stored (in, out), as in no model that GGUF takes")
        found[target.parameter] = target.parameter if target.opaque else name(target.parameter)
    twice = [tensor for tensor, count in Counter(found.values()).items() if count > 1]
    if twice:
        raise UnsupportedFeatureError(f"several parameters would be written as {twice[0]}.weight")
    return found


def check_models(adapter: Adapter) -> None:
    """Raises: UnsupportedFeatureError for image models, and for several"""
    for module in adapter.modules:
        target = module.target
        if target.component in _DENOISERS or module.kind is Kind.CONV or _IMAGE_NAMES.match(target.parameter):
            raise UnsupportedFeatureError(
                f"{target} is of an image model, and GGUF adapters are for language models: llama.cpp loads no other. "
                "For image models there are kohya and diffusers"
            )
    adapter.check_one_model("a GGUF file")


def _namer(facts: BaseFacts | None, read_from: str | None) -> Callable[[str], str]:
    if facts is not None:
        return tensor_namer(facts)
    family = BY_ARCHITECTURE.get(read_from or "")
    if family is not None and not family.permuted:
        return template_namer(family)

    def ask(parameter: str) -> str:
        raise OptionError(
            f"{parameter}: GGUF calls it by another name and may order its rows otherwise, which depends on the base "
            "model: give base=DIR (--base DIR), a folder with its config.json, or its address on the Hub"
        )

    return ask


def check_ends(tensors: Mapping[str, str], facts: BaseFacts) -> None:
    """Make sure that llama.cpp takes the embedding and the head.

    Raises: UnsupportedFeatureError where the base ties them
    """
    for parameter, tensor in tensors.items():
        if facts.tied and tensor in (EMBEDDING, HEAD):
            what = "stops when an adapter changes both" if tensor == EMBEDDING else "then has no tensor for the head"
            raise UnsupportedFeatureError(
                f"{parameter}: the base ties its head to its embedding, and llama.cpp {what}. Leave it out: --exclude "
                f"{parameter}"
            )


def odd_names(tensors: Mapping[str, str], facts: BaseFacts | None) -> dict[str, str]:
    """The parameters, by tensor, that reading would call otherwise if it were not noted."""
    if facts is None:
        return {}
    named = {tensor: parameter for parameter, tensor in tensors.items() if parameter != tensor}
    return {tensor: name for tensor, name in named.items() if template(tensor, facts.family) != name}
