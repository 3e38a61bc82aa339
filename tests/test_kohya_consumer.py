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


def sdxl_unet() -> nn.Module:
    """A UNet with the blocks of Stable Diffusion XL, a few channels wide."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(3)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(4, 8, 16),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        cross_attention_dim=6,
        attention_head_dim=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=14,
    ).eval()


def sgm_names() -> list[str]:
    """The layers of that UNet as the original model has them, place by place."""
    resnet = ["in_layers.2", "emb_layers.1", "out_layers.3"]

    def attention(depth: int) -> list[str]:
        inner = [f"attn{n}.to_{to}" for n in (1, 2) for to in ("q", "k", "v", "out.0")] + ["ff.net.0.proj", "ff.net.2"]
        return ["proj_in", "proj_out", *(f"transformer_blocks.{i}.{name}" for i in range(depth) for name in inner)]

    def place(home: str, depth: int, *, skip: bool, end: str = "") -> list[str]:
        parts = [[*resnet, *(["skip_connection"] if skip else [])], *([attention(depth)] if depth else [])]
        names = [f"{home}.{number}.{name}" for number, part in enumerate(parts) for name in part]
        return names + ([f"{home}.{len(parts)}.{end}"] if end else [])

    names = ["time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0", "out.2"]
    for number, (depth, skip) in {1: (0, False), 2: (0, False), 4: (1, True), 5: (1, False)}.items():
        names += place(f"input_blocks.{number}", depth, skip=skip)
    names += place("input_blocks.7", 2, skip=True) + place("input_blocks.8", 2, skip=False)
    names += ["input_blocks.3.0.op", "input_blocks.6.0.op"]
    names += [f"middle_block.{part}.{name}" for part in (0, 2) for name in resnet]
    names += [f"middle_block.1.{name}" for name in attention(2)]
    for number, depth in enumerate((2, 2, 2, 1, 1, 1, 0, 0, 0)):
        names += place(f"output_blocks.{number}", depth, skip=True, end="conv" if number in (2, 5) else "")
    return names


def sgm_file(path: Path, model: nn.Module) -> Path:
    """What sd-scripts saves of LoRA on every layer of that UNet; sizes are those that our names have in diffusers."""
    from safetensors.torch import save_file

    from adaptertools.dialects.diffusers.sgm import diffusers_name

    generator, sizes, tensors = torch.Generator().manual_seed(11), weights(model), {}
    for name in sgm_names():
        flat = name.replace(".", "_")
        found = diffusers_name(flat)
        assert found is not None, flat
        size = sizes[found].shape
        down = torch.randn(2, *size[1:], generator=generator) * 0.2
        up = torch.randn(size[0], 2, *(1 for _ in size[2:]), generator=generator) * 0.2
        key = f"lora_unet_{flat}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(3.0)}
    save_file(tensors, path, {"ss_base_model_version": "sdxl_base_v1-0"})
    return path


def test_every_layer_of_the_unet_of_sdxl_has_one_name_in_sgm() -> None:
    from adaptertools.dialects.diffusers.sgm import diffusers_name

    found = [diffusers_name(name.replace(".", "_")) for name in sgm_names()]
    assert sorted(map(str, found)) == sorted(weights(sdxl_unet()))


def test_diffusers_turns_names_of_sgm_back_as_we_do_and_fuses_the_same(tmp_path: Path) -> None:
    model = sdxl_unet()
    before = weights(model)
    path = sgm_file(tmp_path / "kohya.safetensors", model)
    assert all(module.target.opaque for module in adaptertools.read(path).modules)
    adaptertools.convert(path, tmp_path / "pytorch_lora_weights.safetensors", to="diffusers")
    ours = adaptertools.read(tmp_path / "pytorch_lora_weights.safetensors")
    assert {m.target.parameter for m in ours.modules} == before.keys()
    theirs = fused_by_diffusers(path, model)
    found = errors(before, theirs, ours)
    assert max(found.values()) < 1e-5, max(found.items(), key=lambda item: item[1])
    other = sdxl_unet()
    other.load_lora_adapter(str(tmp_path), weight_name="pytorch_lora_weights.safetensors", prefix="unet")
    other.fuse_lora()
    again = errors(before, weights(other), ours)
    assert max(again.values()) < 1e-5, max(again.items(), key=lambda item: item[1])
    assert adaptertools.diff(adaptertools.read(path), ours).same
