"""Where the modules of an adapter stand in a GGUF file of its base, and whether llama.cpp would take them there."""

from collections import Counter
from collections.abc import Callable, Mapping

from adaptertools.adapter import Adapter, Kind
from adaptertools.dialects.gguf.base import BaseFacts
from adaptertools.dialects.gguf.families import BY_ARCHITECTURE, EMBEDDING, HEAD, PERMUTED_TENSORS
from adaptertools.dialects.gguf.names import by_tensor, is_tensor, kind_of, template, template_namer, tensor_namer
from adaptertools.dialects.gguf.rows import check_heads
from adaptertools.dialects.peft.base import Checkpoint
from adaptertools.errors import MatchError, OptionError, ShapeError, UnsupportedFeatureError


def tensor_names(adapter: Adapter, facts: BaseFacts | None, read_from: str | None) -> dict[str, str]:
    """GGUF's name for each parameter. `read_from` is the architecture of the GGUF file that the adapter comes from.

    Raises: OptionError where nothing says what the base is; UnsupportedFeatureError for what GGUF has no place for
    """
    name = _namer(facts, read_from)
    architecture = facts.family.architecture if facts else read_from
    found: dict[str, str] = {}
    if len({module.target.component for module in adapter.modules}) > 1:
        raise UnsupportedFeatureError(
            "the adapter is for several models, and GGUF for one. Write each with --only 'COMPONENT:*'"
        )
    for module in adapter.modules:
        target = module.target
        known = not target.opaque or (is_tensor(target.parameter) and read_from == architecture is not None)
        if not known:
            raise UnsupportedFeatureError(
                f"{target}: the name could not be turned back into that of a parameter, which GGUF calls by another "
                "one. Read the adapter with --base"
            )
        if module.transposed and module.kind is not Kind.EMBEDDING:
            raise UnsupportedFeatureError(f"{target}: its weight is stored (in, out), as in no model that GGUF takes")
        found[target.parameter] = target.parameter if target.opaque else name(target.parameter)
    twice = [tensor for tensor, count in Counter(found.values()).items() if count > 1]
    if twice:
        raise UnsupportedFeatureError(f"several parameters would be written as {twice[0]}.weight")
    return found


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


def check_fit(adapter: Adapter, tensors: Mapping[str, str], facts: BaseFacts, base: Checkpoint | None) -> None:
    """Make sure that llama.cpp would take every module with this base.

    Raises: UnsupportedFeatureError, MatchError, ShapeError
    """
    shapes = base.shapes if base is not None else {}
    known = by_tensor(facts.family, shapes, tensors.values())
    for module in adapter.modules:
        parameter, tensor = module.target.parameter, tensors[module.target.parameter]
        if facts.tied and tensor in (EMBEDDING, HEAD):
            what = "stops when an adapter changes both" if tensor == EMBEDDING else "then has no tensor for the head"
            raise UnsupportedFeatureError(
                f"{parameter}: the base ties its head to its embedding, and llama.cpp {what}. Leave it out: --exclude "
                f"{parameter}"
            )
        heads = None if module.target.opaque else heads_of(tensor, facts)
        if heads is not None:
            check_heads(parameter, module.out_features, heads)
        if shapes and tensor not in known:
            raise MatchError(f"{parameter}: the base model has no such parameter. Is it the right base model?")
        found = tuple(shapes[f"{known[tensor]}.weight"]) if shapes else module.weight_shape
        if found != module.weight_shape:
            raise ShapeError(f"{parameter}: the base has it in shape {found}, the adapter is for {module.weight_shape}")


def heads_of(tensor: str, facts: BaseFacts | None) -> int | None:
    """By how many heads the rows of a tensor are in another order; None where they are not."""
    if facts is None or not facts.family.permuted or kind_of(tensor) not in PERMUTED_TENSORS:
        return None
    return facts.heads if kind_of(tensor) == "attn_q" else facts.kv_heads


def odd_names(tensors: Mapping[str, str], facts: BaseFacts | None) -> dict[str, str]:
    """The parameters, by tensor, that reading would call otherwise if it were not noted."""
    if facts is None:
        return {}
    named = {tensor: parameter for parameter, tensor in tensors.items() if parameter != tensor}
    return {tensor: name for tensor, name in named.items() if template(tensor, facts.family) != name}
