"""target_parameters of PEFT: LoRA on bare parameters, above all on stacks of experts, in the layouts of all versions.

In the file lora_A (E·r, ·) is expert-major and lora_B (·, r·E) expert-minor. For a parameter P of shape (E, d1, d2):

    peft              lora_A, lora_B         ΔP[e]
    0.17 to 0.18.1    (E·r, d1), (d2, r·E)   s · (B_e A_e)ᵀ
    0.19.0            as 0.19.1, with the two cases exchanged
    from 0.19.1 on    (E·r, d2), (d1, r·E)   s · B_e A_e         modules not marked `is_transposed`
                      (E·r, d1), (d2, r·E)   s · (B_e A_e)ᵀ      modules marked `is_transposed`

The layout from 0.19.1 on is the plain one: lora_A takes what the expert takes. It is what the adapter model holds and
what is written. Read in `tuners/lora/layer.py` (ParamWrapper) of those versions.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from torch import Tensor

from adaptertools.dialects.peft.base import BaseModel
from adaptertools.dialects.peft.config import PeftConfig
from adaptertools.dialects.peft.keys import Group
from adaptertools.dialects.peft.modules import Reading, paired
from adaptertools.errors import ConfigError, ShapeError, UnsupportedFeatureError
from adaptertools.module import Kind, LoraModule, Target

REGISTRATION_ORDER = (
    "gate_up_proj",
    "gate_up_proj_bias",
    "gate_proj",
    "up_proj",
    "up_proj_bias",
    "down_proj",
    "down_proj_bias",
)
"""The order in which models of transformers register these, and so the order in which PEFT nests its wrappers."""

_GATED = ["gate_up_proj", "down_proj"]


class _Layout(Enum):
    PLAIN = auto()
    EXCHANGED = auto()
    BY_FIRST_AXIS = auto()
    """lora_A takes d1: plain only where the module is marked `is_transposed`"""
    UNKNOWN = auto()


def parameter_groups(groups: Sequence[Group], config: PeftConfig, base: BaseModel) -> dict[str, str]:
    """The parameter that each group of target_parameters belongs to, by the path of the group.

    Wrappers of several parameters of one module are nested: the one registered first is innermost, and its path has
    the most `base_layer` parts.

    Raises: ConfigError, UnsupportedFeatureError where that cannot be told
    """
    wanted = config.names("target_parameters")
    if not wanted:
        return {}
    nested: dict[str, list[Group]] = {}
    for group in groups:
        if not config.targets(group.module_path):
            nested.setdefault(group.module_path, []).append(group)
    found: dict[str, str] = {}
    for path, members in nested.items():
        candidates = _candidates(path, wanted)
        if not candidates:
            continue
        members.sort(key=lambda group: -group.path.count(".base_layer"))
        for group, name in zip(members, _in_order(path, members, candidates, config, base), strict=True):
            found[group.path] = f"{path}.{name}"
    return found


def _candidates(path: str, wanted: Sequence[str]) -> list[str]:
    """The names of the parameters that target_parameters may mean in this module."""
    found: dict[str, None] = {}
    for entry in wanted:
        home, _, name = entry.rpartition(".")
        if not home or path == home or path.endswith(f".{home}"):
            found[name] = None
    return list(found)


def _in_order(
    path: str, members: Sequence[Group], candidates: Sequence[str], config: PeftConfig, base: BaseModel
) -> list[str]:
    if len(candidates) == len(members) == 1:
        return list(candidates)
    by_shape = _by_shape(path, members, candidates, base)
    if by_shape is not None:
        return by_shape
    if len(candidates) == len(members) and all(name in REGISTRATION_ORDER for name in candidates):
        order = sorted(candidates, key=REGISTRATION_ORDER.index)
        return order[::-1] if order == _GATED and _is_reversed(*(_widths(group, path) for group in members)) else order
    raise UnsupportedFeatureError(
        f"{config.label}: {path} has {len(members)} pairs, target_parameters names {', '.join(candidates)} for it, and "
        "the keys do not say which pair belongs to which. The headers of the base model (--base) may tell"
    )


def _widths(group: Group, label: str) -> tuple[int, int]:
    lora_A, lora_B = paired(group, label)
    return lora_A.shape[-1], lora_B.shape[0]


def _is_reversed(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    """Whether only the outer pair can be that of gate_up_proj, which has twice the width of down_proj's other side."""
    return _gated_layout(inner, outer) is None and _gated_layout(outer, inner) is not None


def _gated_layout(gate_up: tuple[int, int], down: tuple[int, int]) -> _Layout | None:
    """How lora_A and lora_B stand if these are widths of gate_up_proj and down_proj; None if they cannot be."""
    if gate_up == (down[1], 2 * down[0]):
        return _Layout.PLAIN
    return _Layout.EXCHANGED if gate_up == (2 * down[1], down[0]) else None


def _by_shape(path: str, members: Sequence[Group], candidates: Sequence[str], base: BaseModel) -> list[str] | None:
    """The parameters by the one assignment that their shapes allow, if there is but one for each."""
    order = []
    for group in members:
        sizes = sorted(_widths(group, path))
        fits = [name for name in candidates if sorted((base.shape(f"{path}.{name}") or ())[-2:]) == sizes]
        if len(fits) != 1:
            return None
        order += fits
    return order if len(set(order)) == len(order) else None


@dataclass(frozen=True, slots=True)
class _Stack:
    """One pair as it stands in the file, and the parameter that it changes."""

    parameter: str
    lora_A: Tensor
    lora_B: Tensor
    rank: int
    experts: int
    shape: tuple[int, ...] | None
    """of the parameter, where the base model is known"""


def read_parameters(parameters: dict[str, str], groups: Mapping[str, Group], reading: Reading) -> list[LoraModule]:
    """The modules of target_parameters, those of one module from the inside out.

    Raises: UnsupportedFeatureError if the layout of experts cannot be told
    """
    stacks = [_stack(groups[path], parameter, reading) for path, parameter in parameters.items()]
    return [_read_stack(stack, stacks, reading) for stack in stacks]


def _stack(group: Group, parameter: str, reading: Reading) -> _Stack:
    config = reading.config
    extra = group.tensors.keys() - {"lora_A", "lora_B"}
    if extra:
        raise UnsupportedFeatureError(
            f"{config.label}: {parameter} is a bare parameter with {', '.join(sorted(extra))}"
        )
    lora_A, lora_B = paired(group, config.label)
    shape = reading.base.shape(parameter)
    rank = config.rank_of(parameter)
    rows = lora_A.shape[0] if lora_A.ndim == 2 else 0
    if shape is not None and rows:
        rank = rows // shape[0] if len(shape) == 3 and rows % shape[0] == 0 else rows
    if rank is None:
        raise ConfigError(f"{config.label}: no r, without which the experts of {parameter} cannot be told apart")
    if lora_A.ndim == lora_B.ndim == 2 and lora_A.numel() and lora_B.numel():
        if rows % rank or lora_B.shape[1] != rows:
            raise ShapeError(
                f"{config.label}: {parameter} has lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}, "
                f"expected (experts·{rank}, in) and (out, {rank}·experts)"
            )
        return _Stack(parameter, lora_A, lora_B, rank, rows // rank, shape)
    return _Stack(parameter, lora_A, lora_B, 1, 1, shape)


def _read_stack(stack: _Stack, stacks: Sequence[_Stack], reading: Reading) -> LoraModule:
    lora_A, lora_B = stack.lora_A, stack.lora_B
    transposed: bool | None = False
    if stack.experts > 1 or (stack.shape is not None and len(stack.shape) == 3):
        plain, marked = _settle(stack, stacks, reading)
        A = lora_A.reshape(stack.experts, stack.rank, lora_A.shape[1])
        B = lora_B.reshape(lora_B.shape[0], stack.rank, stack.experts).permute(2, 0, 1)
        lora_A, lora_B = (A, B) if plain else (B.transpose(1, 2), A.transpose(1, 2))
        transposed = marked
    return LoraModule(
        target=Target(parameter=stack.parameter.removesuffix(".weight")),
        lora_A=lora_A,
        lora_B=lora_B,
        alpha=reading.config.alpha_of(stack.parameter),
        scale_rule=reading.config.scale_rule,
        kind=Kind.PARAMETER,
        transposed=transposed,
    )


def _settle(stack: _Stack, stacks: Sequence[_Stack], reading: Reading) -> tuple[bool, bool | None]:
    """Whether the pair is in the plain layout, and whether the parameter is stored (E, in, out)."""
    layout, base = _layout(reading.config), reading.base
    marked = base.experts_are_transposed
    wide, narrow = stack.lora_A.shape[1], stack.lora_B.shape[0]
    takes_first = None
    if stack.shape is not None and len(stack.shape) == 3:
        _, first, last = stack.shape
        if sorted((first, last)) != sorted((wide, narrow)):
            raise ShapeError(
                f"{stack.parameter}: the pair is for {wide} by {narrow}, the base model's parameter is {stack.shape}"
            )
        takes_first = None if first == last else wide == first
    if takes_first is not None and marked is not None:
        return takes_first == marked, marked
    if layout is _Layout.PLAIN:
        return True, marked if takes_first is None else takes_first
    if layout is _Layout.EXCHANGED:
        return False, marked if takes_first is None else not takes_first
    if layout is _Layout.BY_FIRST_AXIS and marked is not None:
        return marked, marked
    if layout is _Layout.BY_FIRST_AXIS and _gate_takes_intermediate(stack, stacks):
        return False, False
    raise UnsupportedFeatureError(
        f"{reading.config.label}: the layout of the experts of {stack.parameter} cannot be told. PEFT "
        f"{reading.config.raw.get('peft_version') or 'before 0.18'} stored them by how the model does. "
        "Give the base model with --base"
    )


def _layout(config: PeftConfig) -> _Layout:
    """The layout of the version that wrote the file; versions before 0.18 recorded none."""
    version = config.raw.get("peft_version")
    if version is None:
        return _Layout.BY_FIRST_AXIS
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", str(version))
    if match is None:
        return _Layout.UNKNOWN
    number = tuple(int(part) for part in match.groups())
    if ".dev" in str(version) and (0, 18, 2) <= number <= (0, 19, 1):
        return _Layout.UNKNOWN  # the layout changed twice between these
    if number < (0, 19, 0):
        return _Layout.BY_FIRST_AXIS
    return _Layout.EXCHANGED if number == (0, 19, 0) else _Layout.PLAIN


def _gate_takes_intermediate(stack: _Stack, stacks: Sequence[_Stack]) -> bool:
    """Whether lora_A of gate_up_proj is as wide as gate and up together: then P is (E, out, in), and not marked."""
    home = stack.parameter.rpartition(".")[0]
    pair = {s.parameter.rpartition(".")[2]: s for s in stacks if s.parameter.rpartition(".")[0] == home}
    gate_up, down = pair.get("gate_up_proj"), pair.get("down_proj")
    if gate_up is None or down is None:
        return False
    widths = ((part.lora_A.shape[1], part.lora_B.shape[0]) for part in (gate_up, down))
    return _gated_layout(*widths) is _Layout.EXCHANGED


def registration_order(names: Sequence[str], known: Sequence[Sequence[str]], module: str) -> list[str]:
    """Parameters of one module in the order in which the model registers them.

    Raises: UnsupportedFeatureError if that is not known
    """
    for order in (*known, REGISTRATION_ORDER):
        if all(name in order for name in names):
            return sorted(names, key=list(order).index)
    if len(names) == 1:
        return list(names)
    raise UnsupportedFeatureError(
        f"PEFT nests the pairs of {', '.join(names)} of {module} in the order in which the model registers them, "
        "which is not known here. Write them in separate adapters (--only)"
    )
