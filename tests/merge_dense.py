"""A merge executed densely, in float64 and in the simplest words, and small base models on disk."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adaptertools.merging.edits import Edit
from adaptertools.merging.plan import MergePlan
from adaptertools.module import LoraModule, Target


def execute(plan: MergePlan) -> dict[str, Tensor]:
    """Every tensor of the result."""
    return {
        name: changed(plan, plan.edits[name]) if name in plan.edits else plan.base.tensor(name) for name in names(plan)
    }


def names(plan: MergePlan) -> list[str]:
    return [name for shard in plan.shards for name in shard.tensors]


def changed(plan: MergePlan, edit: Edit) -> Tensor:
    """One tensor: whole weight, rows, then everything that is added, all to the same weight."""
    weight = edit.replacement if edit.replacement is not None else plan.base.tensor(edit.source)
    if not weight.is_floating_point():
        return weight.clone()
    old = weight.double().reshape(edit.matrix).clone()
    for indices, rows in edit.rows:
        old[list(indices)] = rows.double()
    new = old.clone()
    for update in edit.updates:
        new[update.block] += update.scale * update.left.double() @ update.right.double()
    for each in edit.renormalizations:
        part = old[each.update.block]
        direction = part + each.update.scale * each.update.left.double() @ each.update.right.double()
        axis = 1 if each.axis == "row" else 0
        magnitude = each.magnitude.double().unsqueeze(axis)
        new[each.update.block] += each.weight * (magnitude * direction / direction.norm(dim=axis, keepdim=True) - part)
    return new.reshape(edit.shape).to(edit.dtype)


def write_base(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, shards: int = 1
) -> Path:
    """A model on disk: one file, or shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    named = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for index, (name, tensor) in enumerate(named.items()) if index % shards == number}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )
    return folder


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, the same for the same seed and shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def module(parameter: str, out: int, n_in: int, **changes: Any) -> LoraModule:
    """A linear module of rank 2 and scaling 1.5."""
    fields: dict[str, Any] = {
        "target": Target(parameter=parameter),
        "lora_A": tensor(2, n_in, seed=1),
        "lora_B": tensor(out, 2, seed=2),
        "alpha": 3.0,
    }
    return LoraModule(**{**fields, **changes})
