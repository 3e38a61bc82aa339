"""Small PEFT models, and what the Flax tests read off them: the adapter, the base weights and the outputs."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax import serialization, traverse_util
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import adaptertools
from adaptertools.adapter import Adapter, Base, LoraModule, ScaleRule, Target


class Mlp(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, n_in: int = 6, hidden: int = 10, n_out: int = 4) -> None:
        super().__init__()
        self.up = nn.Linear(n_in, hidden, bias=False)
        self.down = nn.Linear(hidden, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(torch.relu(self.up(x)))
        return output


class Layers(nn.Module):
    """Two such blocks in a row, under names with a layer index."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mlp(6, 10, 6), Mlp(6, 10, 6)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def peft_model(model: nn.Module, **config: Any) -> Any:
    """A PEFT model whose lora_B is not zero, so that the adapter does something."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(**config))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return wrapped.eval()


def adapter_of(model: Any) -> Adapter:
    """The adapter of a PEFT model, read off its layers."""
    modules = []
    for name, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "lora_A") or "default" not in layer.lora_A:
            continue
        rule = ScaleRule.ALPHA_OVER_SQRT_RANK if layer.use_rslora["default"] else ScaleRule.ALPHA_OVER_RANK
        module = LoraModule(
            target=Target(parameter=name),
            lora_A=layer.lora_A["default"].weight.data.clone(),
            lora_B=layer.lora_B["default"].weight.data.clone(),
            alpha=layer.lora_alpha["default"],
            scale_rule=rule,
        )
        assert module.scaling == layer.scaling["default"]
        modules.append(module)
    return Adapter(modules=tuple(modules), bases={"": Base(id="tiny/model")})


def base_weight(model: Any, name: str) -> np.ndarray:
    """A base weight as a Flax kernel, (in, out)."""
    layer = model.base_model.model.get_submodule(name)
    weight: Tensor = getattr(layer, "base_layer", layer).weight.data
    return weight.T.contiguous().numpy()


def output(model: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        result: np.ndarray = model(torch.from_numpy(x)).numpy()
    return result


def saved(model: Any, folder: Path) -> Path:
    """The adapter as real PEFT saves it."""
    model.save_pretrained(folder)
    return folder


def inputs(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def delta(adapter: Adapter, name: str) -> np.ndarray:
    """ΔW of a module in float64, as a Flax kernel (in, out)."""
    module = next(module for module in adapter.modules if module.target.parameter == name)
    return module.delta_weight(dtype=torch.float64).T.numpy()


def modules_of(adapter: Adapter) -> dict[str, LoraModule]:
    return {str(module.target): module for module in adapter.modules}


def assert_identical(one: Adapter, other: Adapter) -> None:
    """Every factor, alpha and rule, bit for bit."""
    left, right = modules_of(one), modules_of(other)
    assert left.keys() == right.keys()
    for name, module in left.items():
        for factor in ("lora_A", "lora_B"):
            before, after = getattr(module, factor), getattr(right[name], factor)
            assert before.dtype == after.dtype, f"{name}.{factor}"
            assert torch.equal(before, after), f"{name}.{factor}"
        assert (module.alpha, module.scale_rule) == (right[name].alpha, right[name].scale_rule), name
    assert one.bases == other.bases


def write(adapter: Adapter, folder: Path, format: str = "flax", **options: Any) -> Path:
    return adaptertools.write(adapter, folder, format=format, **options).path


D, N, K, H, F = 8, 4, 2, 6, 10
"""Features, query heads, key and value heads, size of a head, hidden features."""

SIZES = {
    "self_attn.q_proj": (D, N * H),
    "self_attn.k_proj": (D, K * H),
    "self_attn.v_proj": (D, K * H),
    "self_attn.o_proj": (N * H, D),
    "mlp.gate_proj": (D, F),
    "mlp.up_proj": (D, F),
    "mlp.down_proj": (F, D),
}
"""Input and output features of every module of a decoder layer."""


def module(
    name: str, n_in: int, n_out: int, rank: int = 2, alpha: float = 4, seed: int = 0, **fields: Any
) -> LoraModule:
    generator = torch.Generator().manual_seed(seed)
    dtype = fields.pop("dtype", torch.float32)
    return LoraModule(
        target=Target(parameter=name),
        lora_A=torch.randn(rank, n_in, generator=generator).to(dtype),
        lora_B=torch.randn(n_out, rank, generator=generator).to(dtype),
        alpha=alpha,
        **fields,
    )


def decoder(layers: int = 3, prefix: str = "model.layers", **fields: Any) -> Adapter:
    modules = [
        module(f"{prefix}.{layer}.{name}", *size, seed=97 * layer + place, **fields)
        for layer in range(layers)
        for place, (name, size) in enumerate(SIZES.items())
    ]
    return Adapter(modules=tuple(modules), bases={"": Base(id="org/model", revision="abc")})


def leaves(folder: Path) -> dict[str, np.ndarray]:
    tree = serialization.msgpack_restore((folder / "flax_adapter.msgpack").read_bytes())
    return {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(tree).items()}
