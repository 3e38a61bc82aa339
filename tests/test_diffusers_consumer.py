"""Real diffusers as the judge: what it fuses of our files, and what it means by its own."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_models import (
    Deltas,
    adapter_for,
    assert_same,
    biases,
    changes,
    clip,
    flux,
    fused_by_model,
    fused_by_pipeline,
    our_deltas,
    pipeline,
    unet,
    weights,
)
from safetensors.torch import load_file, save_file
from torch import nn

import adaptertools
from adaptertools.adapter import Adapter, LoraModule, ScaleRule, Target
from adaptertools.errors import ConfigError

pytestmark = [
    pytest.mark.consumers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of diffusers' own imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:(diffusers|peft|transformers|torch).*"),
]

FILE = "pytorch_lora_weights.safetensors"
LAYERS = re.compile(r".*(attn\d?\.to_q|to_out\.0|ff\.net\.2|conv1|conv_shortcut|proj_in|downsamplers\.0\.conv)")
FLUX_LAYERS = re.compile(r"(single_)?transformer_blocks\..+|x_embedder|norm_out\.linear")


@pytest.fixture
def stable_diffusion() -> Any:
    """What StableDiffusionPipeline loads an adapter into."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    return pipeline(StableDiffusionLoraLoaderMixin, unet=unet(), text_encoder=clip())


@pytest.fixture
def flux_pipeline() -> Any:
    """What FluxPipeline loads an adapter into."""
    from diffusers.loaders import FluxLoraLoaderMixin

    return pipeline(FluxLoraLoaderMixin, transformer=flux(), text_encoder=clip())


def write(modules: list[LoraModule], path: Path, **options: Any) -> Adapter:
    adapter = Adapter(modules=tuple(modules))
    adaptertools.write(adapter, path, format="diffusers", **options)
    return adapter


@pytest.mark.parametrize("scale", ["fold", "metadata"])
@pytest.mark.parametrize(
    "how", [{}, {"rank": 3, "alpha": 5.0}, {"rule": ScaleRule.ALPHA_OVER_SQRT_RANK}, {"magnitude": True}]
)
def test_a_unet_is_changed_by_our_file_as_we_say(how: dict[str, Any], scale: str, tmp_path: Path) -> None:
    """Linear layers and convolutions; mixed ranks and alphas, rsLoRA, DoRA."""
    model = unet()
    base = weights(model)
    adapter = write(adapter_for(model, "unet", LAYERS.fullmatch, **how), tmp_path / FILE, scale=scale)
    assert_same(fused_by_model(model, tmp_path / FILE, "unet"), our_deltas(adapter, "unet", base))


@pytest.mark.parametrize("scale", ["fold", "metadata"])
def test_a_bias_of_lora_is_scaled_as_we_say(scale: str, tmp_path: Path) -> None:
    model = unet()
    base, before = weights(model), biases(model)
    wanted = re.compile(r".*(attn\d?\.to_out\.0|ff\.net\.2|conv1)")
    adapter = write(adapter_for(model, "unet", wanted.fullmatch, lora_bias=True), tmp_path / FILE, scale=scale)
    assert_same(fused_by_model(model, tmp_path / FILE, "unet"), our_deltas(adapter, "unet", base))
    expected = {m.target.parameter: m.lora_bias * m.scaling for m in adapter.modules if m.lora_bias is not None}
    assert_same(changes(before, biases(model)), expected)


@pytest.mark.parametrize("scale", ["fold", "metadata"])
@pytest.mark.parametrize("text_model", ["", "text_model."])
@pytest.mark.parametrize("layers", ["fc1", "q_proj", "q_proj|out_proj|fc1|fc2"])
def test_a_pipeline_is_changed_by_our_file_in_each_of_its_models(
    layers: str, text_model: str, scale: str, stable_diffusion: Any, tmp_path: Path
) -> None:
    """With the names of text encoders before and since transformers 5; one with fc1 alone diffusers itself refuses."""
    base = {name: weights(model) for name, model in stable_diffusion.components.items()}
    encoder = adapter_for(stable_diffusion.text_encoder, "text_encoder", re.compile(rf".*\.({layers})").fullmatch)
    named = [replace(m, target=replace(m.target, parameter=text_model + m.target.parameter)) for m in encoder]
    unet_modules = adapter_for(stable_diffusion.unet, "unet", LAYERS.fullmatch)
    write([*unet_modules, *named], tmp_path / FILE, scale=scale)
    found = fused_by_pipeline(stable_diffusion, tmp_path / FILE)
    adapter = Adapter(modules=(*unet_modules, *encoder))
    for component, deltas in found.items():
        assert_same(deltas, our_deltas(adapter, component, base[component]))
    again = adaptertools.read(tmp_path / FILE)
    assert adaptertools.diff(Adapter(modules=(*unet_modules, *named)), again, tolerance=1e-6).same


def test_diffusers_itself_takes_no_text_encoder_without_attention(stable_diffusion: Any, tmp_path: Path) -> None:
    """The reason for the older names there: with these it is refused."""
    modules = adapter_for(stable_diffusion.text_encoder, "text_encoder", re.compile(r".*\.fc1").fullmatch)
    write(modules, tmp_path / "ours.safetensors")
    written = load_file(tmp_path / "ours.safetensors")
    plain = {
        k.replace("lora_linear_layer.down", "lora_A").replace("lora_linear_layer.up", "lora_B"): written[k]
        for k in written
    }
    assert plain.keys() != written.keys()
    save_file(plain, tmp_path / FILE)
    with pytest.raises(ValueError, match="infer state dict type"):
        fused_by_pipeline(stable_diffusion, tmp_path / FILE)


def trained(model: nn.Module, seed: int = 5, **config: Any) -> nn.Module:
    """A model with an adapter of diffusers' own making, none of whose factors is zero."""
    from peft import LoraConfig

    model.add_adapter(LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "magnitude" in name:
                value.mul_(1 + 0.3 * torch.rand(value.shape, generator=generator))
            elif "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return model


def fused(model: nn.Module) -> Deltas:
    before = weights(model)
    model.fuse_lora()
    return changes(before, weights(model))


CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 6},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"attn1.to_q": 2, r"down_blocks\..*\.conv1": 3},
        "alpha_pattern": {"attn1.to_q": 5, r"up_blocks\..*": 9, r"conv\d": 1.5},
    },
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"to_q": 2}},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_that_a_model_saved_means_what_it_is_fused_to(name: str, tmp_path: Path) -> None:
    """`save_lora_adapter`: no component in front of keys and metadata, whose patterns it sorts."""
    base = weights(unet())
    model = trained(unet(), target_modules=["to_q", "to_out.0", "conv1", "ff.net.2", "proj_in"], **CONFIGS[name])
    model.save_lora_adapter(tmp_path)
    expected = fused_by_model(unet(), tmp_path / FILE, None)
    if name != "patterns":  # of several that fit one layer another is the first once they are sorted
        assert_same(expected, fused(model))
    assert_same(our_deltas(adaptertools.read(tmp_path), "", base), expected)
    assert_same(our_deltas(adaptertools.read(tmp_path, component="unet"), "unet", base), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_we_write_of_a_file_of_diffusers_is_fused_to_the_same(name: str, tmp_path: Path) -> None:
    trained(unet(), target_modules=["to_q", "to_out.0", "conv1"], **CONFIGS[name]).save_lora_adapter(tmp_path)
    expected = fused_by_model(unet(), tmp_path / FILE, None)
    for scale in ("fold", "metadata"):
        path = tmp_path / f"{scale}.safetensors"
        adaptertools.convert(tmp_path / FILE, path, to="diffusers", scale=scale, prefix="unet")
        assert_same(fused_by_model(unet(), path, "unet"), expected)


@pytest.mark.parametrize(("metadata", "safe"), [(True, True), (False, True), (False, False)])
def test_a_file_that_a_pipeline_saved_means_what_it_fuses(
    metadata: bool, safe: bool, stable_diffusion: Any, tmp_path: Path
) -> None:
    """With metadata per component; without it, and in a torch file, the scaling is 1 whatever the training had."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from peft.utils import get_peft_model_state_dict

    models = stable_diffusion.components
    base = {name: weights(model) for name, model in models.items()}
    trained(models["unet"], target_modules=["to_q", "to_v"], r=4, lora_alpha=6, **_patterns("to_q", metadata))
    trained(models["text_encoder"], target_modules=["q_proj", "fc1"], r=4, lora_alpha=2, **_patterns("fc1", metadata))
    state = {name: get_peft_model_state_dict(model, adapter_name="default") for name, model in models.items()}
    fields = {name: model.peft_config["default"].to_dict() for name, model in models.items()}
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        tmp_path,
        unet_lora_layers=state["unet"],
        text_encoder_lora_layers=state["text_encoder"],
        safe_serialization=safe,
        unet_lora_adapter_metadata=fields["unet"] if metadata else None,
        text_encoder_lora_adapter_metadata=fields["text_encoder"] if metadata else None,
    )
    adapter = adaptertools.read(tmp_path)
    fresh = {"unet": unet(), "text_encoder": clip()}
    path = tmp_path / (FILE if safe else FILE.replace("safetensors", "bin"))
    found = fused_by_pipeline(pipeline(StableDiffusionLoraLoaderMixin, **fresh), path)
    for component, deltas in found.items():
        assert_same(our_deltas(adapter, component, base[component]), deltas)


def _patterns(name: str, alphas: bool) -> dict[str, Any]:
    """Another rank for the layers of a name, and another alpha where the file will say so."""
    return {"rank_pattern": {name: 2}, **({"alpha_pattern": {name: 3.0}} if alphas else {})}


def test_the_older_spellings_mean_what_diffusers_makes_of_them(tmp_path: Path) -> None:
    """Attention processors (0.11 to 0.21) and lora.down (0.18 on) of the unet."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    generator = torch.Generator().manual_seed(3)
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    keys = [f"{attention}.processor.{role}_lora" for role in ("to_q", "to_k", "to_v", "to_out")]
    keys += ["time_embedding.linear_1.lora", f"{attention.replace('attn1', 'attn2')}.to_q.lora"]
    tensors = {}
    for key in keys:
        n_out, n_in = (16, 4) if "linear_1" in key else (8, 8)
        tensors[f"{key}.down.weight"] = torch.randn(2, n_in, generator=generator)
        tensors[f"{key}.up.weight"] = torch.randn(n_out, 2, generator=generator)
    save_file({f"unet.{key}": value for key, value in tensors.items()}, tmp_path / FILE)
    expected = convert_unet_state_dict_to_peft(dict(tensors))
    adapter = adaptertools.read(tmp_path / FILE)
    assert len(adapter.modules) == len(keys)
    for module in adapter.modules:
        assert torch.equal(module.lora_A, expected[f"{module.target.parameter}.lora_A.weight"])
        assert torch.equal(module.lora_B, expected[f"{module.target.parameter}.lora_B.weight"])
    base = weights(unet())
    found = fused_by_model(unet(), tmp_path / FILE, "unet")
    assert_same(our_deltas(adapter, "unet", dict(base.items())), found)


def test_the_older_spellings_of_text_encoders_mean_what_diffusers_makes_of_them(
    stable_diffusion: Any, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for role in ("to_q", "to_k", "to_v", "to_out"):
        home = f"text_encoder.encoder.layers.0.self_attn.{role}_lora"
        tensors[f"{home}.down.weight"] = torch.randn(2, 8, generator=generator)
        tensors[f"{home}.up.weight"] = torch.randn(8, 2, generator=generator)
    save_file(tensors, tmp_path / FILE)
    base = weights(stable_diffusion.text_encoder)
    found = fused_by_pipeline(stable_diffusion, tmp_path / FILE)["text_encoder"]
    assert_same(our_deltas(adaptertools.read(tmp_path / FILE), "text_encoder", base), found)


def saved_state(
    modules: list[LoraModule], path: Path, alphas: dict[str, float], metadata: dict[str, str] | None = None
) -> None:
    """A file with alphas beside the factors, as trainers write who think of ComfyUI."""
    tensors = {}
    for module in modules:
        home = f"{module.target.component}.{module.target.parameter}"
        tensors |= {f"{home}.lora_A.weight": module.lora_A, f"{home}.lora_B.weight": module.lora_B}
        if module.target.parameter in alphas:
            tensors[f"{home}.alpha"] = torch.tensor(alphas[module.target.parameter])
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)


def test_alphas_beside_the_factors_count_as_they_do_in_diffusers(flux_pipeline: Any, tmp_path: Path) -> None:
    base = weights(flux_pipeline.transformer)
    modules = adapter_for(flux_pipeline.transformer, "transformer", re.compile(r"transformer_blocks.*").fullmatch)
    names = [module.target.parameter for module in modules]
    saved_state(modules, tmp_path / FILE, {name: (2.0, 5.0, 2.0)[i % 3] for i, name in enumerate(names)})
    found = fused_by_pipeline(flux_pipeline, tmp_path / FILE)["transformer"]
    assert_same(our_deltas(adaptertools.read(tmp_path / FILE), "transformer", base), found)


def test_alphas_and_metadata_together_are_refused_as_diffusers_refuses_them(flux_pipeline: Any, tmp_path: Path) -> None:
    modules = adapter_for(flux_pipeline.transformer, "transformer", re.compile(r".*to_q").fullmatch, rank=8)
    alphas = {module.target.parameter: 4.0 for module in modules}
    saved_state(modules, tmp_path / FILE, alphas, {"lora_adapter_metadata": json.dumps({"transformer.r": 8})})
    with pytest.raises(ValueError, match="network_alphas"):
        fused_by_pipeline(flux_pipeline, tmp_path / FILE)
    with pytest.raises(ConfigError, match="diffusers refuses such a file"):
        adaptertools.read(tmp_path / FILE)


def test_metadata_that_is_silent_about_a_component_gives_it_the_defaults_of_peft(tmp_path: Path) -> None:
    """Rank 8 and alpha 8: with rank 8 the scaling is 1, and no other rank can be loaded."""
    modules = adapter_for(unet(), "unet", re.compile(r".*to_q").fullmatch, rank=8)
    metadata = {"lora_adapter_metadata": json.dumps({"text_encoder.r": 4, "text_encoder.lora_alpha": 1})}
    saved_state(modules, tmp_path / FILE, {}, metadata)
    base = weights(unet())
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    model = unet()
    state, _, found = StableDiffusionLoraLoaderMixin.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert found == {"text_encoder.r": 4, "text_encoder.lora_alpha": 1}
    with pytest.raises(Exception):  # noqa: B017, PT011  (no target_modules: PEFT refuses in its own way)
        model.load_lora_adapter(state, prefix="unet", metadata={**found})
    complete = {"unet.target_modules": ["to_q"], **found}
    model.load_lora_adapter(state, prefix="unet", metadata=complete)
    assert_same(our_deltas(adaptertools.read(tmp_path / FILE), "unet", base), fused(model))


def test_a_peft_folder_of_a_unet_is_written_for_pipelines(stable_diffusion: Any, tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 2})
    model = peft.get_peft_model(unet(), config)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    model.save_pretrained(tmp_path / "peft")
    before = weights(unet())
    adaptertools.convert(tmp_path / "peft", tmp_path / FILE, to="diffusers", prefix="unet")
    merged = model.merge_and_unload()
    found = fused_by_pipeline(stable_diffusion, tmp_path / FILE)["unet"]
    assert_same(found, changes(before, weights(merged)))


@pytest.mark.parametrize("scale", ["fold", "metadata"])
@pytest.mark.parametrize("how", [{}, {"magnitude": True}, {"dtype": torch.bfloat16}])
def test_flux_is_changed_by_our_file_as_we_say(
    how: dict[str, Any], scale: str, flux_pipeline: Any, tmp_path: Path
) -> None:
    base = weights(flux_pipeline.transformer)
    write(
        adapter_for(flux_pipeline.transformer, "transformer", FLUX_LAYERS.fullmatch, **how),
        tmp_path / FILE,
        scale=scale,
    )
    adapter = adaptertools.read(tmp_path / FILE)
    found = fused_by_pipeline(flux_pipeline, tmp_path / FILE)["transformer"]
    assert_same(found, our_deltas(adapter, "transformer", base))


BLOCKS = re.compile(r"transformer_blocks\..+")


@pytest.fixture
def flux_modules(flux_pipeline: Any) -> list[LoraModule]:
    """Layers of the double blocks of Flux, each with a rank and an alpha of its own, and two of CLIP."""
    encoder = adapter_for(flux_pipeline.text_encoder, "text_encoder", re.compile(r".*\.0\..*(_proj|fc1)").fullmatch)
    named = [replace(m, target=replace(m.target, parameter=f"text_model.{m.target.parameter}")) for m in encoder]
    modules = adapter_for(flux_pipeline.transformer, "transformer", BLOCKS.fullmatch)
    single = adapter_for(
        flux_pipeline.transformer, "transformer", re.compile(r"single.*\.(proj_out|norm\.linear)").fullmatch
    )
    return [*modules, *single, *named]


def test_the_fused_file_that_we_write_of_flux_is_what_diffusers_takes_for_kohyas(
    flux_modules: list[LoraModule], flux_pipeline: Any, tmp_path: Path
) -> None:
    """Separate -> fused: block-diagonal, in kohya's names, converted by diffusers' own code and fused."""
    base = {name: weights(model) for name, model in flux_pipeline.components.items()}
    adapter = Adapter(modules=tuple(flux_modules))
    adaptertools.write(adapter, tmp_path / "kohya.safetensors", format="kohya")
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in load_file(tmp_path / "kohya.safetensors")
    found = fused_by_pipeline(flux_pipeline, tmp_path / "kohya.safetensors")
    assert_same(found["transformer"], our_deltas(adapter, "transformer", base["transformer"]))
    assert len(found["text_encoder"]) == 5


def test_a_fused_file_of_flux_is_fused_to_the_same_in_our_conversion_and_in_that_of_diffusers(tmp_path: Path) -> None:
    """Fused -> separate, of qkv that no block structure was in, with no base model and nothing but flat names."""
    from diffusers.loaders import FluxLoraLoaderMixin

    state = kohya_flux(double_layers=("img_attn_qkv", "txt_attn_qkv", "img_attn_proj", "img_mlp_0", "txt_mod_lin"))
    save_file(state, tmp_path / "kohya.safetensors")
    adaptertools.convert(tmp_path / "kohya.safetensors", tmp_path / FILE, to="diffusers")
    ours, theirs = (
        fused_by_pipeline(pipeline(FluxLoraLoaderMixin, transformer=flux(), text_encoder=clip()), tmp_path / name)[
            "transformer"
        ]
        for name in (FILE, "kohya.safetensors")
    )
    assert len(theirs) == 2 * (3 + 3 + 3)
    assert_same(ours, theirs)


def kohya_flux(double_layers: tuple[str, ...], width: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    """A file of sd-scripts for the tiny Flux, its factors full of numbers."""
    generator = torch.Generator().manual_seed(seed)
    rows = {"qkv": 3, "proj": 1, "0": 4, "lin": 6}
    state = {}
    for block in range(2):
        for index, layer in enumerate(double_layers):
            home, rank = f"lora_unet_double_blocks_{block}_{layer}", 3 + index % 2
            state[f"{home}.lora_down.weight"] = torch.randn(rank, width, generator=generator) * 0.3
            state[f"{home}.lora_up.weight"] = (
                torch.randn(rows[layer.rpartition("_")[2]] * width, rank, generator=generator) * 0.3
            )
            state[f"{home}.alpha"] = torch.tensor(2.0 + index)
    return state


@pytest.mark.parametrize("sparse", [True, False])
def test_linear1_of_flux_is_split_as_diffusers_splits_it(sparse: bool, tmp_path: Path) -> None:
    """At the real width, which diffusers' code has fixed: 3072."""
    from diffusers.loaders import FluxLoraLoaderMixin

    generator = torch.Generator().manual_seed(0)
    width, rank = 3072, 4
    down = torch.randn(rank, width, generator=generator)
    up = torch.randn(7 * width, rank, generator=generator)
    if sparse:
        for column, (start, stop) in enumerate(((0, 1), (1, 2), (2, 3), (3, 7))):
            up[: start * width, column] = 0
            up[stop * width :, column] = 0
    home = "lora_unet_single_blocks_5_linear1"
    state = {f"{home}.lora_down.weight": down, f"{home}.lora_up.weight": up, f"{home}.alpha": torch.tensor(2.0)}
    save_file(state, tmp_path / "kohya.safetensors")
    theirs = FluxLoraLoaderMixin.lora_state_dict(str(tmp_path / "kohya.safetensors"))
    adaptertools.convert(tmp_path / "kohya.safetensors", tmp_path / FILE, to="diffusers")
    ours = load_file(tmp_path / FILE)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 8
    for key in ours:
        if "lora_A" in key:
            assert ours[key].shape == theirs[key].shape == (1 if sparse else 4, width)
            other = key.replace("lora_A", "lora_B")
            found, expected = ours[other] @ ours[key][:, :64], theirs[other] @ theirs[key][:, :64]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_layers_of_flux_that_diffusers_loses_of_a_kohya_file_are_there_in_ours(tmp_path: Path) -> None:
    """Its conversion puts no `transformer.` in front of embedders, so that no pipeline loads them, and says nothing."""
    from diffusers.loaders import FluxLoraLoaderMixin

    model = flux()
    base = weights(model)
    wanted = re.compile(r"x_embedder|time_text_embed\..+|norm_out\.linear|proj_out|single.*to_q")
    adapter = Adapter(modules=tuple(adapter_for(model, "transformer", wanted.fullmatch)))
    without_single = [m for m in adapter.modules if not m.target.parameter.startswith("single")]
    block = adapter_for(model, "transformer", re.compile(r"transformer_blocks\.0\.attn\.to_(q|k|v)").fullmatch)
    sure = adapter_for(model, "transformer", re.compile(r"single_.*\.proj_out").fullmatch)
    adapter = Adapter(modules=(*without_single, *block, *sure))
    adaptertools.write(adapter, tmp_path / "kohya.safetensors", format="kohya")
    strip_header(tmp_path / "kohya.safetensors")
    expected = our_deltas(adapter, "transformer", base)
    lost = fused_by_pipeline(
        pipeline(FluxLoraLoaderMixin, transformer=flux(), text_encoder=clip()), tmp_path / "kohya.safetensors"
    )
    assert lost["transformer"].keys() < expected.keys()
    assert "x_embedder" not in lost["transformer"]
    adaptertools.convert(tmp_path / "kohya.safetensors", tmp_path / FILE, to="diffusers")
    found = fused_by_pipeline(pipeline(FluxLoraLoaderMixin, transformer=flux(), text_encoder=clip()), tmp_path / FILE)
    assert_same(found["transformer"], expected)


def strip_header(path: Path) -> None:
    """The file as others would have written it, without our record of its names."""
    save_file(load_file(path), path)


def test_the_halves_of_norm_out_change_places_as_diffusers_changes_them(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import swap_scale_shift

    down, up = torch.randn(2, 16), torch.randn(32, 2)
    state = kohya_flux(("img_attn_proj",))
    home = "lora_unet_final_layer_adaLN_modulation_1"
    state |= {f"{home}.lora_down.weight": down, f"{home}.lora_up.weight": up, f"{home}.alpha": torch.tensor(2.0)}
    save_file(state, tmp_path / "kohya.safetensors")
    adaptertools.convert(tmp_path / "kohya.safetensors", tmp_path / FILE, to="diffusers")
    modules = {m.target.parameter: m for m in adaptertools.read(tmp_path / FILE).modules}
    expected = swap_scale_shift(up) @ down
    torch.testing.assert_close(modules["norm_out.linear"].delta_weight(), expected, rtol=1e-5, atol=1e-6)


def test_our_comfyui_file_of_flux_is_what_diffusers_takes_for_one(
    flux_modules: list[LoraModule], flux_pipeline: Any, tmp_path: Path
) -> None:
    """prefix=diffusion_model: published names, fused. diffusers knows such keys with kohya's leaves."""
    base = weights(flux_pipeline.transformer)
    adapter = Adapter(modules=tuple(m for m in flux_modules if m.target.component == "transformer"))
    write(list(adapter.modules), tmp_path / FILE, prefix="diffusion_model")
    state = load_file(tmp_path / FILE)
    assert "diffusion_model.double_blocks.1.txt_attn.qkv.lora_A.weight" in state
    leaves = {".lora_A.": ".lora_down.", ".lora_B.": ".lora_up."}
    renamed = {k.replace(old, leaves[old]): state[k] for k in state for old in leaves if old in k}
    save_file(renamed, tmp_path / "comfy.safetensors")
    found = fused_by_pipeline(flux_pipeline, tmp_path / "comfy.safetensors")["transformer"]
    assert_same(found, our_deltas(adapter, "transformer", base))
    adaptertools.convert(tmp_path / FILE, tmp_path / "back.safetensors", to="diffusers", prefix="transformer")
    from diffusers.loaders import FluxLoraLoaderMixin

    back = fused_by_pipeline(
        pipeline(FluxLoraLoaderMixin, transformer=flux(), text_encoder=clip()), tmp_path / "back.safetensors"
    )
    assert_same(back["transformer"], our_deltas(adapter, "transformer", base))


def test_wan_in_the_names_of_ai_toolkit_is_loaded_by_diffusers_as_we_wrote_it(tmp_path: Path) -> None:
    """diffusion_model and the published names of Wan, which we keep and diffusers turns into its own."""
    from diffusers.loaders import WanLoraLoaderMixin

    names = (
        "self_attn.q",
        "self_attn.k",
        "self_attn.v",
        "self_attn.o",
        "cross_attn.q",
        "cross_attn.k",
        "cross_attn.v",
        "cross_attn.o",
        "ffn.0",
        "ffn.2",
    )
    modules = [
        LoraModule(
            target=Target(parameter=f"blocks.0.{name}", component="diffusion_model"),
            lora_A=torch.randn(2 + index % 2, 8),
            lora_B=torch.randn(8, 2 + index % 2),
            alpha=3.0,
        )
        for index, name in enumerate(names)
    ]
    adapter = write(modules, tmp_path / FILE)
    state = WanLoraLoaderMixin.lora_state_dict(str(tmp_path / FILE))
    theirs = {
        k.removesuffix(".lora_A.weight"): state[k.replace("lora_A", "lora_B")] @ state[k]
        for k in state
        if "lora_A" in k
    }
    ours = {m.target.parameter: m.delta_weight() for m in adapter.modules}
    assert len(theirs) == len(ours)
    torch.testing.assert_close(theirs["transformer.blocks.0.attn1.to_q"], ours["blocks.0.self_attn.q"])
    torch.testing.assert_close(theirs["transformer.blocks.0.attn2.to_out.0"], ours["blocks.0.cross_attn.o"])
    torch.testing.assert_close(theirs["transformer.blocks.0.ffn.net.0.proj"], ours["blocks.0.ffn.0"])


def kohya_unet(modules: list[LoraModule], path: Path, without_alpha: Callable[[int], bool]) -> None:
    """A file of sd-scripts for Stable Diffusion 1, of which some modules have no alpha."""
    state = {}
    for index, module in enumerate(modules):
        home = "lora_unet_" + module.target.parameter.replace(".", "_")
        state |= {f"{home}.lora_down.weight": module.lora_A, f"{home}.lora_up.weight": module.lora_B}
        if module.magnitude is not None:
            state[f"{home}.dora_scale"] = module.magnitude.reshape(-1, 1)
        if not without_alpha(index):
            state[f"{home}.alpha"] = torch.tensor(module.alpha)
    save_file(state, path)


@pytest.fixture
def pipeline_folder(tmp_path: Path) -> Path:
    """The tiny UNet as diffusers saves it, whose names turn flat ones back."""
    unet().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_modules_without_alpha_keep_their_scaling_through_us_and_not_in_diffusers(
    pipeline_folder: Path, stable_diffusion: Any, tmp_path: Path
) -> None:
    """diffusers gives them the commonest alpha of the others."""
    base = weights(stable_diffusion.unet)
    modules = adapter_for(stable_diffusion.unet, "unet", re.compile(r".*to_q").fullmatch, rank=4, alpha=2.0)
    kohya_unet(modules, tmp_path / "kohya.safetensors", lambda index: index == 0)
    meant = [replace(module, alpha=4.0 if index == 0 else 2.0) for index, module in enumerate(modules)]
    expected = our_deltas(Adapter(modules=tuple(meant)), "unet", base)
    wrong = fused_by_pipeline(stable_diffusion, tmp_path / "kohya.safetensors")["unet"]
    first = modules[0].target.parameter
    torch.testing.assert_close(wrong[first], expected[first] / 2, rtol=1e-5, atol=1e-6)
    read_options = {"base": pipeline_folder}
    adaptertools.convert(tmp_path / "kohya.safetensors", tmp_path / FILE, to="diffusers", read_options=read_options)
    assert_same(fused_by_model(unet(), tmp_path / FILE, "unet"), expected)


def test_alphas_of_attention_keep_their_values_through_us_and_not_in_diffusers(
    pipeline_folder: Path, stable_diffusion: Any, tmp_path: Path
) -> None:
    """Those that are not the commonest it writes into patterns that fit no module, at which PEFT warns."""
    base = weights(stable_diffusion.unet)
    modules = adapter_for(stable_diffusion.unet, "unet", re.compile(r".*to_q").fullmatch, rank=4, alpha=2.0)
    modules[0] = replace(modules[0], alpha=6.0)
    kohya_unet(modules, tmp_path / "kohya.safetensors", lambda index: False)
    expected = our_deltas(Adapter(modules=tuple(modules)), "unet", base)
    with pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match"):
        wrong = fused_by_pipeline(stable_diffusion, tmp_path / "kohya.safetensors")["unet"]
    first = modules[0].target.parameter
    torch.testing.assert_close(wrong[first], expected[first] / 3, rtol=1e-5, atol=1e-6)
    read_options = {"base": pipeline_folder}
    adaptertools.convert(tmp_path / "kohya.safetensors", tmp_path / FILE, to="diffusers", read_options=read_options)
    assert_same(fused_by_model(unet(), tmp_path / FILE, "unet"), expected)


def test_dora_of_kohya_is_kept_through_us_and_lost_in_diffusers(
    pipeline_folder: Path, stable_diffusion: Any, tmp_path: Path
) -> None:
    base = weights(stable_diffusion.unet)
    modules = adapter_for(stable_diffusion.unet, "unet", re.compile(r".*to_q").fullmatch, magnitude=True, alpha=2.0)
    kohya_unet(modules, tmp_path / "kohya.safetensors", lambda index: False)
    expected = our_deltas(Adapter(modules=tuple(modules)), "unet", base)
    wrong = fused_by_pipeline(stable_diffusion, tmp_path / "kohya.safetensors")["unet"]
    plain = our_deltas(Adapter(modules=tuple(replace(m, magnitude=None) for m in modules)), "unet", base)
    assert_same(wrong, plain)
    read_options = {"base": pipeline_folder}
    adaptertools.convert(tmp_path / "kohya.safetensors", tmp_path / FILE, to="diffusers", read_options=read_options)
    assert_same(fused_by_model(unet(), tmp_path / FILE, "unet"), expected)


def test_mixed_ranks_are_written_so_that_no_version_can_scale_them_wrongly(tmp_path: Path) -> None:
    """Until August 2026 lora_alpha was the rank of the first module for all: one rank for all makes that harmless."""
    modules = adapter_for(unet(), "unet", re.compile(r".*to_q").fullmatch)
    assert len({module.rank for module in modules}) == 3
    write(modules, tmp_path / FILE)
    ranks = {value.shape[0] for key, value in load_file(tmp_path / FILE).items() if "lora_A" in key}
    assert ranks == {4}
