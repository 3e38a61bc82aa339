"""LyCORIS's own modules on tiny layers: what they save, and the weight that their forward pass applies."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

PREFIX = "lora_unet_"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A module of LyCORIS on one layer of a model."""

    method: str
    """`locon`, `loha` or `lokr`"""
    sizes: tuple[int, int]
    kernel: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int
    """That of the LoRA that it is."""


# The alpha of rsLoRA is saved in float32: at a rank whose root is whole that is exact.
CASES: Mapping[str, Case] = {
    "locon.linear": Case(method="locon", sizes=(10, 6), rank=3),
    "locon.conv": Case(method="locon", sizes=(6, 4), kernel=3, rank=3),
    "locon.conv_1x1": Case(method="locon", sizes=(6, 4), kernel=1, rank=3),
    "locon.tucker": Case(method="locon", sizes=(6, 4), kernel=3, options={"use_tucker": True}, rank=3),
    "locon.rs": Case(method="locon", sizes=(10, 6), options={"rs_lora": True, "lora_dim": 4}, rank=4),
    "locon.dora": Case(method="locon", sizes=(10, 6), options={"weight_decompose": True}, rank=3),
    "locon.dora_square_in": Case(
        method="locon", sizes=(6, 6), options={"weight_decompose": True, "wd_on_out": False}, rank=3
    ),
    "locon.dora_conv": Case(method="locon", sizes=(6, 4), kernel=3, options={"weight_decompose": True}, rank=3),
    "loha.linear": Case(method="loha", sizes=(12, 10), rank=9),
    "loha.high_rank": Case(method="loha", sizes=(8, 6), rank=6),
    "loha.conv": Case(method="loha", sizes=(12, 4), kernel=3, rank=9),
    "loha.tucker": Case(method="loha", sizes=(12, 4), kernel=3, options={"use_tucker": True}, rank=9),
    "loha.rs": Case(method="loha", sizes=(20, 18), options={"rs_lora": True, "lora_dim": 4}, rank=16),
    "loha.dora": Case(method="loha", sizes=(12, 10), options={"weight_decompose": True}, rank=9),
    "lokr.whole_w1": Case(method="lokr", sizes=(24, 24), options={"factor": 3, "lora_dim": 2}, rank=6),
    "lokr.both_factored": Case(
        method="lokr", sizes=(48, 48), options={"factor": 6, "lora_dim": 2, "decompose_both": True}, rank=4
    ),
    "lokr.whole": Case(method="lokr", sizes=(12, 8), options={"full_matrix": True}, rank=8),
    "lokr.unbalanced": Case(
        method="lokr", sizes=(24, 12), options={"factor": 2, "lora_dim": 1, "unbalanced_factorization": True}, rank=2
    ),
    "lokr.conv": Case(method="lokr", sizes=(12, 12), kernel=3, options={"factor": 2, "lora_dim": 2}, rank=4),
    "lokr.tucker": Case(
        method="lokr", sizes=(12, 12), kernel=3, options={"factor": 2, "lora_dim": 2, "use_tucker": True}, rank=4
    ),
    "lokr.whole_conv": Case(method="lokr", sizes=(8, 4), kernel=3, options={"full_matrix": True}, rank=8),
    "lokr.rs": Case(method="lokr", sizes=(36, 36), options={"factor": 3, "lora_dim": 4, "rs_lora": True}, rank=12),
    "lokr.dora": Case(
        method="lokr", sizes=(24, 24), options={"factor": 3, "lora_dim": 2, "weight_decompose": True}, rank=6
    ),
}


def built(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The layer of a case, and LyCORIS's module on it, with values as after training."""
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    case = CASES[name]
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    n_out, n_in = case.sizes
    layer = nn.Conv2d(n_in, n_out, case.kernel, bias=False) if case.kernel else nn.Linear(n_in, n_out, bias=False)
    layer = layer.to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, dtype=dtype) * 0.1)
    make = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}[case.method]
    module = make(f"{PREFIX}x", layer, 1.0, **{"lora_dim": 3, "alpha": 1.5, **case.options}).to(dtype).eval()
    with torch.no_grad():
        for part, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            parameter.copy_(parameter * (1 + 0.1 * noise) if part == "dora_scale" else noise * 0.5)
    return layer, module


def saved(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """What LyCORIS saves of the module, under the flat name of the case."""
    flat = PREFIX + name.replace(".", "_")
    return {f"{flat}.{part}": tensor.detach().clone().contiguous() for part, tensor in module.state_dict().items()}


@torch.no_grad()
def applied(layer: nn.Module, module: nn.Module) -> torch.Tensor:
    """What the module's forward pass adds to the layer's weight: its answers to unit inputs, less the weight."""
    weight = layer.weight
    units = torch.eye(weight[0].numel(), dtype=weight.dtype).reshape(-1, *weight.shape[1:])
    answers = module(units)
    return answers.flatten(1).T.reshape(weight.shape) - weight
