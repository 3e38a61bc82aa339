"""mlx-lm as the judge: models of its own with the weights of transformers, what they compute, and what fusing adds."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from transformers import PreTrainedModel

mx.set_default_device(mx.cpu)

IDS = [[3, 17, 41, 8, 25, 60, 2]]


def mlx_model(reference: PreTrainedModel, folder: Path, strip: str = "") -> nn.Module:
    """The model of mlx-lm with the weights that transformers saves; `strip` is what older files have not in front."""
    reference.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    architecture = import_module(f"mlx_lm.models.{config['model_type']}")
    config |= config.pop("rope_parameters", None) or {}
    if "num_local_experts" in config:  # transformers 5 renamed it, and wrote num_experts before
        config["num_experts"] = config["num_local_experts"]
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    saved = mx.load(str(folder / "model.safetensors"))
    weights = model.sanitize({name.removeprefix(strip): value for name, value in saved.items()})
    model.load_weights(list(weights.items()), strict=True)
    model.eval()
    return model


def logits(model: nn.Module) -> np.ndarray:
    """What the model of mlx-lm computes."""
    return np.array(model(mx.array(IDS)).astype(mx.float32))


def with_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapter in a folder, loaded as mlx-lm loads it."""
    load_adapters(model, str(folder))
    model.eval()
    return model


def fuse(model: nn.Module) -> nn.Module:
    """What `mlx_lm.fuse` does to a model."""
    fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    assert fused
    model.update_modules(tree_unflatten(fused))
    return model


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights by name."""
    return {name: as_torch(value) for name, value in tree_flatten(model.parameters())}


def as_torch(value: mx.array) -> torch.Tensor:
    """A copy in float32."""
    return torch.from_numpy(np.array(value.astype(mx.float32)))


def train(model: nn.Module, folder: Path, *, num_layers: int, dora: bool = False, **parameters: Any) -> nn.Module:
    """Make layers of mlx-lm's tuner, give them values, and save as its trainer does."""
    config = {"rank": 4, "scale": 3.0, "dropout": 0.0, **parameters}
    model.freeze()
    linear_to_lora_layers(model, num_layers, config, use_dora=dora)
    randomise(model)
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    arguments = {
        "model": "org/tiny",
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": num_layers,
        "lora_parameters": config,
        "iters": 10,
    }
    (folder / "adapter_config.json").write_text(json.dumps(arguments))
    return model


def randomise(model: nn.Module) -> None:
    """Factors as after training: lora_b starts at zero, a magnitude at the norm."""
    mx.random.seed(0)
    drawn = []
    for name, value in tree_flatten(model.trainable_parameters()):
        noise = mx.random.normal(value.shape).astype(value.dtype)
        drawn.append((name, value * (1 + 0.1 * noise) if name.endswith(".m") else 0.3 * noise))
    model.update(tree_unflatten(drawn))


def added_by_fusing(model: nn.Module, before: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What fusing adds to each weight that it changes, by the name of its module."""
    after = weights_of(fuse(model))
    changed = {name.removesuffix(".weight"): after[name] - before[name] for name in before}
    return {name: delta for name, delta in changed.items() if bool(delta.any())}
