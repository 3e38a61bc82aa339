"""diffusers as the judge: it loads kohya files that we write, and fuses into its weights what our delta weights are.

LyCORIS's network for sd-scripts names and saves modules of a whole model, which we read.
"""

import warnings
from pathlib import Path

import pytest
import torch
from diffusion_models import save_pipeline, text_encoder, unet
from safetensors.torch import load_file
from torch import nn

import adaptertools
from adaptertools.adapter import Adapter, Kind, LoraModule, Target

pytestmark = [
    pytest.mark.consumers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning"),
]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that may be adapted, without LoRA around them."""
    named = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    return {
        name.removesuffix(".weight"): value.detach().clone()
        for name, value in named.items()
        if name.endswith(".weight") and value.ndim > 1 and "lora_" not in name and not name.startswith("embeddings.")
    }


def adapter_for(component: str, model: nn.Module, alphas: tuple[float, ...]) -> Adapter:
    """LoRA of ranks 2 to 4 on every linear layer and convolution, with these alphas in turn."""
    generator = torch.Generator().manual_seed(7)
    modules = []
    for index, (name, weight) in enumerate(weights(model).items()):
        rank = 2 + index % 3
        is_conv = weight.ndim == 4
        modules.append(
            LoraModule(
                target=Target(parameter=name, component=component),
                lora_A=torch.randn(rank, weight[0].numel(), generator=generator) * 0.2,
                lora_B=torch.randn(weight.shape[0], rank, generator=generator) * 0.2,
                alpha=alphas[index % len(alphas)],
                kind=Kind.CONV if is_conv else Kind.LINEAR,
                shape=tuple(weight.shape) if is_conv else None,
            )
        )
    return Adapter(modules=tuple(modules))


def fused_by_diffusers(path: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """What diffusers makes of the UNet's weights with the file."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(path), unet_config=model.config)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, model)
    model.fuse_lora()
    return weights(model)


def errors(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], adapter: Adapter) -> dict[str, float]:
    """How far what was fused is from our delta weights, relative to them."""
    found = {}
    for module in adapter.modules:
        name, delta = module.target.parameter, module.delta_weight()
        found[name] = float((after[name] - before[name] - delta).norm() / delta.norm())
    return found


@pytest.mark.parametrize("alphas", [(3.0,), (0.1,)])
def test_diffusers_fuses_our_delta_weights_into_linear_layers_and_convolutions(
    alphas: tuple[float, ...], tmp_path: Path
) -> None:
    model = unet()
    before, adapter = weights(model), adapter_for("unet", model, alphas)
    assert {module.kind for module in adapter.modules} == {Kind.LINEAR, Kind.CONV}
    adaptertools.write(adapter, tmp_path / "lora.safetensors", format="kohya", common_alpha=2.0)
    found = errors(before, fused_by_diffusers(tmp_path / "lora.safetensors", model), adapter)
    assert max(found.values()) < 1e-5, max(found.items(), key=lambda item: item[1])


def test_modules_of_several_alphas_are_right_outside_attention_and_everywhere_with_a_common_alpha(
    tmp_path: Path,
) -> None:
    alphas = (1.0, 2.0, 3.0, 4.0, 5.0)
    adapter = adapter_for("unet", unet(), alphas)
    adaptertools.write(adapter, tmp_path / "own.safetensors", format="kohya")
    adaptertools.write(adapter, tmp_path / "common.safetensors", format="kohya", common_alpha=1.0)
    found = {}
    for name in ("own", "common"):
        model = unet()
        before = weights(model)
        found[name] = errors(before, fused_by_diffusers(tmp_path / f"{name}.safetensors", model), adapter)
    wrong = [name for name, error in found["own"].items() if error > 1e-5]
    assert wrong, "diffusers reads every alpha now: the note in the format kohya is out of date"
    assert all(name.endswith(ATTENTION) for name in wrong)
    assert max(found["common"].values()) < 1e-5


def test_diffusers_loads_the_text_encoder_of_our_file(tmp_path: Path) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    model = text_encoder()
    before, adapter = weights(model), adapter_for("text_encoder", model, (3.0,))
    adaptertools.write(adapter, tmp_path / "lora.safetensors", format="kohya")
    names = {key.split(".")[0] for key in load_file(tmp_path / "lora.safetensors")}
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in names
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(tmp_path / "lora.safetensors"))
    StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(state, alphas, model, prefix="text_encoder")
    for module in model.modules():
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge()
    found = errors(before, weights(model), adapter)
    assert max(found.values()) < 1e-5, found


def test_names_that_lycoris_flattened_turn_back_by_the_folder_of_the_pipeline(tmp_path: Path) -> None:
    from lycoris.kohya import create_network

    class Clip(nn.Module):
        """CLIP as sd-scripts has it: transformers before 5 puts its layers into `text_model`."""

        def __init__(self) -> None:
            super().__init__()
            self.text_model = text_encoder()

    models = {"unet": unet(), "text_encoder": Clip()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = create_network(
            1.0, 2, 1.0, None, models["text_encoder"], models["unet"], algo="locon", preset="attn-mlp"
        )
    network.apply_to(models["text_encoder"], models["unet"], True, True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    network.save_weights(str(tmp_path / "lora.safetensors"), torch.float32, {"ss_network_dim": "2"})
    base = save_pipeline(tmp_path / "pipeline", unet=unet(), text_encoder=text_encoder())
    adapter = adaptertools.read(tmp_path / "lora.safetensors", base=base)
    layers = dict(adapted_layers(network))
    assert {module.target.component for module in adapter.modules} == {"unet", "text_encoder"}
    assert len(adapter.modules) == len(layers)
    own = {"unet": unet(), "text_encoder": text_encoder()}
    shapes = {component: {name: w.shape for name, w in weights(model).items()} for component, model in own.items()}
    for module in adapter.modules:
        assert not module.target.opaque
        assert shapes[module.target.component][module.target.parameter] == module.weight_shape
    adaptertools.write(adapter, tmp_path / "again.safetensors", format="kohya")
    one, other = load_file(tmp_path / "lora.safetensors"), load_file(tmp_path / "again.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    opaque = {module.target.parameter: module for module in adaptertools.read(tmp_path / "lora.safetensors").modules}
    for name, layer in layers.items():
        expected = layer.make_weight().detach() * layer.scale
        delta = opaque[name.removeprefix("lora_unet_").removeprefix("lora_te_")].delta_weight()
        assert (delta - expected).norm() < 1e-6 * expected.norm()


def adapted_layers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """LyCORIS's modules by their flat names."""
    return [(module.lora_name, module) for module in (*network.unet_loras, *network.text_encoder_loras)]
