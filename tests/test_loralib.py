"""The loralib format: checkpoints of real loralib, what their readers must be told, and what is written."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proof import assert_diff_proves
from safetensors.torch import load_file, save_file

import adaptertools
from adaptertools import formats
from adaptertools.adapter import (
    Adapter,
    Base,
    FullWeight,
    Kind,
    LoraModule,
    RowSlice,
    ScaleRule,
    Target,
    WeightRole,
)
from adaptertools.containers.source import Source
from adaptertools.errors import (
    AdapterToolsError,
    AmbiguousFormatError,
    ConfigError,
    DuplicateTargetError,
    EmptyFactorError,
    MissingAlphaError,
    NotLoraError,
    OptionError,
    ShapeError,
    UnclaimedTensorError,
    UnknownFormatError,
    UnpairedFactorError,
    UnsupportedFeatureError,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "loralib"
CASES = sorted(folder.name for folder in FIXTURES.iterdir())
ROBERTA = FIXTURES / "roberta_tiny" / "roberta_lora.bin"


def case(name: str) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    """The checkpoint of a fixture, how to read it, and the delta weights that loralib merges."""
    said = json.loads((FIXTURES / name / "case.json").read_text())
    return FIXTURES / name / said["file"], said["read"], load_file(FIXTURES / name / "expected.safetensors")


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    """ΔW of every parameter, slots of one fused projection added up."""
    summed: dict[str, torch.Tensor] = {}
    for module in adapter.modules:
        name = module.target.parameter
        summed[name] = summed.get(name, torch.zeros(())) + module.delta_weight()
    return summed


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, path)
    return path


def pair(name: str, n_out: int = 6, n_in: int = 4, rank: int = 2) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_A": torch.ones(rank, n_in), f"{name}.lora_B": torch.ones(n_out, rank)}


def linear(name: str = "x.q_proj", rank: int = 2, alpha: float = 4.0, **fields: Any) -> LoraModule:
    generator = torch.Generator().manual_seed(rank)
    factors = {
        "lora_A": torch.randn(rank, 5, generator=generator),
        "lora_B": torch.randn(3, rank, generator=generator),
    }
    return LoraModule(target=Target(parameter=name), alpha=alpha, **{**factors, **fields})


# Reading


@pytest.mark.parametrize("name", CASES)
def test_the_delta_weights_are_those_that_loralib_merges(name: str) -> None:
    path, options, expected = case(name)
    found = deltas(adaptertools.read(path, **options))
    assert found.keys() == expected.keys()
    for parameter, delta in expected.items():
        assert found[parameter].shape == delta.shape, parameter
        assert torch.allclose(found[parameter], delta, rtol=1e-6, atol=1e-7), parameter


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_told_by_its_keys_as_file_and_as_folder(name: str) -> None:
    path, _, _ = case(name)
    assert formats.detect(Source(path)) == "loralib"
    assert formats.detect(Source(path.parent)) == "loralib"


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_claimed_or_kept(name: str) -> None:
    path, options, _ = case(name)
    stored = torch.load(path, weights_only=True)
    stored = stored.get("model_state_dict", stored)
    adapter = adaptertools.read(path, **options)
    factors = sum(m.lora_A.numel() + m.lora_B.numel() for m in adapter.modules)
    assert factors == sum(t.numel() for key, t in stored.items() if "lora_" in key)
    others = {key.replace("conv.conv.", "conv.") for key in stored if "lora_" not in key}
    assert adapter.full_weights.keys() == others


def test_the_head_rides_along_as_full_weights() -> None:
    adapter = adaptertools.read(ROBERTA, alpha=16)
    assert {weight.role for weight in adapter.full_weights.values()} == {WeightRole.MODULE}
    assert sorted(adapter.full_weights) == [
        f"classifier.{layer}.{leaf}" for layer in ("dense", "out_proj") for leaf in ("bias", "weight")
    ]


def test_biases_without_their_weights_are_those_of_base_layers() -> None:
    path, options, _ = case("every_layer_bias_all")
    adapter = adaptertools.read(path, **options)
    assert {weight.role for weight in adapter.full_weights.values()} == {WeightRole.BIAS}
    assert {"norm.bias", "conv.bias", "c_attn.bias"} <= adapter.full_weights.keys()


def test_alpha_is_asked_for_with_the_customary_values() -> None:
    with pytest.raises(MissingAlphaError) as raised:
        adaptertools.read(ROBERTA)
    message = str(raised.value)
    for word in ("never in a loralib file", "--alpha", "16 at r 8", "32 at r 16", "128 at r 4", "alpha = 2r"):
        assert word in message


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0, -16, 5e-324, 10**400, "16", True, [16]])
def test_alpha_must_be_a_positive_number(alpha: Any) -> None:
    with pytest.raises(OptionError, match=r"alpha is .*, expected a positive number"):
        adaptertools.read(ROBERTA, alpha=alpha)


@pytest.mark.parametrize("option", ["slots", "embeddings", "convolutions", "transposed"])
def test_options_that_are_no_text_are_refused(option: str) -> None:
    given: dict[str, Any] = {option: 3}
    with pytest.raises(OptionError, match=f"{option} is 3, expected text"):
        adaptertools.read(ROBERTA, alpha=16, **given)


@pytest.mark.parametrize(
    ("option", "text", "item"),
    [
        ("slots", "gpt2", "slots 'gpt2'"),
        ("slots", "query=T,qeury=T", "slots 'qeury=T'"),
        ("embeddings", "qeury", "embeddings 'qeury'"),
        ("convolutions", "qeury=3", "convolutions 'qeury'"),
        ("transposed", "query,qeury", "transposed 'qeury'"),
    ],
)
def test_a_pattern_that_fits_no_layer_is_refused_with_names_near_it(option: str, text: str, item: str) -> None:
    given: dict[str, Any] = {option: text}
    with pytest.raises(OptionError) as raised:
        adaptertools.read(ROBERTA, alpha=16, **given)
    assert str(raised.value).startswith(f"{item} fits no layer of the file")
    if "qeury" in text:
        assert "near it are roberta.encoder.layer.0.attention.self.query" in str(raised.value)


def test_of_a_preset_one_pattern_that_fits_is_enough() -> None:
    path, options, expected = case("gpt2_wrapped")
    assert not any(name.endswith("c_fc") for name in expected)
    assert deltas(adaptertools.read(path, alpha=options["alpha"], slots="gpt2")).keys() == expected.keys()


def test_slots_are_asked_for_by_name_and_number(tmp_path: Path) -> None:
    path, options, _ = case("gpt2_wrapped")
    with pytest.raises(ConfigError, match=r"transformer\.h\.0\.attn\.c_attn: 2 slots .*c_attn=TFT.*gpt2"):
        adaptertools.read(path, alpha=options["alpha"])


def test_the_same_file_read_with_other_slots_means_another_adapter() -> None:
    path, options, expected = case("gpt2_wrapped")
    other = deltas(adaptertools.read(path, alpha=options["alpha"], slots="c_attn=TTF:transposed"))
    for name, delta in expected.items():
        assert other[name].shape == delta.shape
        assert not torch.allclose(other[name], delta)


@pytest.mark.parametrize(
    "slots", ["c_attn", "c_attn=TXT", "=TFT", "c_attn=FFF", "c_attn=TFT:sideways", "gtp2", "c_attn:transposed"]
)
def test_slots_that_are_not_understood_are_refused(slots: str) -> None:
    path, options, _ = case("gpt2_wrapped")
    with pytest.raises(OptionError, match="slots"):
        adaptertools.read(path, alpha=options["alpha"], slots=slots)


def test_a_mask_that_does_not_fit_the_factors_is_refused() -> None:
    path, options, _ = case("gpt2_wrapped")
    with pytest.raises(ConfigError, match="adapt 2 slots, the mask TTT has 3"):
        adaptertools.read(path, alpha=options["alpha"], slots="c_attn=TTT")


def test_the_first_pattern_that_fits_counts() -> None:
    path, options, expected = case("gpt2_wrapped")
    adapter = adaptertools.read(path, alpha=options["alpha"], slots="h.0.attn.c_attn=TTF,*=TFT:transposed")
    spans = {str(module.target) for module in adapter.modules}
    assert "transformer.h.0.attn.c_attn[8:16]" in spans
    assert "transformer.h.1.attn.c_attn[16:24]" in spans
    assert expected


@pytest.mark.parametrize("text", ["conv", "conv=0", "conv=-1", "=3", "conv=three"])
def test_kernels_that_are_not_understood_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="convolutions"):
        adaptertools.read(ROBERTA, alpha=16, convolutions=text)


def test_a_layer_cannot_be_two_things() -> None:
    with pytest.raises(OptionError, match="at once"):
        adaptertools.read(ROBERTA, alpha=16, embeddings="query", convolutions="query=3")


def test_a_kernel_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="kernel 3"):
        adaptertools.read(ROBERTA, alpha=16, convolutions="query=3")


def test_a_convolution_is_told_by_the_bias_beside_it() -> None:
    path, options, _ = case("every_layer_bias_all")
    del options["convolutions"]
    with pytest.raises(ConfigError, match=r"conv is a convolution.*convolutions=conv=KERNEL"):
        adaptertools.read(path, **options)


def test_an_embedding_by_a_well_known_name_is_read_as_one_and_said(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", pair("transformer.wte") | pair("transformer.h.0.q"))
    adapter = adaptertools.read(path, alpha=4)
    assert [module.kind for module in adapter.modules] == [Kind.EMBEDDING, Kind.LINEAR]
    assert adapter.modules[0].weight_shape == (4, 6)
    assert any("transformer.wte" in note for note in adapter.notes)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"model_state_dict": tensors},
        lambda tensors: {"state_dict": {"model": tensors}},
        lambda tensors: {f"module.{key}": tensor for key, tensor in tensors.items()},
        lambda tensors: {"model": {f"_orig_mod.{key}": tensor for key, tensor in tensors.items()}, "epoch": 3},
    ],
)
def test_wrappers_are_stripped(wrap: Callable[[dict[str, torch.Tensor]], Any], tmp_path: Path) -> None:
    tensors = torch.load(ROBERTA, weights_only=True)
    torch.save(wrap(tensors), tmp_path / "wrapped.pt")
    adapter = adaptertools.read(tmp_path / "wrapped.pt", alpha=16)
    plain = adaptertools.read(ROBERTA, alpha=16)
    assert [m.target for m in adapter.modules] == [m.target for m in plain.modules]
    assert adapter.full_weights.keys() == plain.full_weights.keys()


def test_training_state_is_left_aside_and_said(tmp_path: Path) -> None:
    torch.save({"model": pair("x.q"), "optimizer": {"state": {"momentum": torch.ones(3)}}}, tmp_path / "x.pt")
    adapter = adaptertools.read(tmp_path / "x.pt", alpha=4)
    assert not adapter.full_weights
    assert any("optimizer/state/momentum" in note for note in adapter.notes)


def test_what_lies_beside_the_state_dict_and_is_not_known_is_an_error(tmp_path: Path) -> None:
    torch.save({"model": pair("x.q"), "extra": {"y": torch.ones(3)}}, tmp_path / "x.pt")
    with pytest.raises(UnclaimedTensorError, match="extra/y"):
        adaptertools.read(tmp_path / "x.pt", alpha=4)


def test_names_that_become_one_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", pair("x.q") | pair("module.x.q"))
    with pytest.raises(DuplicateTargetError, match=r"module\.x\.q"):
        adaptertools.read(path, alpha=4)


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    tensors = pair("x.q") | pair("x.v")
    del tensors["x.v.lora_A"]
    with pytest.raises(UnpairedFactorError, match=r"x\.v\.lora_A is not in the file"):
        adaptertools.read(save(tmp_path / "x.pt", tensors), alpha=4)


@pytest.mark.parametrize("shape", [(0,), (8,), (0, 4)])
def test_empty_factors_name_their_cause(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"x.lora_A": torch.zeros(shape), "x.lora_B": torch.zeros(4, 2), "y": torch.ones(1)})
    with pytest.raises(EmptyFactorError, match="ZeRO-3"):
        adaptertools.read(path, alpha=4)


def test_ranks_that_disagree_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"x.lora_A": torch.ones(3, 4), "x.lora_B": torch.ones(6, 2)})
    with pytest.raises(ShapeError, match="rank"):
        adaptertools.read(path, alpha=4)


def test_factors_of_other_libraries_are_refused_not_kept(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", pair("x.q") | {"x.v.lora_magnitude_vector": torch.ones(4)})
    with pytest.raises(UnclaimedTensorError, match="lora_magnitude_vector"):
        adaptertools.read(path, format="loralib", alpha=4)


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("LitGPT", "transformer.h.0.attn.qkv"),
        ("minLoRA", "x.parametrizations.weight.0"),
        ("AdapterHub", "x.query.loras.task"),
        ("OpenDelta", "x.query.lora"),
    ],
)
def test_relatives_are_not_claimed_and_refused_by_name(library: str, name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", pair(name))
    assert not formats.get("loralib").detect(Source(path))
    with pytest.raises(UnknownFormatError, match=library):
        adaptertools.read(path, format="loralib", alpha=4)


def test_a_file_without_bare_factors_is_not_claimed(tmp_path: Path) -> None:
    peft = {"base_model.model.x.lora_A.weight": torch.ones(2, 4), "base_model.model.x.lora_B.weight": torch.ones(4, 2)}
    for tensors in (peft, {"x.weight": torch.ones(2, 2)}):
        path = save(tmp_path / "x.pt", tensors)
        assert not formats.get("loralib").detect(Source(path))
        with pytest.raises((UnknownFormatError, UnclaimedTensorError)):
            adaptertools.read(path, format="loralib", alpha=4)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_adalora_of_peft_is_not_claimed_for_its_bare_factors(prefix: str, tmp_path: Path) -> None:
    tensors = pair(f"{prefix}x.q") | {f"{prefix}x.q.lora_E": torch.ones(2, 1)}
    path = save(tmp_path / "adapter_model.bin", tensors)
    assert not formats.get("loralib").detect(Source(path))
    if prefix:
        with pytest.raises(NotLoraError, match="AdaLoRA"):
            adaptertools.read(path)


def test_two_checkpoints_in_one_folder_are_not_guessed_between(tmp_path: Path) -> None:
    save(tmp_path / "one.pt", pair("x.q"))
    save(tmp_path / "two.pt", pair("x.q"))
    assert not formats.get("loralib").detect(Source(tmp_path))
    with pytest.raises(AmbiguousFormatError, match=r"one\.pt, two\.pt"):
        adaptertools.read(tmp_path, format="loralib", alpha=4)


# The weight of an adapted layer in the file


def test_a_weight_beside_its_factors_is_not_read_in_silence() -> None:
    path, options, _ = case("whole_model_merged")
    with pytest.raises(ConfigError, match=r"eval\(\).*own_weights=drop.*unmerged.*merged"):
        adaptertools.read(path, alpha=options["alpha"])


def test_merged_weights_are_kept_less_the_delta() -> None:
    merged, options, _ = case("whole_model_merged")
    unmerged, kept, _ = case("whole_model_unmerged")
    one = adaptertools.read(merged, **options).full_weights
    other = adaptertools.read(unmerged, **kept).full_weights
    raw = torch.load(merged, weights_only=True)
    name = "roberta.encoder.layer.0.attention.self.query.weight"
    assert one[name].role is other[name].role is WeightRole.BASE
    assert not torch.allclose(raw[name], other[name].weight)
    assert torch.allclose(one[name].weight, other[name].weight, atol=1e-7)


def test_the_weights_of_adapted_layers_can_be_left_to_the_base_model() -> None:
    path, options, _ = case("whole_model_merged")
    adapter = adaptertools.read(path, **{**options, "own_weights": "drop"})
    assert not any("query.weight" in name or "value.weight" in name for name in adapter.full_weights)
    assert "roberta.encoder.layer.0.attention.self.key.weight" in adapter.full_weights
    assert any("left out" in note for note in adapter.notes)


# A base model


def base_model(folder: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


EVERY_LAYER = {
    "tokens.weight": (11, 6),
    "up.weight": (10, 6),
    "up.bias": (10,),
    "down.weight": (10, 6),
    "down.bias": (6,),
    "qkv.weight": (12, 6),
    "c_attn.weight": (6, 18),
    "whole.weight": (12, 6),
    "one.weight": (12, 6),
    "conv.weight": (4, 3, 3, 3),
}


def test_a_base_model_settles_all_but_the_slots(tmp_path: Path) -> None:
    path, options, expected = case("every_layer_bias_none")
    base = base_model(tmp_path / "base", EVERY_LAYER)
    found = deltas(adaptertools.read(path, alpha=6, base=base, slots="c_attn=TFT,qkv=TTF,one=FTF"))
    for name, delta in expected.items():
        assert torch.allclose(found[name], delta, rtol=1e-6, atol=1e-7), name
    kinds = {m.target.parameter: m.kind for m in adaptertools.read(path, **options).modules}
    with_base = adaptertools.read(path, alpha=6, base=base, slots="c_attn=TFT,qkv=TTF,one=FTF")
    assert {m.target.parameter: m.kind for m in with_base.modules} == kinds


def test_a_base_model_tells_how_many_slots_there_are(tmp_path: Path) -> None:
    path, _, _ = case("every_layer_bias_none")
    base = base_model(tmp_path / "base", EVERY_LAYER)
    with pytest.raises(ConfigError, match="2 of the 3 slots"):
        adaptertools.read(path, alpha=6, base=base)
    with pytest.raises(ConfigError, match="one: 1 of the 3 slots"):
        adaptertools.read(path, alpha=6, base=base, slots="c_attn=TFT,qkv=TTF")


@pytest.mark.parametrize("option", [{"embeddings": "up"}, {"convolutions": "conv=1"}, {"transposed": "up"}])
def test_options_that_contradict_the_base_model_are_refused(option: dict[str, str], tmp_path: Path) -> None:
    path, _, _ = case("every_layer_bias_none")
    base = base_model(tmp_path / "base", EVERY_LAYER)
    with pytest.raises(ShapeError, match="does not fit the base weight"):
        adaptertools.read(path, alpha=6, base=base, slots="c_attn=TFT,qkv=TTF,one=FTF", **option)


def test_the_model_type_tells_the_orientation_of_square_weights(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", pair("h.0.attn.c_proj", 6, 6))
    shapes = {"h.0.attn.c_proj.weight": (6, 6)}
    for kind, transposed in (("gpt2", True), ("llama", False)):
        base = base_model(tmp_path / kind, shapes, {"model_type": kind})
        (module,) = adaptertools.read(path, alpha=4, base=base).modules
        assert module.transposed is transposed


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", {"conv.lora_A": torch.ones(6, 12), "conv.lora_B": torch.ones(6, 6)})
    base = base_model(tmp_path / "base", {"conv.weight": (4, 2, 3, 3)})
    with pytest.raises(UnsupportedFeatureError, match="grouped"):
        adaptertools.read(path, alpha=4, base=base)


# Writing


@pytest.mark.parametrize("container", ["torch", "safetensors"])
@pytest.mark.parametrize("name", CASES)
def test_what_was_read_is_written_and_read_again_without_options(name: str, container: str, tmp_path: Path) -> None:
    path, options, _ = case(name)
    adapter = adaptertools.read(path, **options)
    report = adaptertools.write(adapter, tmp_path / "out", format="loralib", container=container)
    assert report.exact
    again = adaptertools.read(tmp_path / "out")
    assert adaptertools.diff(adapter, again, tolerance=0).same
    assert [m.target for m in again.modules] == [m.target for m in adapter.modules]
    for one, other in zip(adapter.modules, again.modules, strict=True):
        assert torch.equal(one.lora_A, other.lora_A)
        assert torch.equal(one.lora_B, other.lora_B)
        assert (one.alpha, one.scale_rule, one.kind, one.transposed, one.shape) == (
            other.alpha,
            other.scale_rule,
            other.kind,
            other.transposed,
            other.shape,
        )
    assert {n: w.role for n, w in again.full_weights.items()} == {n: w.role for n, w in adapter.full_weights.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_tensors_written_are_those_of_loralib(name: str, tmp_path: Path) -> None:
    path, options, _ = case(name)
    if options.get("own_weights") == "merged":
        return
    adaptertools.write(adaptertools.read(path, **options), tmp_path / "out.pt", format="loralib")
    stored = torch.load(path, weights_only=True)
    stored = {key.removeprefix("module."): value for key, value in stored.get("model_state_dict", stored).items()}
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert written.keys() == stored.keys()
    for key, tensor in stored.items():
        assert written[key].dtype == tensor.dtype, key
        assert torch.equal(written[key], tensor), key


def test_one_alpha_for_all_leaves_the_factors_alone(tmp_path: Path) -> None:
    adapter = Adapter(modules=(linear("a", rank=2, alpha=8.0), linear("b", rank=4, alpha=8.0)))
    report = adaptertools.write(adapter, tmp_path / "out.pt", format="loralib")
    assert report.losses == ()
    assert any("lora_alpha=8" in note for note in report.notes)
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(written["a.lora_B"], adapter.modules[0].lora_B)


@pytest.mark.parametrize(
    ("rule", "alpha", "expected"), [(ScaleRule.ALPHA_OVER_SQRT_RANK, 4.0, 8.0), (ScaleRule.DIRECT, 2.0, 8.0)]
)
def test_another_rule_that_some_alpha_states_exactly_is_no_fold(
    rule: ScaleRule, alpha: float, expected: float, tmp_path: Path
) -> None:
    adapter = Adapter(modules=(linear("a", rank=4, alpha=alpha, scale_rule=rule),))
    report = adaptertools.write(adapter, tmp_path / "out.pt", format="loralib")
    assert report.losses == ()
    assert any(f"lora_alpha={expected:g}" in note for note in report.notes)
    (again,) = adaptertools.read(tmp_path / "out.pt").modules
    assert (again.alpha, again.scale_rule) == (alpha, rule)


def test_several_alphas_are_folded_and_alpha_becomes_each_layers_r(tmp_path: Path) -> None:
    adapter = Adapter(modules=(linear("a", rank=2, alpha=2.0), linear("b", rank=3, alpha=5.0)))
    report = adaptertools.write(adapter, tmp_path / "out.pt", format="loralib")
    assert not report.exact
    assert 0 < report.max_relative_error < 1e-7
    assert any("equal to its r (2 at r=2, 3 at r=3)" in note for note in report.notes)
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(written["a.lora_B"], adapter.modules[0].lora_B)
    folded = (adapter.modules[1].lora_B.double() * (5 / 3)).float()
    assert torch.equal(written["b.lora_B"], folded)
    again = {m.target.parameter: m for m in adaptertools.read(tmp_path / "out.pt").modules}
    assert (again["b"].alpha, again["b"].scaling) == (3.0, 1.0)
    assert_diff_proves(adapter, adaptertools.read(tmp_path / "out.pt"), report)
    sidecar = json.loads((tmp_path / "out.pt.adaptertools.json").read_text())
    assert sidecar["layers"]["b"]["folded"] == {"alpha": 5.0, "scale_rule": "alpha/r"}


def test_an_inexact_fold_promotes_half_precision(tmp_path: Path) -> None:
    half = linear("b", rank=3, alpha=5.0)
    half = replace(half, lora_A=half.lora_A.half(), lora_B=half.lora_B.half())
    adapter = Adapter(modules=(linear("a", rank=2, alpha=2.0), half))
    adaptertools.write(adapter, tmp_path / "out.pt", format="loralib")
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert written["b.lora_A"].dtype == torch.float16
    assert written["b.lora_B"].dtype == torch.float32


def test_without_the_sidecar_alpha_is_asked_for_again(tmp_path: Path) -> None:
    adaptertools.write(Adapter(modules=(linear(),)), tmp_path / "out.pt", format="loralib")
    (tmp_path / "out.pt.adaptertools.json").unlink()
    with pytest.raises(MissingAlphaError):
        adaptertools.read(tmp_path / "out.pt")
    (module,) = adaptertools.read(tmp_path / "out.pt", alpha=4).modules
    assert module.scaling == 2.0


def test_a_sidecar_of_another_file_is_not_used(tmp_path: Path) -> None:
    adaptertools.write(Adapter(modules=(linear(),)), tmp_path / "out.pt", format="loralib")
    save(tmp_path / "out.pt", pair("x.q_proj"))
    with pytest.raises(MissingAlphaError, match=r"out\.pt\.adaptertools\.json was written for other weights"):
        adaptertools.read(tmp_path / "out.pt")
    assert any("other weights" in note for note in adaptertools.read(tmp_path / "out.pt", alpha=2).notes)


def test_an_alpha_that_contradicts_the_sidecar_counts_and_is_said(tmp_path: Path) -> None:
    adaptertools.write(Adapter(modules=(linear(alpha=4.0),)), tmp_path / "out.pt", format="loralib")
    adapter = adaptertools.read(tmp_path / "out.pt", alpha=6.0)
    assert adapter.modules[0].scaling == 3.0
    assert any("alpha 6.0 was given" in note for note in adapter.notes)
    assert adaptertools.read(tmp_path / "out.pt", alpha=4.0).notes == ()


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": "16"},
        {"layers": []},
        {"layers": {"x.q_proj": 3}},
        {"stored_weights": {"y": "friend"}},
        {"bases": {"": 1}},
        {"metadata": 1},
    ],
)
def test_a_sidecar_that_is_not_understood_is_an_error_of_ours(change: dict[str, Any], tmp_path: Path) -> None:
    _spoil(tmp_path, lambda document: document.update(change))
    with pytest.raises(ConfigError, match=next(iter(change))):
        adaptertools.read(tmp_path / "out.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"layer": "Quadratic"},
        {"alpha": None},
        {"alpha": True},
        {"scale_rule": "beta"},
        {"enable_lora": [1, 0]},
        {"enable_lora": [False]},
        {"weight_shape": [0, -1]},
        {"fan_in_fan_out": "yes"},
        {"layer": "Conv2d"},
    ],
)
def test_a_layer_of_the_sidecar_that_is_not_understood_is_an_error_of_ours(
    change: dict[str, Any], tmp_path: Path
) -> None:
    _spoil(tmp_path, lambda document: document["layers"]["x.q_proj"].update(change))
    with pytest.raises(ConfigError, match=r"x\.q_proj"):
        adaptertools.read(tmp_path / "out.pt")


def _spoil(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    adaptertools.write(Adapter(modules=(linear(),)), folder / "out.pt", format="loralib")
    sidecar = folder / "out.pt.adaptertools.json"
    document = json.loads(sidecar.read_text())
    change(document)
    sidecar.write_text(json.dumps(document))


def slot(start: int, stop: int, total: int, **fields: Any) -> LoraModule:
    size = stop - start
    return LoraModule(
        target=Target(parameter="qkv", rows=RowSlice(start=start, stop=stop, total=total)),
        lora_A=torch.ones(fields.pop("rank", 2), 4),
        lora_B=torch.ones(size, fields.pop("columns", 2)),
        alpha=4.0,
        **fields,
    )


@pytest.mark.parametrize(
    "modules",
    [
        (slot(0, 4, 8), slot(4, 6, 8)),
        (slot(0, 4, 9),),
        (slot(1, 3, 8),),
        (slot(0, 4, 8), slot(4, 8, 8, rank=3, columns=3)),
        (slot(0, 4, 8), slot(4, 8, 8, transposed=True)),
    ],
)
def test_slots_that_merged_linear_cannot_hold_are_refused(modules: tuple[LoraModule, ...], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="MergedLinear"):
        adaptertools.write(Adapter(modules=modules), tmp_path / "out.pt", format="loralib")
    assert list(tmp_path.iterdir()) == []


def test_a_peft_convolution_is_refused(tmp_path: Path) -> None:
    conv = linear(kind=Kind.CONV, shape=(3, 5, 1, 1))
    adaptertools.write(Adapter(modules=(conv,)), tmp_path / "one_by_one.pt", format="loralib")
    wide = linear(kind=Kind.CONV, shape=(3, 2, 2, 2), lora_A=torch.ones(2, 8))
    with pytest.raises(UnsupportedFeatureError, match="Conv2d"):
        adaptertools.write(Adapter(modules=(wide,)), tmp_path / "out.pt", format="loralib")


def test_a_model_of_several_is_refused(tmp_path: Path) -> None:
    unet, text = (replace(linear(), target=Target(parameter="q", component=name)) for name in ("unet", "text_encoder"))
    with pytest.raises(UnsupportedFeatureError, match="unet"):
        adaptertools.write(Adapter(modules=(unet, text)), tmp_path / "out.pt", format="loralib")
    report = adaptertools.write(Adapter(modules=(unet,)), tmp_path / "out.pt", format="loralib")
    assert "the adapter is for 'unet'; a loralib file does not record that" in report.notes


def test_whole_weights_alone_are_refused(tmp_path: Path) -> None:
    adapter = Adapter(full_weights={"head.weight": FullWeight(weight=torch.ones(2, 2))})
    with pytest.raises(UnsupportedFeatureError, match="factors"):
        adaptertools.write(adapter, tmp_path / "out.pt", format="loralib")


def test_building_notes_name_orientation_and_slots(tmp_path: Path) -> None:
    path, options, _ = case("gpt2_wrapped")
    notes = adaptertools.write(adaptertools.read(path, **options), tmp_path / "out.pt", format="loralib").notes
    assert any("lora_alpha=32" in note for note in notes)
    assert any("fan_in_fan_out=True" in note and "h.0.attn.c_attn" in note for note in notes)
    assert any("enable_lora=[True, False, True]" in note for note in notes)


def test_base_history_and_metadata_survive(tmp_path: Path) -> None:
    adapter = Adapter(
        modules=(linear(),),
        bases={"": Base(id="org/model", revision="abc")},
        metadata={"peft": {"task_type": "SEQ_CLS"}},
    )
    adapter = adaptertools.rescale(adapter, 8)
    for container in ("torch", "safetensors"):
        path = tmp_path / container
        adaptertools.write(adapter, path, format="loralib", container=container)
        again = adaptertools.read(path)
        assert again.bases == adapter.bases
        assert again.metadata == adapter.metadata
        assert [entry.operation for entry in again.history] == ["rescale"]


def test_a_sidecar_that_describes_what_is_not_there_is_refused() -> None:
    tensors, config = Adapter(modules=(linear("a"), linear("b"))).to_state_dict(format="loralib")
    only_a = {key: tensor for key, tensor in tensors.items() if key.startswith("a")}
    with pytest.raises(ConfigError, match="describes b"):
        adaptertools.from_state_dict(only_a, config, format="loralib")


def test_both_names_that_newer_loralib_gives_a_convolution_are_one(tmp_path: Path) -> None:
    path, options, _ = case("every_layer_bias_all")
    tensors = torch.load(path, weights_only=True)
    twice = save(tmp_path / "twice.pt", tensors | {"conv.bias": tensors["conv.conv.bias"].clone()})
    assert (
        adaptertools.read(twice, **options).full_weights.keys()
        == adaptertools.read(path, **options).full_weights.keys()
    )
    other = save(tmp_path / "other.pt", tensors | {"conv.bias": tensors["conv.conv.bias"] + 1})
    with pytest.raises(DuplicateTargetError, match=r"conv\.bias stands twice"):
        adaptertools.read(other, **options)


def test_a_safetensors_file_of_flax_is_not_claimed(tmp_path: Path) -> None:
    save_file(pair("x"), tmp_path / "x.safetensors", metadata={"format": "flax"})
    assert not formats.get("loralib").detect(Source(tmp_path / "x.safetensors"))
    save_file(pair("x"), tmp_path / "y.safetensors", metadata={"format": "pt"})
    assert formats.get("loralib").detect(Source(tmp_path / "y.safetensors"))


def test_in_memory_tensors_may_come_with_alpha_alone() -> None:
    adapter = adaptertools.from_state_dict(pair("x.q"), {"lora_alpha": 8}, format="loralib")
    assert adapter.modules[0].scaling == 4.0


# To PEFT and back


@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_peft_to_loralib_to_peft_is_bit_for_bit(container: str, tmp_path: Path) -> None:
    modules = (
        linear("model.layers.0.q_proj", rank=4, alpha=16.0),
        linear("model.layers.0.v_proj", rank=2, alpha=16.0),
        linear("model.embed_tokens", rank=2, alpha=16.0, kind=Kind.EMBEDDING, transposed=True),
    )
    full = {
        "score.weight": FullWeight(weight=torch.randn(2, 5)),
        "model.layers.0.q_proj.bias": FullWeight(weight=torch.randn(3), role=WeightRole.BIAS),
    }
    adapter = Adapter(modules=modules, full_weights=full, bases={"": Base(id="org/model")})
    first = adaptertools.write(adapter, tmp_path / "peft", format="peft").path
    middle = adaptertools.convert(first, tmp_path / "lora", to="loralib", container=container)
    assert middle.exact
    adaptertools.convert(middle.path, tmp_path / "again", to="peft")
    one = load_file(first / "adapter_model.safetensors")
    other = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (first, tmp_path / "again")]
    assert configs[0] == configs[1]
    for path in (middle.path, tmp_path / "again"):
        assert adaptertools.diff(adapter, adaptertools.read(path), tolerance=0).same


def test_rslora_survives_where_the_factors_do(tmp_path: Path) -> None:
    rslora = linear("model.q_proj", rank=4, alpha=16.0, scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK)
    first = adaptertools.write(Adapter(modules=(rslora,)), tmp_path / "peft", format="peft").path
    adaptertools.convert(first, tmp_path / "lora.pt", to="loralib")
    adaptertools.convert(tmp_path / "lora.pt", tmp_path / "again", to="peft")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"], config["r"]) == (True, 16, 4)
    assert adaptertools.diff(Adapter(modules=(rslora,)), adaptertools.read(tmp_path / "again"), tolerance=0).same


def test_a_loralib_convolution_is_no_peft_convolution(tmp_path: Path) -> None:
    path, options, _ = case("every_layer_bias_none")
    adapter = adaptertools.read(path, **options)
    (conv,) = (module for module in adapter.modules if module.kind is Kind.CONV)
    assert (conv.rank, conv.nominal_rank, conv.alpha, conv.scaling) == (6, 2, 6, 3.0)


def test_the_file_is_found_in_a_folder_with_other_things(tmp_path: Path) -> None:
    shutil.copy(ROBERTA, tmp_path / "lora.bin")
    (tmp_path / "notes.txt").write_text("")
    torch.save({"x.weight": torch.ones(2)}, tmp_path / "head.pt")
    assert len(adaptertools.read(tmp_path, alpha=16).modules) == 6


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_raise_errors_of_ours_alone(data: st.DataObject, tmp_path: Path) -> None:
    path, options, _ = case("every_layer_bias_all")
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 4)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "damaged.pt").write_bytes(content)
    try:
        adapter = adaptertools.read(tmp_path / "damaged.pt", **options)
    except AdapterToolsError:
        return
    assert adapter.modules


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_sidecar_raises_errors_of_ours_alone(data: st.DataObject, tmp_path: Path) -> None:
    adapter = Adapter(modules=(linear(), slot(0, 4, 8)), bases={"": Base(id="x")})
    adaptertools.write(adapter, tmp_path / "out.pt", format="loralib", overwrite=(tmp_path / "out.pt").exists())
    sidecar = tmp_path / "out.pt.adaptertools.json"
    document = json.loads(sidecar.read_text())
    values = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.just([]), st.just({}), st.just([1, 2]))
    home = data.draw(st.sampled_from([document, *document["layers"].values(), document["bases"][""]]))
    home[data.draw(st.sampled_from(sorted(home)))] = data.draw(values)
    sidecar.write_text(json.dumps(document))
    try:
        assert adaptertools.read(tmp_path / "out.pt").modules
    except AdapterToolsError:
        pass
    finally:
        sidecar.unlink()
        (tmp_path / "out.pt").unlink()
