"""Tiny models of diffusers, and what it makes of an adapter file: the weights that it fuses."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptertools.adapter import Adapter, Kind, LoraModule, ScaleRule, Target

Deltas = dict[str, torch.Tensor]


def unet() -> nn.Module:
    """A UNet of Stable Diffusion 1, with attention in one of its two blocks."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
    ).eval()


def flux() -> nn.Module:
    """A transformer of Flux.1: two double blocks and one single block, 16 wide."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(1)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    ).eval()


def clip() -> nn.Module:
    """The text model of CLIP, two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(2)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=6,
            projection_dim=8,
        )
    ).eval()


def pipeline(mixin: type, **models: nn.Module) -> Any:
    """What the loader mixin of a pipeline needs of one: its models, and nothing to move between devices."""

    class Pipeline(mixin):  # type: ignore[misc, valid-type]
        hf_device_map = None
        _exclude_from_cpu_offload: tuple[str, ...] = ()

        @property
        def components(self) -> dict[str, Any]:
            return models

    made = Pipeline()
    for name, model in models.items():
        setattr(made, name, model)
    return made


def weights(model: nn.Module) -> Deltas:
    """The weights of all layers by the names that they have without PEFT's wrappers."""
    found = {
        name.removesuffix(".weight").replace(".base_layer", ""): value.detach().clone()
        for name, value in model.state_dict().items()
        if name.endswith(".weight") and "lora_" not in name
    }
    return {name: value for name, value in found.items() if value.ndim > 1}


def biases(model: nn.Module) -> Deltas:
    """The biases of all layers by the names that these have without PEFT's wrappers."""
    return {
        name.removesuffix(".bias").replace(".base_layer", ""): value.detach().clone()
        for name, value in model.state_dict().items()
        if name.endswith(".bias") and "lora_" not in name
    }


def changes(before: Deltas, after: Deltas) -> Deltas:
    """What became other, and by how much."""
    assert before.keys() == after.keys()
    return {name: after[name] - value for name, value in before.items() if not torch.equal(value, after[name])}


def fused_by_model(model: nn.Module, path: Path, prefix: str | None) -> Deltas:
    """What `load_lora_adapter` and `fuse_lora` add to the weights of a model."""
    before = weights(model)
    model.load_lora_adapter(str(path.parent), weight_name=path.name, prefix=prefix)
    model.fuse_lora()
    return changes(before, weights(model))


def fused_by_pipeline(made: Any, path: Path) -> dict[str, Deltas]:
    """What `load_lora_weights` and `fuse_lora` of a pipeline add to the weights of each of its models."""
    models = made.components
    before = {name: weights(model) for name, model in models.items()}
    made.load_lora_weights(str(path.parent), weight_name=path.name)
    made.fuse_lora(components=[name for name, model in models.items() if hasattr(model, "peft_config")])
    return {name: changes(before[name], weights(model)) for name, model in models.items()}


def our_deltas(adapter: Adapter, component: str, base: Mapping[str, torch.Tensor]) -> Deltas:
    """The delta weights of one component, of DoRA on these base weights."""
    modules = [module for module in adapter.modules if module.target.component == component]
    return {
        m.target.parameter: m.delta_weight(
            base_weight=base[m.target.parameter] if m.magnitude is not None else None
        ).reshape(base[m.target.parameter].shape)
        for m in modules
    }


def assert_same(found: Deltas, expected: Deltas) -> None:
    """The same weights changed by the same amounts, and by some."""
    assert found.keys() == expected.keys()
    assert expected
    for name, delta in expected.items():
        assert float(delta.abs().max()) > 1e-3, name
        torch.testing.assert_close(
            found[name], delta, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def layer(
    name: str,
    shape: Iterable[int],
    rank: int,
    *,
    alpha: float,
    seed: int,
    component: str = "unet",
    rule: ScaleRule = ScaleRule.ALPHA_OVER_RANK,
    magnitude: bool = False,
    lora_bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LoraModule:
    """An adapted layer with a weight of this shape, whose values nobody's library made."""
    n_out, *rest = shape
    columns = 1
    for size in rest:
        columns *= size
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype) * 0.3

    return LoraModule(
        target=Target(parameter=name, component=component),
        lora_A=normal(rank, columns),
        lora_B=normal(n_out, rank),
        alpha=alpha,
        scale_rule=rule,
        kind=Kind.CONV if len(rest) > 1 else Kind.LINEAR,
        shape=(n_out, *rest) if len(rest) > 1 else None,
        magnitude=normal(n_out).abs() + 0.5 if magnitude else None,
        lora_bias=normal(n_out) if lora_bias else None,
    )


def adapter_for(model: nn.Module, component: str, wanted: Callable[[str], bool], **how: Any) -> list[LoraModule]:
    """Layers of a model adapted with ranks 2, 3 and 4 by turns and alphas of their own, unless `how` says otherwise."""
    modules = []
    for index, (name, value) in enumerate(weights(model).items()):
        if wanted(name):
            own = {"rank": (2, 4, 3)[index % 3], "alpha": (1.0, 6.0, 0.7)[index % 3], **how}
            rank = own.pop("rank")
            modules.append(layer(name, value.shape, rank, seed=index, component=component, **own))
    assert modules
    return modules
