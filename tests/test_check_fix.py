"""`adaptertools.fix`: the file that loads says the same, in numbers that every program reads alike."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adaptertools
from adaptertools import consumers
from adaptertools.adapter import Adapter, Base, FullWeight, RowSlice, WeightRole
from adaptertools.api.checking import fix_command, ways_out
from adaptertools.errors import MatchError, OptionError, UnknownFormatError, UnsupportedFeatureError
from adaptertools.module import LoraModule, ScaleRule, Target
from adaptertools.operations import low_rank

FIXTURES = Path(__file__).parents[1] / "fixtures"
PEFT = ("vllm", "sglang", "lorax", "tensorrt-llm")
VERSIONS = {"vllm": "0.31.0"}
"""Which read no patterns, as the newest vLLM does."""


def module(layer: int, name: str, rank: int, **changes: Any) -> LoraModule:
    generator = torch.Generator().manual_seed(100 * layer + len(name) + rank)
    out = 12 if name in ("k_proj", "v_proj") else 24
    given: dict[str, Any] = {
        "target": Target(parameter=f"model.layers.{layer}.self_attn.{name}"),
        "lora_A": torch.randn(rank, 24, generator=generator),
        "lora_B": torch.randn(out, rank, generator=generator),
        "alpha": 16.0,
    }
    return LoraModule(**{**given, **changes})


@pytest.fixture
def uneven() -> Adapter:
    """Ranks 4 and 6, two alphas, rsLoRA, and o_proj in the first of three layers alone."""
    modules = [
        module(layer, name, rank, scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK)
        for layer in (0, 1, 2)
        for name, rank in (("q_proj", 4), ("v_proj", 6))
    ]
    modules.append(module(0, "o_proj", 4, alpha=3.0, scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK))
    return Adapter(modules=tuple(modules), bases={"": Base(id="tiny/llama")})


@pytest.fixture
def folder(uneven: Adapter, tmp_path: Path) -> Path:
    return Path(str(adaptertools.write(uneven, tmp_path / "uneven", format="peft").path))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The attention of a llama of three layers."""
    generator = torch.Generator().manual_seed(5)
    sizes = {"q_proj": 24, "k_proj": 12, "v_proj": 12, "o_proj": 24}
    weights = {
        f"model.layers.{layer}.self_attn.{name}.weight": torch.randn(size, 24, generator=generator)
        for layer in (0, 1, 2)
        for name, size in sizes.items()
    }
    place = tmp_path / "base"
    place.mkdir()
    save_file(weights, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 3}))
    return place


def products(place: Path) -> dict[str, Tensor]:
    """B·A of every module of a PEFT folder, with no scaling at all."""
    tensors = load_file(place / "adapter_model.safetensors")
    ends = ".lora_A.weight", ".lora_B.weight"
    names = [key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])]
    return {
        name.removeprefix("base_model.model."): tensors[name + ends[1]].double() @ tensors[name + ends[0]].double()
        for name in names
    }


def config(place: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((place / "adapter_config.json").read_text())
    return document


@pytest.mark.parametrize("consumer", PEFT)
def test_the_fixed_file_passes_and_its_bare_products_are_the_delta_weights(
    consumer: str, folder: Path, uneven: Adapter, tmp_path: Path
) -> None:
    fixed = adaptertools.fix(folder, tmp_path / "fixed", consumer, version=VERSIONS.get(consumer))
    assert fixed.after.passes
    assert adaptertools.check(tmp_path / "fixed", consumer).passes
    found = products(tmp_path / "fixed")
    for each in uneven.modules:
        expected = each.lora_B.double() @ each.lora_A.double() * (each.alpha / each.rank**0.5)
        assert torch.allclose(found.pop(each.target.parameter), expected, rtol=1e-5, atol=1e-5)
    assert all(not product.any() for product in found.values())
    assert fixed.relative_error < 1e-7


@pytest.mark.parametrize(("consumer", "rank"), [("vllm", 6), ("sglang", 6), ("lorax", 8), ("tensorrt-llm", 6)])
def test_the_fixed_configuration_says_nothing_that_a_program_may_not_read(
    consumer: str, rank: int, folder: Path, tmp_path: Path
) -> None:
    adaptertools.fix(folder, tmp_path / "fixed", consumer, version=VERSIONS.get(consumer))
    stated = config(tmp_path / "fixed")
    assert (stated["r"], stated["lora_alpha"]) == (rank, rank)
    assert type(stated["lora_alpha"]) is int
    assert (stated["rank_pattern"], stated["alpha_pattern"]) == ({}, {})
    assert (stated["use_rslora"], stated["use_dora"], stated["bias"]) == (False, False, "none")
    assert stated["init_lora_weights"] is True
    assert stated["modules_to_save"] is None
    shapes = {tuple(tensor.shape) for tensor in load_file(tmp_path / "fixed" / "adapter_model.safetensors").values()}
    assert shapes <= {(rank, 24), (24, rank), (12, rank)}


def test_lorax_gets_zeros_in_the_layers_that_lack_a_module(folder: Path, tmp_path: Path) -> None:
    assert {f.rule for f in adaptertools.check(folder, "lorax").broken} >= {"every layer", "rank_pattern"}
    fixed = adaptertools.fix(folder, tmp_path / "fixed", "lorax")
    assert fixed.plain is not None
    assert [str(target) for target in fixed.plain.filled] == [
        "model.layers.1.self_attn.o_proj",
        "model.layers.2.self_attn.o_proj",
    ]
    found = products(tmp_path / "fixed")
    assert not found["model.layers.2.self_attn.o_proj"].any()


def test_layers_behind_the_last_adapted_one_are_known_from_the_base(folder: Path, base: Path, tmp_path: Path) -> None:
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 4}))
    weights = load_file(base / "model.safetensors")
    last = {name.replace(".2.", ".3."): weight.clone() for name, weight in weights.items() if ".2." in name}
    save_file(weights | last, base / "model.safetensors")
    fixed = adaptertools.fix(folder, tmp_path / "fixed", "lorax", base=base)
    assert fixed.plain is not None
    assert "model.layers.3.self_attn.q_proj" in map(str, fixed.plain.filled)


def test_sglang_gets_v_of_the_shape_of_k(uneven: Adapter, tmp_path: Path) -> None:
    lone = replace(uneven, modules=(module(0, "q_proj", 4), module(0, "k_proj", 4)))
    place = adaptertools.write(lone, tmp_path / "lone", format="peft").path
    assert [f.rule for f in adaptertools.check(place, "sglang").broken] == ["q and v"]
    adaptertools.fix(place, tmp_path / "fixed", "sglang")
    assert products(tmp_path / "fixed")["model.layers.0.self_attn.v_proj"].shape == (12, 24)


def test_sglang_gets_v_of_the_base_model_where_no_module_tells_its_shape(
    uneven: Adapter, base: Path, tmp_path: Path
) -> None:
    lone = replace(uneven, modules=(module(0, "q_proj", 4),))
    place = adaptertools.write(lone, tmp_path / "lone", format="peft").path
    with pytest.raises(UnsupportedFeatureError, match="nothing here tells its shape"):
        adaptertools.fix(place, tmp_path / "fixed", "sglang")
    adaptertools.fix(place, tmp_path / "fixed", "sglang", base=base)
    assert products(tmp_path / "fixed")["model.layers.0.self_attn.v_proj"].shape == (12, 24)


def test_a_rank_over_the_cap_is_truncated_to_the_nearest_and_the_error_is_that_of_the_svd(
    tmp_path: Path, uneven: Adapter
) -> None:
    high = replace(uneven, modules=(module(0, "q_proj", 20), module(0, "v_proj", 9)))
    place = adaptertools.write(high, tmp_path / "high", format="peft").path
    assert [f.rule for f in adaptertools.check(place, "vllm").broken] == ["rank"]
    fixed = adaptertools.fix(place, tmp_path / "fixed", "vllm", max_rank=8)
    lost, total = 0.0, 0.0
    for each in high.modules:
        values = torch.linalg.svdvals(each.lora_B.double() @ each.lora_A.double()) * each.scaling
        lost += float((values[8:] ** 2).sum())
        total += float((values**2).sum())
    assert fixed.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-5)
    assert config(tmp_path / "fixed")["r"] == 8


def test_half_precision_factors_keep_their_bits_where_the_scaling_is_a_power_of_two(
    uneven: Adapter, tmp_path: Path
) -> None:
    half = [module(layer, "q_proj", 4) for layer in (0, 1)]
    half = [replace(m, lora_A=m.lora_A.bfloat16(), lora_B=m.lora_B.bfloat16()) for m in half]
    place = adaptertools.write(replace(uneven, modules=tuple(half)), tmp_path / "half", format="peft").path
    fixed = adaptertools.fix(place, tmp_path / "fixed", "vllm")
    assert (fixed.relative_error, fixed.difference.distance) == (0, 0)
    tensors = load_file(tmp_path / "fixed" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_slots_of_a_fused_projection_become_one_module(uneven: Adapter, tmp_path: Path) -> None:
    slots = tuple(
        module(0, "qkv_proj", 4, target=Target(parameter="model.layers.0.qkv_proj", rows=rows))
        for rows in (RowSlice(start=0, stop=24, total=72), RowSlice(start=48, stop=72, total=72))
    )
    place = adaptertools.write(replace(uneven, modules=slots), tmp_path / "lora.pt", format="loralib").path
    fixed = adaptertools.fix(place, tmp_path / "fixed", "vllm")
    expected = torch.zeros(72, 24, dtype=torch.float64)
    for slot in slots:
        assert slot.target.rows is not None
        expected[slot.target.rows.start : slot.target.rows.stop] = slot.lora_B.double() @ slot.lora_A.double() * 4
    assert torch.allclose(products(tmp_path / "fixed")["model.layers.0.qkv_proj"], expected, atol=1e-5)
    assert fixed.before.findings[0].verdict == "fails"


def test_a_module_that_is_scaled_by_zero_stays_without_effect(uneven: Adapter, tmp_path: Path) -> None:
    silent = replace(uneven, modules=(module(0, "q_proj", 4, alpha=0.0), module(0, "v_proj", 4)))
    place = adaptertools.write(silent, tmp_path / "silent", format="peft").path
    adaptertools.fix(place, tmp_path / "fixed", "vllm", version=VERSIONS["vllm"])
    assert not products(tmp_path / "fixed")["model.layers.0.self_attn.q_proj"].any()


@pytest.fixture
def dora(uneven: Adapter, tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(9)
    modules = [module(layer, name, 4) for layer in (0, 1) for name in ("q_proj", "v_proj")]
    held = [replace(m, magnitude=4 + torch.rand(m.out_features, generator=generator)) for m in modules]
    adapter = replace(uneven, modules=tuple(held))
    return Path(str(adaptertools.write(adapter, tmp_path / "dora", format="peft").path))


def test_dora_without_the_base_model_is_refused_with_the_way_out(dora: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedFeatureError, match=r"DoRA .* --base BASE, weights and all, makes it the nearest LoRA; or merge"
    ):
        adaptertools.fix(dora, tmp_path / "fixed", "vllm")
    assert not (tmp_path / "fixed").exists()


def test_dora_on_its_base_becomes_the_nearest_lora_with_the_error_that_is_reported(
    dora: Path, base: Path, tmp_path: Path
) -> None:
    fixed = adaptertools.fix(dora, tmp_path / "fixed", "vllm", base=base)
    weights, factors = load_file(base / "model.safetensors"), load_file(dora / "adapter_model.safetensors")
    found, lost, total = products(tmp_path / "fixed"), 0.0, 0.0
    for name, product in found.items():
        W = weights[f"{name}.weight"].double()
        key = f"base_model.model.{name}."
        V = W + 4 * factors[f"{key}lora_B.weight"].double() @ factors[f"{key}lora_A.weight"].double()
        magnitude = factors[f"{key}lora_magnitude_vector"].double()
        delta = magnitude[:, None] * V / V.norm(dim=1, keepdim=True) - W
        values = torch.linalg.svdvals(delta)
        lost += float((delta - product).norm() ** 2)
        total += float(delta.norm() ** 2)
        assert float((delta - product).norm()) == pytest.approx(float(values[16:].norm()), rel=1e-4, abs=1e-4)
    assert fixed.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert config(tmp_path / "fixed")["use_dora"] is False


def test_dora_at_full_rank_is_the_same_model(dora: Path, base: Path, tmp_path: Path) -> None:
    fixed = adaptertools.fix(dora, tmp_path / "fixed", "vllm", base=base, max_rank=32)
    assert fixed.relative_error < 1e-6


def test_the_rank_that_dora_became_is_the_one_that_is_written(dora: Path, base: Path, tmp_path: Path) -> None:
    fixed = adaptertools.fix(dora, tmp_path / "fixed", "vllm", base=base, max_rank=256)
    assert fixed.plain is not None
    assert fixed.plain.decomposed is not None
    written = {module.nominal_rank for module in adaptertools.read(tmp_path / "fixed").modules}
    assert written == {fixed.plain.decomposed.rank} == {fixed.plain.rank}
    assert f"became LoRA of rank {fixed.plain.rank}," in fixed.steps[0]


def test_the_few_singular_vectors_of_a_large_weight_are_as_good_as_all(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, held = torch.randn(24, 24, generator=generator), replace(module(0, "q_proj", 4), magnitude=torch.ones(24))
    whole = low_rank.low_rank(held, weight, 3)
    monkeypatch.setattr(low_rank, "_WHOLE", 8)
    found = low_rank.low_rank(held, weight, 3)
    assert whole.error < found.norm
    assert found.error == pytest.approx(whole.error, rel=1e-3)
    left = held.delta_weight(base_weight=weight) - found.module.delta_weight()
    assert float(left.norm()) == pytest.approx(found.error, rel=1e-5)


def test_dora_on_a_weight_that_the_base_lacks_is_refused(dora: Path, base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, base / "model.safetensors")
    with pytest.raises(MatchError, match=r"layers\.1\.self_attn\.q_proj: the base model has no such weight"):
        adaptertools.fix(dora, tmp_path / "fixed", "vllm", base=base)


Unmended = Callable[[Adapter], Adapter]
HEAD = FullWeight(weight=torch.ones(3, 24))
UNMENDED: dict[str, tuple[Unmended, str]] = {
    "heads": (lambda a: replace(a, full_weights={"lm_head.weight": HEAD}), "full-weights"),
    "changed base": (lambda a: replace(a, bases={"": Base(change="pissa")}), "changed-base"),
    "aLoRA": (lambda a: replace(a, invocation_tokens=(1, 2)), "alora"),
    "lora_bias": (
        lambda a: a.map_modules(lambda m: replace(m, lora_bias=torch.ones(m.out_features))),
        "lora-bias",
    ),
}


@pytest.mark.parametrize("rule", UNMENDED)
def test_what_cannot_be_mended_is_refused_by_name_and_given_up_when_asked(
    rule: str, uneven: Adapter, tmp_path: Path
) -> None:
    change, kind = UNMENDED[rule]
    place = adaptertools.write(change(uneven), tmp_path / "whole", format="peft").path
    with pytest.raises(UnsupportedFeatureError, match=rf"{rule} .*--drop {kind}"):
        adaptertools.fix(place, tmp_path / "fixed", "vllm")
    assert not (tmp_path / "fixed").exists()
    fixed = adaptertools.fix(place, tmp_path / "fixed", "vllm", drop=[kind])
    assert fixed.report.dropped[0].startswith(f"{kind}: ")
    assert adaptertools.check(tmp_path / "fixed", "vllm").passes


def test_a_head_that_vllm_takes_stays(uneven: Adapter, tmp_path: Path) -> None:
    headed = replace(uneven, full_weights={"score.weight": HEAD})
    place = adaptertools.write(headed, tmp_path / "headed", format="peft").path
    adaptertools.fix(place, tmp_path / "fixed", "vllm")
    assert config(tmp_path / "fixed")["modules_to_save"] == ["score"]
    assert "base_model.model.score.weight" in load_file(tmp_path / "fixed" / "adapter_model.safetensors")


def test_weights_that_were_stored_untrained_are_left_out_and_said(uneven: Adapter, tmp_path: Path) -> None:
    stored = replace(uneven, full_weights={"lm_head.weight": replace(HEAD, role=WeightRole.BASE)})
    place = adaptertools.write(stored, tmp_path / "stored", format="peft").path
    fixed = adaptertools.fix(place, tmp_path / "fixed", "vllm", version=VERSIONS["vllm"])
    assert fixed.plain is not None
    assert fixed.plain.left_out == ("lm_head.weight",)
    assert not any("lm_head" in key for key in load_file(tmp_path / "fixed" / "adapter_model.safetensors"))


def test_names_that_the_base_model_lacks_are_found_and_not_mended(uneven: Adapter, base: Path, tmp_path: Path) -> None:
    stray = replace(uneven, modules=(*uneven.modules, module(7, "q_proj", 4, scale_rule=uneven.modules[0].scale_rule)))
    place = adaptertools.write(stray, tmp_path / "stray", format="peft").path
    broken = {finding.rule: finding for finding in adaptertools.check(place, "vllm", base=base).broken}
    assert broken["names in the base"].found == ("model.layers.7.self_attn.q_proj is not there",)
    with pytest.raises(UnsupportedFeatureError, match="names in the base"):
        adaptertools.fix(place, tmp_path / "fixed", "vllm", base=base)


def test_sizes_that_the_base_model_has_otherwise_are_told_from_names_that_it_lacks(
    uneven: Adapter, base: Path, tmp_path: Path
) -> None:
    wide = replace(uneven, modules=(module(0, "q_proj", 4, lora_B=torch.ones(36, 4)), module(0, "v_proj", 4)))
    place = adaptertools.write(wide, tmp_path / "wide", format="peft").path
    found = adaptertools.check(place, "vllm", base=base)
    (finding,) = found.broken
    assert finding.rule == "sizes in the base"
    assert finding.found == ("model.layers.0.self_attn.q_proj has shape (24, 24) there, (36, 24) here",)
    assert list(ways_out(found)) == ["sizes in the base"]
    assert "another size of this model" in ways_out(found)["sizes in the base"]
    assert "--rename" not in ways_out(found)["sizes in the base"]


def test_a_base_of_a_configuration_alone_mends_no_dora_and_says_what_is_missing(
    dora: Path, base: Path, tmp_path: Path
) -> None:
    (base / "model.safetensors").unlink()
    found = adaptertools.check(dora, "vllm", base=base)
    assert "weights and all" in ways_out(found)["DoRA"]
    assert fix_command(found) is None
    with pytest.raises(
        MatchError, match=r"DoRA renormalises .* has a config\.json alone. Give the folder with its weights"
    ):
        adaptertools.fix(dora, tmp_path / "fixed", "vllm", base=base)


@pytest.mark.parametrize("consumer", sorted({*consumers.names()} - {"comfyui", "diffusers"}))
def test_a_base_of_a_configuration_alone_is_taken_for_every_consumer_of_language_models(
    consumer: str, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(FIXTURES / "base" / "llama_tiny" / "config.json", alone)
    source = FIXTURES / "base" / "llama_tiny_lora"
    fixed = adaptertools.fix(source, tmp_path / "fixed", consumer, base=alone)
    assert (fixed.after.passes, fixed.relative_error) == (True, 0)


def test_flat_names_with_a_base_of_a_configuration_alone_say_what_they_need(tmp_path: Path) -> None:
    flat = FIXTURES / "kohya" / "unet_and_text_encoder"
    shutil.copy(FIXTURES / "base" / "llama_tiny" / "config.json", tmp_path)
    with pytest.raises(OptionError, match=r"config\.json alone. Give the folder with its weights"):
        adaptertools.check(flat, "comfyui", base=tmp_path)


def test_quantised_weights_make_no_lora_of_dora(dora: Path, base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    save_file({name: weight.to(torch.int8) for name, weight in weights.items()}, base / "model.safetensors")
    with pytest.raises(UnsupportedFeatureError, match="Give the model that was quantised"):
        adaptertools.fix(dora, tmp_path / "fixed", "vllm", base=base)


def test_a_gguf_base_is_refused_with_what_to_give(folder: Path, tmp_path: Path) -> None:
    adapter = FIXTURES / "gguf" / "llama_f32" / "adapter.gguf"
    model = Path(shutil.copy(adapter, tmp_path / "model.gguf"))
    for given in (model, tmp_path):
        with pytest.raises(
            UnknownFormatError, match=r"model\.gguf: a GGUF file cannot be .* Give the Hugging Face folder"
        ):
            adaptertools.check(folder, "llama.cpp", base=given)


def test_no_command_is_named_whose_result_could_not_be_written(folder: Path, tmp_path: Path) -> None:
    """GGUF's names need a base model."""
    found = adaptertools.check(folder, "llama.cpp")
    assert fix_command(found) is None
    with pytest.raises(OptionError) as refused:
        adaptertools.fix(folder, tmp_path / "fixed", "llama.cpp")
    assert "--base DIR" in found.refused
    assert found.refused.partition(": ")[2] == str(refused.value).partition(": ")[2]
    config = json.loads((FIXTURES / "base" / "llama_tiny" / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": 3, "hidden_size": 24, "head_dim": 6})
    )
    found = adaptertools.check(folder, "llama.cpp", base=tmp_path)
    assert (found.refused, fix_command(found) is None) == ("", False)


def test_dora_that_diffusers_leaves_out_of_kohyas_files_is_refused_with_the_way_out(tmp_path: Path) -> None:
    locon = FIXTURES / "kohya" / "locon"
    found = adaptertools.check(locon, "diffusers")
    assert "--to diffusers" in ways_out(found)["DoRA of kohya"]
    with pytest.raises(UnsupportedFeatureError, match=r"DoRA of kohya .*--to diffusers"):
        adaptertools.fix(locon, tmp_path / "fixed.safetensors", "diffusers")


def test_the_source_stays_as_it_was_and_the_history_says_what_was_done(folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    adaptertools.fix(folder, tmp_path / "fixed", "sglang")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    last = adaptertools.read(tmp_path / "fixed").history[-1]
    assert (last.operation, last.source, last.details["for"]) == ("fix", "uneven", "sglang")


def test_names_of_gpt2_are_refused_for_mlx_lm(uneven: Adapter, tmp_path: Path) -> None:
    gpt2 = replace(uneven, modules=(module(0, "q", 4, target=Target(parameter="transformer.h.0.attn.c_attn")),))
    place = adaptertools.write(gpt2, tmp_path / "gpt2", format="peft").path
    with pytest.raises(UnsupportedFeatureError, match="--base a checkpoint that mlx-lm saved"):
        adaptertools.fix(place, tmp_path / "fixed", "mlx")
    saved = tmp_path / "saved"
    saved.mkdir()
    save_file({"model.h.0.attn.c_attn.weight": torch.ones(24, 24)}, saved / "model.safetensors", {"format": "mlx"})
    (saved / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    adaptertools.convert(place, tmp_path / "mlx", to="mlx", base=saved)
    found = {finding.rule: finding.verdict for finding in adaptertools.check(tmp_path / "mlx", "mlx").findings}
    assert (found["names of GPT-2"], found["keys"]) == ("ok", "ok")
    assert adaptertools.fix(place, tmp_path / "fixed", "mlx", base=saved).after.passes


@pytest.mark.parametrize("given", [None, Adapter(modules=(module(0, "q_proj", 4),))], ids=["nothing", "adapter"])
def test_what_is_no_place_is_refused(given: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="expected a path or an address"):
        adaptertools.check(given, "vllm")
    with pytest.raises(OptionError, match="expected a path or an address"):
        adaptertools.fix(given, tmp_path / "fixed", "vllm")


@pytest.mark.parametrize("options", [{"max_rank": "8"}, {"version": 5}], ids=["max_rank", "version"])
def test_options_of_another_type_are_refused(options: dict[str, Any], folder: Path) -> None:
    with pytest.raises(OptionError, match="expected"):
        adaptertools.check(folder, "vllm", **options)


PASSING = {
    "peft/llama_patterns": "vllm",
    "peft/bert": "vllm",
    "mlx/dora": "mlx",
    "gguf/llama_f32": "llama.cpp",
    "kohya/locon": "comfyui",
    "diffusers/pipeline_metadata": "diffusers",
}


@pytest.mark.parametrize("case", PASSING)
def test_what_passes_is_written_unchanged(case: str, tmp_path: Path) -> None:
    given = adaptertools.read(FIXTURES / case)
    fixed = adaptertools.fix(FIXTURES / case, tmp_path / "fixed", PASSING[case])
    assert (fixed.before.passes, fixed.unchanged, fixed.plain, fixed.steps) == (True, True, None, ())
    assert (fixed.relative_error, fixed.exact) == (0, True)
    written = adaptertools.read(tmp_path / "fixed")
    assert adaptertools.diff(given, written, tolerance=0.0).same
    assert written.origin is not None
    assert given.origin is not None
    assert (written.origin.format, written.origin.container) == (given.origin.format, given.origin.container)
    for one, other in zip(given.modules, written.modules, strict=True):
        assert (one.target, one.rank, one.alpha, one.scale_rule) == (
            other.target,
            other.rank,
            other.alpha,
            other.scale_rule,
        )
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def test_what_passes_in_a_format_that_is_only_read_keeps_its_factors_in_the_one_that_is_written(tmp_path: Path) -> None:
    fixed = adaptertools.fix(FIXTURES / "lycoris" / "lokr", tmp_path / "fixed.safetensors", "comfyui")
    assert (fixed.before.passes, fixed.unchanged, fixed.report.format) == (True, False, "kohya")
    assert fixed.relative_error == 0


def test_a_dtype_that_is_asked_for_is_no_unchanged_file(plain: Adapter, peft_folder: Path, tmp_path: Path) -> None:
    fixed = adaptertools.fix(peft_folder, tmp_path / "fixed", "vllm", dtype="bf16")
    assert (fixed.before.passes, fixed.unchanged) == (True, False)
    found = adaptertools.diff(plain, adaptertools.read(tmp_path / "fixed"))
    assert fixed.relative_error == pytest.approx(found.relative_distance)
    assert fixed.relative_error > 0


def test_quantised_factors_are_said_to_be_written_wider(tmp_path: Path) -> None:
    fixed = adaptertools.fix(FIXTURES / "gguf" / "llama_q8_0", tmp_path / "fixed.gguf", "llama.cpp")
    assert (fixed.before.passes, fixed.unchanged, fixed.relative_error) == (True, False, 0)
    assert "quantised factors are written as they were read, in float32" in fixed.report.notes
