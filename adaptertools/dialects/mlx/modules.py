"""The modules of an MLX adapter: which are embeddings, how they stand to the base, and their scaling."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from adaptertools.dialects.mlx.config import MlxConfig
from adaptertools.dialects.mlx.experts import name_stacks, read_stack
from adaptertools.dialects.mlx.keys import Group
from adaptertools.dialects.mlx.record import Record
from adaptertools.dialects.peft.base import CONV1D_TYPES, BaseModel
from adaptertools.errors import ConfigError, OptionError
from adaptertools.module import Kind, LoraModule, Target
from adaptertools.names import leaf, matches, parent

_EMBEDDINGS = frozenset(
    {
        "embed",
        "embed_in",
        "embed_positions",
        "embed_tokens",
        "embed_tokens_per_layer",
        "embedders",
        "embedding",
        "embeddings",
        "position_embeddings",
        "shared",
        "tok_embeddings",
        "token_embedding",
        "token_embeddings",
        "word_embeddings",
        "wpe",
        "wte",
    }
)
"""What models of mlx-lm and transformers call their nn.Embedding, and no nn.Linear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """All that says how the factors of a file are meant."""

    config: MlxConfig
    record: Record
    base: BaseModel
    embeddings: tuple[str, ...]
    label: str


def named_like_embedding(path: str) -> bool:
    """Whether a module has a name that models give to embeddings: `wte`, `model.embed_tokens`, `embedders.0`."""
    name = leaf(parent(path)) if leaf(path).isdigit() else leaf(path)
    return name in _EMBEDDINGS


def read_modules(groups: Mapping[str, Group], reading: Reading) -> list[LoraModule]:
    """Every module of a file.

    Raises: ConfigError where magnitudes and configuration disagree; OptionError for a pattern that fits nothing;
            ShapeError, EmptyFactorError
    """
    _check_magnitudes(groups, reading)
    _check_patterns(groups, reading.embeddings)
    config = reading.config
    plain = [_read_module(group, reading) for group in groups.values() if not group.is_stack]
    stacks = [read_stack(g, config.alpha, config.rule, reading.label) for g in groups.values() if g.is_stack]
    return [*plain, *name_stacks(stacks, reading.record, reading.base, reading.label)]


def _check_magnitudes(groups: Mapping[str, Group], reading: Reading) -> None:
    label, held = reading.config.label, [path for path, group in groups.items() if group.magnitude is not None]
    if held and not reading.config.dora:
        raise ConfigError(
            f"{label}: {held[0]}.m is a DoRA magnitude, and the configuration says that it is no DoRA: mlx-lm refuses "
            'the file, earlier versions left the magnitude out. Say "fine_tune_type": "dora" there if it is one'
        )
    lacking = [path for path, group in groups.items() if group.magnitude is None]
    if reading.config.dora and lacking:
        raise ConfigError(
            f"{label}: the configuration says DoRA, and {lacking[0]} has no magnitude (.m). mlx-lm would take that of "
            "the base weights. The file is not whole"
        )


def _check_patterns(groups: Iterable[str], patterns: Iterable[str]) -> None:
    names = list(groups)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise OptionError(f"embeddings: {pattern} fits no module; there are {', '.join(names[:3])}")


def _read_module(group: Group, reading: Reading) -> LoraModule:
    lora_a, lora_b = _without_padding(group, reading)
    embedding = lora_a.ndim == lora_b.ndim == 2 and _is_embedding(group, reading)
    return LoraModule(
        target=Target(parameter=reading.record.names.get(group.path, group.path)),
        lora_A=lora_a.mT if lora_a.ndim == 2 else lora_a,
        lora_B=lora_b.mT if lora_b.ndim == 2 else lora_b,
        alpha=reading.config.alpha,
        scale_rule=reading.config.rule,
        kind=Kind.EMBEDDING if embedding else Kind.LINEAR,
        transposed=True if embedding else reading.base.linear_is_transposed(group.path, *_sizes(group)),
        magnitude=group.magnitude,
        magnitude_axis="in" if embedding else "out",
    )


def _without_padding(group: Group, reading: Reading) -> tuple[Tensor, Tensor]:
    """The factors without the zeros that our own writer added to reach the rank of the file."""
    rank = reading.record.ranks.get(group.path)
    if rank is None:
        return group.lora_a, group.lora_b
    lora_a, lora_b = group.lora_a, group.lora_b
    if not lora_a.ndim == lora_b.ndim == 2 or rank > min(lora_a.shape[1], lora_b.shape[0]):
        raise ConfigError(f"{reading.label}: the header says rank {rank} for {group.path}, more than it has")
    return lora_a[:, :rank], lora_b[:rank]


def _sizes(group: Group) -> tuple[int, int]:
    """Output and input features; of what is no pair of matrices, any numbers."""
    return (group.lora_b.shape[-1] if group.lora_b.ndim else 0, group.lora_a.shape[0] if group.lora_a.ndim else 0)


def _is_embedding(group: Group, reading: Reading) -> bool:
    """The pair of an nn.Embedding looks like that of an nn.Linear: lora_a (V, r) and lora_b (r, d).

    What counts, the first first: the option, our own record, the base's shape, the length of a magnitude, the name.
    """
    if any(matches(pattern, group.path) for pattern in reading.embeddings):
        return True
    if reading.record.embeddings is not None:
        return group.path in reading.record.embeddings
    (out, n_in), named = _sizes(group), named_like_embedding(group.path)
    shape = reading.base.shape(group.path)
    if shape in ((out, n_in), (n_in, out)) and out != n_in:
        turned = shape == (n_in, out)
        return turned and (named or not reading.base.model_types.intersection(CONV1D_TYPES))
    if group.magnitude is not None and out != n_in and group.magnitude.shape in ((out,), (n_in,)):
        return group.magnitude.shape == (n_in,)
    return named
