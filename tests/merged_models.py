"""Tiny base models as files, adapters of real PEFT on them, and what PEFT makes of both: for every test of merging."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft_cases import make_adapter, make_base, quiet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adaptertools
from adaptertools.adapter import Adapter

SHARD = "8KB"
"""So that every transformers model here has several shards."""


def save_model(model: nn.Module, folder: Path) -> Path:
    """A model as its library saves it: transformers with config and shards, plain torch as one safetensors file."""
    if hasattr(model, "save_pretrained"):
        with quiet():
            model.save_pretrained(folder, max_shard_size=SHARD)
    else:
        folder.mkdir(parents=True)
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
    return folder


def save_base(case: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The base model of a case as files."""
    return save_model(make_base(case).to(dtype), folder)


def save_adapter(case: str, folder: Path, **changes: Any) -> PeftModel:
    """The adapter of a case, saved by PEFT; the PEFT model that it comes from is handed back."""
    model = make_adapter(case, make_base(case), **changes)
    with quiet():
        model.save_pretrained(folder)
    return model


def read_adapter(folder: Path, base: Path) -> Adapter:
    """The adapter as the command line reads it, with the base's headers to settle what the file leaves open."""
    return adaptertools.read(folder, base=base)


def weights_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found = load_file(path)
        assert not tensors.keys() & found.keys()
        tensors |= found
    return tensors


def merge(base: Path, adapters: list[Adapter], dst: Path, weights: list[float] | None = None, **options: Any) -> Path:
    """Our merge, from files to files."""
    adaptertools.run_merge(adaptertools.plan_merge(base, adapters, weights, **options), dst, device="cpu", flush=False)
    return dst


def load_model(case: str, folder: Path) -> nn.Module:
    """A saved model of a case as its library loads it, every tensor claimed."""
    fresh = make_base(case)
    if hasattr(fresh, "save_pretrained"):
        loaded, info = type(fresh).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert not info["mismatched_keys"]
        return loaded.eval()
    fresh.load_state_dict(weights_in(folder))
    return fresh.eval()
