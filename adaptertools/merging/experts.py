"""Experts that an adapter holds one way and the base another: one tensor for all, or one for each.

transformers 5 fuses the experts of Mixtral and Qwen-MoE in memory and saves them one by one. A fused gate_up_proj has
the rows of the gate first, then those of up; models that interleave the two (gpt-oss) are never stored one by one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.errors import MatchError, ShapeError, UnsupportedFeatureError
from adaptertools.merging.match import Names, expert_of
from adaptertools.merging.place import Change, Orientation, Source, misfit, renormalized, stack_matrix, updated
from adaptertools.module import LoraModule
from adaptertools.names import leaf

_GATE_UP = "gate_up_proj"
_HALVES = ("gate_proj", "up_proj")
_INTERLEAVED = ("gpt_oss", "openai_privacy_filter")


class Experts:
    """The experts of a base model, for modules that find no tensor of their own name."""

    def __init__(self, names: Names, base: Checkpoint, orientation: Orientation) -> None:
        self._names, self._shapes, self._orientation = names, base.shapes, orientation
        text = base.config.get("text_config")
        kinds = {part.get("model_type") for part in (base.config, text) if isinstance(part, Mapping)}
        self._interleaved = not kinds.isdisjoint(_INTERLEAVED)

    def changes(self, module: LoraModule, source: Source) -> Iterator[Change] | None:
        """What a module changes, if it is one of all experts or of one, and the base has the other; else None.

        Raises: MatchError, ShapeError, UnsupportedFeatureError
        """
        parameter = module.target.parameter
        if module.experts is not None:
            parts = _HALVES if leaf(parameter) == _GATE_UP else (leaf(parameter),)
            home = parameter.rpartition(".")[0]
            found = [[self._names.find(f"{home}.{e}.{part}") for part in parts] for e in range(module.experts)]
            if not any(any(row) for row in found):
                return None
            missing = next((f"{home}.{e}" for e, row in enumerate(found) if not all(row)), None)
            more = self._names.find(f"{home}.{module.experts}.{parts[0]}")
            if missing or more:
                raise MatchError(
                    f"{module.target}: a stack of {module.experts} experts; "
                    + (f"the base has no {missing}" if missing else f"the base has more, such as {more}")
                )
            return self._split(module, source, [[name or "" for name in row] for row in found])
        expert = expert_of(parameter)
        if expert is None:
            return None
        home, number, part = expert
        whole = self._names.find(f"{home}.{part}")
        fused = self._names.find(f"{home}.{_GATE_UP}") if part in _HALVES else None
        if whole is not None:
            return self._joined(module, source, whole, number, None)
        return self._joined(module, source, fused, number, _HALVES.index(part)) if fused is not None else None

    def _split(self, module: LoraModule, source: Source, names: list[list[str]]) -> Iterator[Change]:
        """A stack over the tensors of its experts."""
        for expert, row in enumerate(names):
            shapes = [self._shapes[name] for name in row]
            out, width = sum(shape[0] for shape in shapes), shapes[0][-1]
            if any(len(shape) != 2 or shape[1] != width for shape in shapes):
                raise misfit(module, row[0], shapes[0])
            sizes = (module.out_features, module.in_features)
            if (out, width) not in (sizes, sizes[::-1]):
                raise ShapeError(
                    f"{module.target}: for experts of {sizes[0]} by {sizes[1]}, the base has {' and '.join(row)} of "
                    f"{' and '.join(map(str, shapes))}"
                )
            yield from self._pieces(module, source, expert, row, [shape[0] for shape in shapes], (out, width) != sizes)

    def _pieces(
        self, module: LoraModule, source: Source, expert: int, names: list[str], heights: list[int], turned: bool
    ) -> Iterator[Change]:
        """The rows of one expert's product over its tensors, from above."""
        update = updated(module, source, transposed=turned, expert=expert)
        start = 0
        for name, height in zip(names, heights, strict=True):
            piece = replace(update, left=update.left[start : start + height])
            yield Change(name=name, matrix=(height, update.right.shape[1]), change=piece)
            start += height

    def _joined(self, module: LoraModule, source: Source, name: str, number: int, half: int | None) -> Iterator[Change]:
        """One expert's module in the tensor of all; `half` says which half of gate_up_proj it is."""
        shape = self._shapes[name]
        if half is not None and self._interleaved:
            raise UnsupportedFeatureError(
                f"{module.target}: {name} interleaves gate and up, and a module of one of them is no block of it"
            )
        if module.lora_bias is not None:
            raise UnsupportedFeatureError(f"{module.target}: its lora_bias has no place in {name}, the experts' weight")
        parts = 1 if half is None else 2
        out = module.out_features * parts
        if len(shape) != 3 or number >= shape[0]:
            raise misfit(module, name, shape)
        transposed = self._orientation.of_experts(module, name, shape[1:], (out, module.in_features), None)
        first = (half or 0) * module.out_features
        row, column = (0, first) if transposed else (first, 0)
        update = updated(module, source, transposed=transposed, row=number * shape[1] + row, column=column)
        yield Change(
            name=name, matrix=stack_matrix(shape), change=renormalized(update, module, source, transposed=transposed)
        )
