"""Tiny models of the real LitGPT with adapters, saved as its finetuning saves them, and the weights that it merges."""

from pathlib import Path
from typing import Any

import torch
import yaml
from litgpt.lora import GPT, Config, lora_filter, merge_lora_weights
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from litgpt.utils import save_config

SMALL: dict[str, Any] = {"n_layer": 2, "n_embd": 24, "block_size": 16, "vocab_size": 40, "padded_vocab_size": 48}
ALL = {"query": True, "key": True, "value": True, "projection": True, "mlp": True, "head": True}


def config(name: str, *, r: int = 2, alpha: float = 6, targets: dict[str, bool] = ALL, **sizes: Any) -> Config:
    """The configuration of a model with LoRA, as LitGPT names it, in a tiny size."""
    lora = {f"lora_{target}": on for target, on in targets.items()}
    return Config.from_name(name, **{**SMALL, **sizes}, lora_r=r, lora_alpha=alpha, **lora)


def trained(made: Config, seed: int = 0) -> GPT:
    """A model whose factors are all other than zero, on base weights of zeros: merging gives ΔW and no rounding."""
    model = GPT(made)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(values if lora_filter(name, parameter) else torch.zeros_like(parameter))
    return model


def save(model: GPT, folder: Path, *, wrapped: bool = True) -> Path:
    """The folder `final` of a run: the factors, the arguments of the run, and the model's configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    factors = {name: tensor for name, tensor in model.state_dict().items() if lora_filter(name, tensor)}
    torch.save({"model": factors} if wrapped else factors, folder / "lit_model.pth.lora")
    made = model.config
    run = {key: getattr(made, key) for key in vars(made) if key.startswith("lora_")}
    run |= {"checkpoint_dir": f"checkpoints/{made.name}", "precision": None, "train": {"epochs": 1}}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(run))
    save_base_config(made, folder)
    return folder


def save_base_config(made: Config, folder: Path) -> None:
    """model_config.yaml as LitGPT keeps it beside base weights, without the arguments of LoRA."""
    save_config(made, folder)
    document = yaml.safe_load((folder / "model_config.yaml").read_text())
    kept = {key: value for key, value in document.items() if not key.startswith("lora_")}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(kept))


def merged(model: GPT) -> dict[str, torch.Tensor]:
    """What LitGPT merges into the weights of zeros, by its own names. The model is spent afterwards."""
    merge_lora_weights(model)
    weights = {name.replace("linear.", ""): tensor for name, tensor in model.state_dict().items()}
    return {name: tensor.clone() for name, tensor in weights.items() if not lora_filter(name, tensor)}


def in_hugging_face(weights: dict[str, torch.Tensor], made: Config, scratch: Path) -> dict[str, torch.Tensor]:
    """The weights under Hugging Face's names, as LitGPT's own conversion gives them.

    Without those of norms: none is adapted, and the conversion stumbles over one of OLMo 2.
    """
    scratch.mkdir(parents=True)
    torch.save({name: weight for name, weight in weights.items() if "norm" not in name}, scratch / "lit_model.pth")
    save_base_config(made, scratch)
    convert_lit_checkpoint(scratch, scratch / "hf")
    return torch.load(scratch / "hf" / "model.pth", weights_only=True)
