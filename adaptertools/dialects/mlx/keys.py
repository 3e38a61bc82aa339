"""The keys of an MLX adapter: which tensors belong to one module."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from adaptertools.errors import UnclaimedTensorError, UnpairedFactorError, UnsupportedFeatureError

_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_a|lora_b|m)")
_FUSED = re.compile(r".+\.lora_[ab]\.\d+")


@dataclass(slots=True)
class Group:
    """The tensors of one module, by `lora_a`, `lora_b` and `m`."""

    path: str
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def lora_a(self) -> Tensor:
        return self.tensors["lora_a"]

    @property
    def lora_b(self) -> Tensor:
        return self.tensors["lora_b"]

    @property
    def magnitude(self) -> Tensor | None:
        return self.tensors.get("m")

    @property
    def is_stack(self) -> bool:
        """Whether it is of a SwitchLinear; its lora_a had two dimensions before October 2025."""
        return self.lora_b.ndim == 3


def parse(tensors: Mapping[str, Tensor], label: str) -> dict[str, Group]:
    """Every tensor of a file in the group of its module.

    Raises: UnpairedFactorError, UnclaimedTensorError; UnsupportedFeatureError for the fused projections of AFM
    """
    groups: dict[str, Group] = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            _refuse(key, label)
        else:
            groups.setdefault(found["path"], Group(found["path"])).tensors[found["part"]] = tensor
    for path, group in groups.items():
        missing = [part for part in ("lora_a", "lora_b") if part not in group.tensors]
        if len(missing) == 2:
            _refuse(f"{path}.m", label)
        if missing:
            raise UnpairedFactorError(f"{label}: {path} has no {missing[0]}, without which its other half says nothing")
    return groups


def _refuse(key: str, label: str) -> None:
    if _FUSED.fullmatch(key):
        raise UnsupportedFeatureError(
            f"{label}: {key} is a factor of one part of a fused projection, as mlx-lm has them for Apple's AFM alone; "
            "no other format has such names"
        )
    raise UnclaimedTensorError(
        f"{label}: {key} is no factor: expected names that end in .lora_a, .lora_b or, for DoRA, .m beside these. "
        "Weights that were trained whole are no LoRA"
    )
