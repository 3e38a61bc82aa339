"""How large an adapter would be, from the headers of its base model alone."""

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptertools.adapter import merge_notes
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.pipeline import open_checkpoint
from adaptertools.containers.source import Located
from adaptertools.errors import OptionError, count
from adaptertools.names import matches
from adaptertools.operations.base_layers import BaseLayers, Layer, LayerKind
from adaptertools.tensors import DTYPES, dtype_name

ALL_LINEAR = "all-linear"

_DTYPES = ("f32", "f16", "bf16")
_SAVED_WHOLE = ("embed_tokens", "lm_head")
"""Targets beside whose factors PEFT saves the base weight too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetEstimate:
    """What the target modules of one name take. `width` is the sum of in + out, and so the parameters of each rank."""

    name: str
    kind: str
    modules: int
    width: int
    shapes: tuple[tuple[int, ...], ...]

    def parameters(self, rank: int) -> int:
        """The parameters of their factors at this rank."""
        return rank * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The size of an adapter at each of several ranks: by target module name, and in all.

    Units: nbytes counts the factors; a safetensors header adds some hundred bytes a module
    """

    base: str
    dtypes: tuple[str, ...]
    model_parameters: int
    ranks: tuple[int, ...]
    rows: tuple[TargetEstimate, ...]
    notes: tuple[str, ...] = ()

    @property
    def modules(self) -> int:
        """The number of target modules."""
        return sum(row.modules for row in self.rows)

    def parameters(self, rank: int) -> int:
        """The parameters of all factors at this rank."""
        return sum(row.parameters(rank) for row in self.rows)

    def share(self, parameters: int) -> float:
        """These parameters by those of the base model, its tied weights counted once."""
        return parameters / self.model_parameters

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "base": {"path": self.base, "parameters": self.model_parameters, "dtypes": list(self.dtypes)},
            "targets": [
                {
                    "name": row.name,
                    "kind": row.kind,
                    "modules": row.modules,
                    "shapes": [list(shape) for shape in row.shapes],
                    "ranks": [self._size(rank, row.parameters(rank)) for rank in self.ranks],
                }
                for row in self.rows
            ],
            "total": {
                "modules": self.modules,
                "ranks": [self._size(rank, self.parameters(rank)) for rank in self.ranks],
            },
            "notes": list(self.notes),
        }

    def _size(self, rank: int, parameters: int) -> dict[str, Any]:
        return {
            "rank": rank,
            "parameters": parameters,
            "share": self.share(parameters),
            "nbytes": {name: parameters * DTYPES[name].itemsize for name in _DTYPES},
        }


def estimate(
    base: str | Path | Located | Checkpoint, *, ranks: int | Sequence[int], targets: str | Sequence[str] = ALL_LINEAR
) -> Estimate:
    """The parameters that LoRA adds to a base model at each rank: r·(in + out) for every target module.

    `targets` are names as PEFT's target_modules: that of a module, or its last parts; globs are understood too.
    `all-linear` is every linear layer but the output head, as in PEFT. Bare parameters, such as fused experts, are in
    it no more than there; named (`experts.gate_up_proj`), they count as PEFT's target_parameters: in every expert.
    The weights count as they are stored.

    Shapes: weights (out, in) or (in, out), convolutions (out, in, k…), experts (E, out, in) or (E, in, out)
    Memory: headers only
    Raises: OptionError for a rank below 1, and for a target that matches nothing
            UnsupportedFeatureError for a base whose headers do not state the shapes, and for an adapter
    """
    wanted = _ranks(ranks)
    checkpoint = open_checkpoint(base)
    model = BaseLayers(checkpoint)
    names = [targets] if isinstance(targets, str) else list(targets)
    chosen, notes = _choose(model, names, checkpoint.label)
    stored = Counter(dtype_name(checkpoint.dtypes[name]) for name in checkpoint.shapes)
    return Estimate(
        base=checkpoint.label,
        dtypes=tuple(name for name, _ in stored.most_common()),
        model_parameters=model.parameters,
        ranks=wanted,
        rows=_rows(chosen),
        notes=(*notes, *_notes(model, chosen, wanted)),
    )


def _ranks(ranks: int | Sequence[int]) -> tuple[int, ...]:
    wanted = list(ranks) if isinstance(ranks, Iterable) else [ranks]
    for rank in wanted:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise OptionError(f"rank is {rank!r:.40}, expected a whole number from 1 on")
    if not wanted:
        raise OptionError("no rank is given, expected one or several")
    return tuple(dict.fromkeys(wanted))


def _choose(model: BaseLayers, targets: Sequence[str], label: str) -> tuple[list[Layer], tuple[str, ...]]:
    """The layers that the targets name, in the order of the file, and what to know about the choice."""
    chosen: dict[str, Layer] = {}
    notes = []
    for target in targets:
        if target.lower() == ALL_LINEAR:
            found = [layer for layer in model.layers if layer.kind is LayerKind.LINEAR]
        else:
            found, bare = _named(model, target)
            if bare and found:
                notes.append(
                    f"{target} also names {count(len(bare), 'bare parameter')}, such as {bare[0].name}, which PEFT "
                    f"adapts by target_parameters alone: they are not counted. To count them, name {bare[0].label}"
                )
            found = found or bare
        if not found and (tied := model.tied_head) is not None and matches(target, tied.name):
            found = [tied]
            notes.append(f"{tied.name} is tied to the embedding and not in the file; it counts as PEFT adapts it")
        if not found:
            raise OptionError(_nothing(model, target, label))
        chosen.update({layer.name: layer for layer in found})
    if not chosen:
        raise OptionError("no target is given, expected names of modules or all-linear")
    order = {layer.name: index for index, layer in enumerate(model.layers)}
    return sorted(chosen.values(), key=lambda layer: order.get(layer.name, len(order))), merge_notes(notes)


def _named(model: BaseLayers, target: str) -> tuple[list[Layer], list[Layer]]:
    """The modules, and the bare parameters, that a target names."""
    modules, bare = [], []
    for layer in model.layers:
        if layer.kind is not LayerKind.PARAMETER:
            if matches(target, layer.name):
                modules.append(layer)
        elif matches(target, layer.name) or matches(target, layer.name.removesuffix(".weight")):
            bare.append(layer)
    return modules, bare


def _nothing(model: BaseLayers, target: str, label: str) -> str:
    """What to say of a target that matches nothing."""
    if target.lower() == ALL_LINEAR:
        return f"{label}: all-linear finds no linear layer in it. Is it a base model?"
    labels = sorted({layer.label for layer in model.layers})
    near = difflib.get_close_matches(target, labels, n=3, cutoff=0.5)
    hint = f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(labels[:12]) or 'none'}"
    return f"{label}: the target {target!r:.80} matches no weight that LoRA can adapt; {hint}"


def _rows(layers: Sequence[Layer]) -> tuple[TargetEstimate, ...]:
    groups: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.label, layer.kind.value), []).append(layer)
    return tuple(
        TargetEstimate(
            name=name,
            kind=kind,
            modules=len(members),
            width=sum(layer.width for layer in members),
            shapes=tuple(dict.fromkeys(layer.shape for layer in members)),
        )
        for (name, kind), members in groups.items()
    )


def _notes(model: BaseLayers, chosen: Sequence[Layer], ranks: Sequence[int]) -> list[str]:
    notes = []
    for rank in ranks:
        beyond = sorted({layer.label for layer in chosen if rank > layer.full_rank})
        if beyond:
            least = min(layer.full_rank for layer in chosen)
            notes.append(
                f"rank {rank} is beyond the full rank of {', '.join(beyond)} (from {least} on): PEFT allows it, and "
                "nothing is gained"
            )
    if any(layer.is_expert for layer in chosen):
        notes.append(
            "experts and their router count as they are stored, linear layers of their own. transformers 5 joins the "
            "experts into one parameter: on some models PEFT then adapts gate and up together at twice the rank, "
            "2·r·(intermediate size) parameters more in every expert; on others all-linear leaves both out"
        )
    if any(layer.kind is LayerKind.CONV for layer in chosen):
        notes.append("convolutions count as ungrouped: headers do not say into how many groups one is divided")
    if model.classifier_parameters:
        notes.append(
            f"PEFT also trains the classification head whole: {model.classifier_parameters:,} parameters that are not "
            "counted"
        )
    saved = sorted({layer.label for layer in chosen if layer.label in _SAVED_WHOLE})
    if saved:
        notes.append(f"PEFT saves the base weight of {', '.join(saved)} beside the factors; it is not counted")
    if model.ignored:
        notes.append(
            f"{count(len(model.ignored), 'weight')} for predicting several tokens at once, such as {model.ignored[0]}: "
            "not counted, since transformers does not load that"
        )
    return notes
