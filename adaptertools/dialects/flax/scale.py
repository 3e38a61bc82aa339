"""The scaling of a Flax file without a sidecar: the caller's, what was saved beside the file, or the library's rule."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaptertools.adapter import ScaleRule
from adaptertools.containers.source import Source
from adaptertools.dialects.flax.source import Found
from adaptertools.dialects.flax.tree import Dialect
from adaptertools.errors import ConfigError, MissingAlphaError

_PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Alpha and what it means. `rank` was saved along with alpha and only checked: the rank itself is the tensors'."""

    alpha: float
    rule: ScaleRule = ScaleRule.ALPHA_OVER_RANK
    rank: int | None = None
    origin: str = ""
    notes: tuple[str, ...] = ()

    def check_rank(self, key: str, rank: int) -> None:
        """Raises: ConfigError if this alpha belongs to another rank."""
        if self.rank is not None and self.rank != rank:
            raise ConfigError(
                f"{key} has rank {rank}, but {self.origin} says {self.rank}: its alpha {self.alpha} may be for another "
                "adapter. If it is right, give it with --source-alpha"
            )


def foreign_scale(source: Source, found: Found, alpha: float | None) -> Scale:
    """How a file without a sidecar is scaled.

    nnx.LoRA and gemma have no scale. qwix has alpha / rank and stores neither, except where MaxText saved them with the
    checkpoint; a hand-written Linen module may do anything.

    Raises: MissingAlphaError where nobody says
    """
    if alpha is not None:
        return Scale(alpha=alpha)
    if found.dialect in (Dialect.NNX, Dialect.GEMMA):
        return Scale(alpha=1.0, rule=ScaleRule.DIRECT, notes=_doubts(found))
    saved = _from_checkpoint(found.file.metadata, found.file.label) or _from_config(source)
    if saved is None:
        raise MissingAlphaError(
            f"{found.file.label}: the {found.dialect} dialect scales by alpha / rank and does not store alpha. Give "
            "that of the training run with --source-alpha (alpha=…); it stands in the LoraProvider or LoraRule, in "
            "MaxText's lora_alpha, or in the module's code. The rank and twice the rank are customary"
        )
    return saved


def _doubts(found: Found) -> tuple[str, ...]:
    """Lower-case names are those of nnx.LoRA, but also of many hand-written Linen modules."""
    names = list(found.file.tensors)
    of_state = any(name.endswith(("/value", "lora/lora_a", ".lora.lora_a")) for name in names)
    if found.dialect is Dialect.GEMMA or of_state:
        return ()
    return (
        "lora_a and lora_b without a sidecar are taken as those of nnx.LoRA, which has no scale. A hand-written module "
        "may scale by alpha / rank: then give --source-alpha",
    )


def _from_checkpoint(metadata: Mapping[str, str], label: str) -> Scale | None:
    """MaxText's custom metadata of an Orbax checkpoint: `lora` with lora_rank and lora_alpha."""
    if "lora" not in metadata:
        return None
    try:
        said = json.loads(metadata["lora"])
    except ValueError:
        return None
    return _scale(said, "lora_alpha", "lora_rank", f"{label}: custom_metadata.lora")


def _from_config(source: Source) -> Scale | None:
    said = source.document(_PEFT_CONFIG)
    return _scale(said, "lora_alpha", "r", f"{source.label}: {_PEFT_CONFIG}") if said is not None else None


def _scale(said: Any, alpha_key: str, rank_key: str, origin: str) -> Scale | None:
    if not isinstance(said, dict) or alpha_key not in said:
        return None
    alpha, rank = said[alpha_key], said.get(rank_key)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ConfigError(f"{origin}: {alpha_key} is {alpha!r:.80}, expected a number")
    if rank is not None and type(rank) is not int:
        raise ConfigError(f"{origin}: {rank_key} is {rank!r:.80}, expected a whole number")
    return Scale(alpha=alpha, rank=rank, origin=origin, notes=(f"alpha {alpha} is that of {origin}",))
