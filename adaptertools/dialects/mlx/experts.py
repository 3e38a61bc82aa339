"""Experts: mlx-lm holds all of a layer in one SwitchLinear, models of transformers one by one or in other stacks.

    mlx-lm                                  transformers
    X.switch_mlp.gate_proj | up_proj        X.experts.E.gate_proj | up_proj, or w1 | w3 in Mixtral's words
    X.switch_mlp.down_proj                  X.experts.E.down_proj, or w2
    X.switch_mlp.gate_proj and .up_proj     rows of X.experts.gate_up_proj (E, 2·out, in), gate first
    X.switch_mlp.down_proj                  X.experts.down_proj (E, out, in)
    X.switch_mlp.fc1 | fc2                  X.experts.E.up_proj | down_proj in Nemotron-H

A few models of mlx-lm call the stack `experts` instead. Which names a model has, only its checkpoint can tell; where
none is given, a stack keeps the name that it has here, as one that could not be turned back.

Source: `sanitize` of the models in ml-explore/mlx-lm 0.32.2; for stacks those of qwen3_vl_moe and qwen3_5_moe
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from adaptertools.dialects.mlx.keys import Group
from adaptertools.dialects.mlx.record import Experts, Record
from adaptertools.dialects.peft.base import TRANSPOSED_EXPERT_TYPES, BaseModel
from adaptertools.errors import ConfigError, ShapeError
from adaptertools.module import Kind, LoraModule, RowSlice, ScaleRule, Target
from adaptertools.names import leaf, parent

STACK = "switch_mlp"
EXPERTS = "experts"
GATE_UP = "gate_up_proj"

_WORDS = {
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "w3"),
    "down_proj": ("down_proj", "w2"),
    "fc1": ("up_proj",),
    "fc2": ("down_proj",),
}
"""What the parts of an expert are called elsewhere."""


def read_stack(group: Group, alpha: float, rule: ScaleRule, label: str) -> LoraModule:
    """One SwitchLinear, under the name that it has in mlx-lm.

    Shapes: lora_a (E, r, in), before October 2025 (E·r, in); lora_b (E, out, r)
    """
    lora_A, lora_B = group.lora_a, group.lora_b
    if lora_A.ndim == 2 and lora_B.numel():
        experts, _, rank = lora_B.shape
        if lora_A.shape[0] != experts * rank:
            raise ShapeError(
                f"{label}: {group.path} has lora_a {tuple(lora_A.shape)} and lora_b {tuple(lora_B.shape)}, expected "
                f"({experts}·{rank}, in) for {experts} experts"
            )
        lora_A = lora_A.reshape(experts, rank, lora_A.shape[1])
    if group.magnitude is not None:
        raise ShapeError(f"{label}: {group.path} is a stack of experts with a magnitude, which mlx-lm does not have")
    return LoraModule(
        target=Target(parameter=group.path, opaque=True),
        lora_A=lora_A,
        lora_B=lora_B,
        alpha=alpha,
        scale_rule=rule,
        kind=Kind.PARAMETER,
        transposed=False,
    )


def name_stacks(stacks: Sequence[LoraModule], record: Record, base: BaseModel, label: str) -> Iterator[LoraModule]:
    """The stacks under the names that they were written from, else those of the base model, else their own.

    Memory: the two halves of a gate_up_proj that our own file holds apart are joined
    Raises: ConfigError if the file's record does not fit its stacks
    """
    by_path = {stack.target.parameter: _without_padding(stack, record, label) for stack in stacks}
    for parameter, (gate, up) in record.gate_up.items():
        if gate not in by_path or up not in by_path:
            raise ConfigError(f"{label}: the header says that {gate} and {up} are halves, and one is not there")
        yield _joined(parameter, by_path.pop(gate), by_path.pop(up))
    for path, stack in by_path.items():
        if path in record.experts:
            yield from _apart(stack, record.experts[path], label)
        elif path in record.names:
            yield replace(stack, target=Target(parameter=record.names[path]))
        else:
            yield from _as_in(base, stack)


def _without_padding(stack: LoraModule, record: Record, label: str) -> LoraModule:
    rank = record.ranks.get(stack.target.parameter, stack.rank)
    if rank > stack.rank:
        raise ConfigError(f"{label}: the header says rank {rank} for {stack.target}, more than it has")
    return replace(stack, lora_A=stack.lora_A[:, :rank], lora_B=stack.lora_B[:, :, :rank])


def _joined(parameter: str, gate: LoraModule, up: LoraModule) -> LoraModule:
    lora_B = torch.cat([gate.lora_B, up.lora_B], dim=-2)
    return replace(gate, target=Target(parameter=parameter), lora_B=lora_B)


def _apart(stack: LoraModule, experts: Experts, label: str) -> Iterator[LoraModule]:
    if len(experts.ranks) != stack.experts or max(experts.ranks) > stack.rank:
        raise ConfigError(f"{label}: the header does not fit {stack.target}, which has {stack.experts} experts")
    for expert, rank in enumerate(experts.ranks):
        if rank:
            yield _one(stack, expert, experts.name(expert), rank)


def _one(stack: LoraModule, expert: int, name: str, rank: int) -> LoraModule:
    return LoraModule(
        target=Target(parameter=name),
        lora_A=stack.lora_A[expert, :rank],
        lora_B=stack.lora_B[expert, :, :rank],
        alpha=stack.alpha,
        scale_rule=stack.scale_rule,
    )


def _as_in(base: BaseModel, stack: LoraModule) -> Iterator[LoraModule]:
    """A stack as the base model holds its experts; under its own name where that holds none by a name known here."""
    path, matrix = stack.target.parameter, (stack.out_features, stack.in_features)
    home, part = parent(parent(path)), leaf(path)
    experts = f"{home}.{EXPERTS}"
    words = _WORDS.get(part, ()) if leaf(parent(path)) in (STACK, EXPERTS) else ()
    whole = _find(base, path) or next((name for word in words if (name := _find(base, f"{experts}.{word}"))), None)
    if whole is not None and base.shape(whole) == (stack.experts, *matrix):
        yield replace(stack, target=Target(parameter=whole))
        return
    word = next((word for word in words if base.shape(f"{experts}.0.{word}") == matrix), None)
    if word is not None and stack.experts is not None and base.shape(f"{experts}.{stack.experts}.{word}") is None:
        names = [f"{experts}.{expert}.{word}" for expert in range(stack.experts)]
        if all(base.shape(name) == matrix for name in names):
            yield from (_one(stack, expert, name, stack.rank) for expert, name in enumerate(names))
            return
    rows = _rows_of_gate_up(base, f"{experts}.{GATE_UP}", stack, part)
    yield replace(stack, target=rows) if rows else stack


def _find(base: BaseModel, name: str) -> str | None:
    return name if base.shape(name) is not None else None


def _rows_of_gate_up(base: BaseModel, fused: str, stack: LoraModule, part: str) -> Target | None:
    out = stack.out_features
    if base.shape(fused) != (stack.experts, 2 * out, stack.in_features) or part not in ("gate_proj", "up_proj"):
        return None
    if base.model_types.intersection(TRANSPOSED_EXPERT_TYPES):
        return None
    start = out if part == "up_proj" else 0
    return Target(parameter=fused, rows=RowSlice(start=start, stop=start + out, total=2 * out))


def part_of(word: str) -> str:
    """What mlx-lm calls a part of an expert.

    >>> part_of("w1"), part_of("down_proj")
    ('gate_proj', 'down_proj')
    """
    return next((part for part, words in _WORDS.items() if word in words), word)
