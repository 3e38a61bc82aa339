"""What a loralib file leaves open about a layer: its class, adapted slots, orientation and kernel size.

Shapes tell the number n of adapted slots, rows(lora_A) / columns(lora_B), and no more: [T,F,T] and [T,T,F] look alike,
and so do an embedding and a linear layer, or a convolution and a linear layer of rank k·r. The rest comes from options,
from the shape of the base weight, or from the sidecar. The grammar of the options: formats/loralib.py.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any, Self

from torch import Tensor

from adaptertools.adapter import Kind
from adaptertools.dialects.peft.base import BaseModel
from adaptertools.errors import ConfigError, EmptyFactorError, OptionError, ShapeError
from adaptertools.names import leaf, matches

PRESETS: Mapping[str, str] = {"gpt2": "c_attn=TFT:transposed,c_proj=:transposed,c_fc=:transposed"}
"""Fused projections of known models, in the grammar of `slots`; an empty mask is a layer that is not fused."""

EMBEDDING_NAMES = ("wte", "wpe", "embed_tokens", "word_embeddings", "position_embeddings", "token_type_embeddings")
"""Names that models of transformers give to embeddings alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a layer is. `slots` has an entry for each slot of a fused weight; `kernel` is that of a convolution."""

    kind: Kind = Kind.LINEAR
    slots: tuple[bool, ...] | None = None
    transposed: bool | None = None
    kernel: int | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutOptions:
    """The options, parsed. `given` has each item as it was written, with its patterns: several for a preset."""

    slots: Mapping[str, str] = field(default_factory=dict)
    embeddings: tuple[str, ...] = ()
    convolutions: Mapping[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    given: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @classmethod
    def parse(cls, slots: str | None, embeddings: str | None, convolutions: str | None, transposed: str | None) -> Self:
        """Raises: OptionError that shows the grammar"""
        masks: dict[str, str] = {}
        turned = list(_split("transposed", transposed))
        items = _split("slots", slots)
        for item in (part for entry in items for part in PRESETS.get(entry, entry).split(",")):
            pattern, equals, mask = item.partition("=")
            mask, colon, orientation = mask.partition(":")
            if not (equals and pattern) or set(mask) - {"T", "F"} or (colon and orientation != "transposed"):
                raise OptionError(
                    f"slots {item!r}: expected PATTERN=MASK or PATTERN=MASK:transposed with a mask such as TFT, "
                    f"or one of {', '.join(PRESETS)}"
                )
            if mask and "T" not in mask:
                raise OptionError(f"slots {item!r}: no slot of the mask is adapted; T marks those that are")
            masks.setdefault(pattern, mask)
            turned += [pattern] * bool(colon)
        kernels = dict(item.partition("=")[::2] for item in _split("convolutions", convolutions))
        for pattern, kernel in kernels.items():
            if not pattern or not kernel.isdecimal() or int(kernel) < 1:
                raise OptionError(f"convolutions {pattern}={kernel}: expected PATTERN=KERNEL, such as conv=3")
        named = _split("embeddings", embeddings)
        given = [
            *((f"slots {item!r}", _patterns(PRESETS.get(item, item))) for item in items),
            *((f"embeddings {item!r}", (item,)) for item in named),
            *((f"convolutions {item!r}", (item,)) for item in kernels),
            *((f"transposed {item!r}", (item,)) for item in _split("transposed", transposed)),
        ]
        return cls(slots=masks, embeddings=named, convolutions=kernels, transposed=tuple(turned), given=tuple(given))

    def check_names(self, names: Collection[str]) -> None:
        """Whether all that was given is about some layer; for a preset one of its patterns is enough.

        Raises: OptionError that names the layers whose names come near
        """
        for item, patterns in self.given:
            if not any(matches(pattern, name) for pattern in patterns for name in names):
                near = sorted(names, key=lambda name: _likeness(patterns[0], name), reverse=True)[:3]
                raise OptionError(f"{item} fits no layer of the file; near it are {', '.join(near)}")

    def for_layer(self, name: str) -> Layout | None:
        """What the options say of a layer; None if nothing."""
        mask = next((mask for pattern, mask in self.slots.items() if matches(pattern, name)), "")
        kernel = next((int(size) for pattern, size in self.convolutions.items() if matches(pattern, name)), None)
        embedding = any(matches(pattern, name) for pattern in self.embeddings)
        transposed = any(matches(pattern, name) for pattern in self.transposed) or None
        if (bool(mask) or bool(transposed)) + (kernel is not None) + embedding > 1:
            raise OptionError(f"{name}: the options make it an embedding, a convolution or a linear layer at once")
        if embedding:
            return Layout(kind=Kind.EMBEDDING, transposed=True)
        if kernel is not None:
            return Layout(kind=Kind.CONV, kernel=kernel)
        if mask or transposed:
            return Layout(slots=tuple(letter == "T" for letter in mask) or None, transposed=transposed)
        return None


def settle(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    weights: Mapping[str, Tensor],
    options: LayoutOptions,
    recorded: Mapping[str, Layout],
    model: BaseModel,
) -> tuple[dict[str, Layout], list[str]]:
    """What each layer is: as the options say, else the sidecar, else the shape of its weight, else its name.

    Raises: OptionError, ConfigError, ShapeError, EmptyFactorError
    """
    options.check_names(pairs.keys())
    layouts: dict[str, Layout] = {}
    guessed: list[str] = []
    for name, (lora_A, lora_B) in pairs.items():
        count = adapted_slots(name, lora_A, lora_B)
        sizes = (name, lora_B.shape[0], lora_A.shape[1], count)
        shape = _weight_shape(name, weights, model)
        stated = options.for_layer(name) or recorded.get(name)
        if stated is not None:
            layouts[name] = agreeing(stated, shape, *sizes) if shape else stated
        elif shape is not None:
            has_bias = f"{name}.bias" in weights or model.shape(f"{name}.bias") is not None
            layouts[name] = layout_from_shape(shape, *sizes, has_bias=has_bias)
        elif any(key.startswith(f"{name}.conv.") for key in weights):
            raise ConfigError(
                f"{name} is a convolution, since {name}.conv lies beside its factors, and its kernel is not in the "
                f"file. Give the option convolutions={leaf(name)}=KERNEL, or a base model"
            )
        elif leaf(name) in EMBEDDING_NAMES:
            guessed.append(name)
            layouts[name] = Layout(kind=Kind.EMBEDDING, transposed=True)
        else:
            layouts[name] = Layout()
        _check_slots(name, layouts[name], count)
        if layouts[name] == Layout():  # a square weight: the model's type may still know
            layouts[name] = Layout(transposed=model.linear_is_transposed(name, sizes[1], sizes[2]))
    note = f"taken for embeddings by their names: {', '.join(guessed)}; the file does not say"
    return layouts, [note] if guessed else []


def _check_slots(name: str, layout: Layout, count: int) -> None:
    if layout.slots is None and count > 1:
        raise ConfigError(_missing_slots(name, count))
    if layout.slots is not None and sum(layout.slots) != count:
        mask = "".join("T" if slot else "F" for slot in layout.slots)
        raise ConfigError(f"{name}: the factors adapt {count} slots, the mask {mask} has {sum(layout.slots)}")


def _weight_shape(name: str, weights: Mapping[str, Tensor], model: BaseModel) -> tuple[int, ...] | None:
    for key in (f"{name}.weight", f"{name}.conv.weight"):
        if key in weights:
            return tuple(weights[key].shape)
    return model.shape(name) or model.shape(f"{name}.conv")


def adapted_slots(name: str, lora_A: Tensor, lora_B: Tensor) -> int:
    """How many slots the factors adapt: rows(lora_A) / columns(lora_B), 1 for all but fused projections.

    Raises: EmptyFactorError, ShapeError
    """
    for factor, side in ((lora_A, "lora_A"), (lora_B, "lora_B")):
        if factor.ndim < 2 or factor.numel() == 0:
            raise EmptyFactorError(
                f"{name}.{side} has shape {tuple(factor.shape)}, expected two dimensions and no zero. DeepSpeed ZeRO-3 "
                "saves such empty shards: gather the parameters before saving"
            )
        if factor.ndim > 2:
            raise ShapeError(f"{name}.{side} has shape {tuple(factor.shape)}, expected two dimensions")
    count, rest = divmod(lora_A.shape[0], lora_B.shape[1])
    if rest or lora_B.shape[0] % count:
        raise ShapeError(
            f"{name}: lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} disagree about the rank: the rows "
            "of lora_A must be the columns of lora_B, or n times as many for n slots of equal size"
        )
    return count


def layout_from_shape(
    shape: tuple[int, ...], name: str, rows: int, columns: int, adapted: int, *, has_bias: bool
) -> Layout:
    """What the base weight's shape tells of a layer with `rows` of lora_B, `columns` of lora_A and `adapted` slots.

    An embedding and a transposed linear layer have the same shape and the same ΔW; the embedding has no bias.

    Raises: ShapeError if it fits no layer; ConfigError if the slots stay open
    """
    if len(shape) == 4:
        return Layout(kind=Kind.CONV, kernel=shape[-1], shape=shape)
    slot = rows // adapted
    if len(shape) == 2:
        for n_out, n_in, transposed in ((shape[0], shape[1], False), (shape[1], shape[0], True)):
            if n_in != columns or n_out % slot or n_out < rows:
                continue
            orientation = None if shape[0] == shape[1] else transposed
            if n_out == rows:
                if transposed and adapted == 1 and not has_bias and orientation:
                    return Layout(kind=Kind.EMBEDDING, transposed=True)
                return Layout(slots=(True,) * adapted if adapted > 1 else None, transposed=orientation)
            raise ConfigError(_missing_slots(name, adapted, n_out // slot))
    raise ShapeError(
        f"{name}: lora_A has {columns} columns and lora_B {rows} rows, which fits no base weight of shape {shape}"
    )


def agreeing(layout: Layout, shape: tuple[int, ...], name: str, rows: int, columns: int, adapted: int) -> Layout:
    """A layout that was stated, with what the shape of the base weight adds to it.

    Raises: ShapeError if the two contradict each other
    """
    whole = rows // adapted * len(layout.slots) if layout.slots else rows
    matches_shape = {
        Kind.CONV: len(shape) == 4 and shape[-1] == layout.kernel,
        Kind.EMBEDDING: shape == (columns, rows),
        Kind.LINEAR: shape in ((whole, columns), (columns, whole)),
    }[layout.kind]
    turned = layout.kind is Kind.LINEAR and shape == (columns, whole) and whole != columns
    upright = layout.kind is Kind.LINEAR and shape == (whole, columns) and whole != columns
    if not matches_shape or (turned and layout.transposed is False) or (upright and layout.transposed):
        raise ShapeError(
            f"{name}: taken for {_described(layout)} with {columns} columns of lora_A and {rows} rows of lora_B, it "
            f"does not fit the base weight of shape {shape}"
        )
    if layout.kind is Kind.CONV:
        return replace(layout, shape=shape)
    return replace(layout, transposed=turned) if turned or upright else layout


def _described(layout: Layout) -> str:
    if layout.kind is Kind.CONV:
        return f"a convolution with kernel {layout.kernel}"
    fused = f" with the slots {''.join('T' if slot else 'F' for slot in layout.slots)}" if layout.slots else ""
    return f"{'a transposed linear layer' if layout.transposed else f'a layer of kind {layout.kind}'}{fused}"


def _missing_slots(name: str, adapted: int, total: int | None = None) -> str:
    """The message that asks for the slots of a fused layer."""
    of = f"of the {total} slots" if total else "slots"
    slots = total or adapted + 1
    example = "T" + "F" * (slots - adapted) + "T" * (adapted - 1)
    return (
        f"{name}: {adapted} {of} of a fused projection are adapted, and the file cannot say which. Give the slots, "
        f"such as {leaf(name)}={example} with T for each adapted one, or the preset {' or '.join(PRESETS)} (--slots)"
    )


def _split(option: str, text: Any) -> tuple[str, ...]:
    if text is not None and not isinstance(text, str):
        raise OptionError(f"{option} is {text!r:.40}, expected text; several items stand in it with commas")
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def _patterns(items: str) -> tuple[str, ...]:
    return tuple(item.partition("=")[0] for item in items.split(","))


def _likeness(pattern: str, name: str) -> float:
    return max(SequenceMatcher(None, pattern, part).ratio() for part in (name, leaf(name)))
