"""The diffusers format: files of real diffusers, every spelling of its keys, and what is written."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import assert_diff_proves
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import tensor

import adaptertools
from adaptertools.adapter import Adapter, Base, HistoryEntry, Kind, LoraModule, RowSlice, ScaleRule, Target
from adaptertools.containers.source import Source
from adaptertools.dialects.diffusers import flux
from adaptertools.dialects.diffusers.keys import parse_key
from adaptertools.dialects.diffusers.sgm import diffusers_name
from adaptertools.errors import (
    AmbiguousFormatError,
    ConfigError,
    OptionError,
    UnknownFormatError,
    UnsupportedFeatureError,
)
from adaptertools.formats import detect

FIXTURES = Path(__file__).parents[1] / "fixtures" / "diffusers"
CASES = sorted(case.parent.name for case in FIXTURES.glob("*/case.json"))
FILE = "pytorch_lora_weights.safetensors"
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def module(
    name: str = QUERY, shape: tuple[int, ...] = (6, 4), rank: int = 2, component: str = "unet", **fields: Any
) -> LoraModule:
    """An adapted layer; a convolution where the shape has more than two sizes."""
    seed = sum(map(ord, component + name))
    columns = int(torch.tensor(shape[1:]).prod())
    is_conv = len(shape) > 2
    return LoraModule(
        target=Target(parameter=name, component=component),
        lora_A=tensor((rank, columns), fields.get("dtype", torch.float32), seed),
        lora_B=tensor((shape[0], rank), fields.pop("dtype", torch.float32), seed + 1),
        alpha=fields.pop("alpha", float(rank)),
        kind=Kind.CONV if is_conv else Kind.LINEAR,
        shape=shape if is_conv else None,
        **fields,
    )


def adapter_of(*modules: LoraModule, **fields: Any) -> Adapter:
    return Adapter(modules=modules, **fields)


def dense(one: LoraModule) -> torch.Tensor:
    """ΔW in float64, of the factors as they stand."""
    return one.lora_B.double() @ one.lora_A.double() * one.scaling


def state(one: LoraModule, prefix: str = "unet.") -> dict[str, torch.Tensor]:
    """The keys of one layer as diffusers writes them."""
    home = prefix + one.target.parameter
    return {f"{home}.lora_A.weight": one.lora_A, f"{home}.lora_B.weight": one.lora_B}


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_diffusers_is_read_with_the_delta_weights_that_it_fuses(name: str, tmp_path: Path) -> None:
    said = json.loads((FIXTURES / name / "case.json").read_text())
    path = FIXTURES / name / said["file"]
    if detect(Source(path)) == "kohya":
        adaptertools.convert(path, tmp_path / FILE, to="diffusers")
        path = tmp_path / FILE
    assert detect(Source(path)) == "diffusers"
    base = FIXTURES / name / "base.safetensors"
    weights = load_file(base) if base.exists() else {}
    expected = load_file(FIXTURES / name / "expected.safetensors")
    modules = {f"{m.target.component}:{m.target.parameter}": m for m in adaptertools.read(path).modules}
    assert modules.keys() == expected.keys()
    for key, delta in expected.items():
        assert delta.abs().max() > 0.01
        found = modules[key].delta_weight(base_weight=weights.get(key))
        torch.testing.assert_close(found, delta, rtol=1e-5, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("scale", ["fold", "metadata"])
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("flux")])
def test_it_is_written_again_with_the_same_meaning(name: str, scale: str, tmp_path: Path) -> None:
    path = FIXTURES / name / json.loads((FIXTURES / name / "case.json").read_text())["file"]
    before = adaptertools.read(path)
    report = adaptertools.write(before, tmp_path / FILE, format="diffusers", scale=scale)
    after = adaptertools.read(tmp_path / FILE)
    assert_diff_proves(before, after, report)
    if scale == "metadata":
        assert report.exact
        assert [(m.rank, m.alpha, m.scale_rule) for m in before.modules] == [
            (m.rank, m.alpha, m.scale_rule) for m in after.modules
        ]


@pytest.mark.parametrize(
    ("key", "component", "path", "leaf"),
    [
        (f"unet.{QUERY}.lora_A.weight", "unet", QUERY, "lora_A"),
        (f"unet.{QUERY}.lora_A.default.weight", "unet", QUERY, "lora_A"),
        (f"transformer_2.{QUERY}.lora_B.bias", "transformer_2", QUERY, "lora_bias"),
        (f"connectors.{QUERY}.lora_magnitude_vector", "connectors", QUERY, "lora_magnitude_vector"),
        (f"unet.{QUERY}.lora.up.weight", "unet", QUERY, "lora_B"),
        ("text_encoder_2.a.mlp.fc1.lora_linear_layer.down.weight", "text_encoder_2", "a.mlp.fc1", "lora_A"),
        ("unet.a.attn1.processor.to_q_lora.up.weight", "unet", "a.attn1.to_q", "lora_B"),
        ("a.attn1.processor.to_out_lora.down.weight", None, "a.attn1.to_out.0", "lora_A"),
        ("unet.a.attn1.processor.add_k_proj_lora.down.weight", "unet", "a.attn1.add_k_proj", "lora_A"),
        ("text_encoder.a.self_attn.to_q_lora.down.weight", "text_encoder", "a.self_attn.q_proj", "lora_A"),
        ("text_encoder.a.self_attn.to_out_lora.up.weight", "text_encoder", "a.self_attn.out_proj", "lora_B"),
        (f"transformer.{QUERY}.alpha", "transformer", QUERY, "alpha"),
        (f"unet.{QUERY}.lora.alpha", "unet", QUERY, "alpha"),
        ("unet.a.attn1.processor.to_out_lora.alpha", "unet", "a.attn1.to_out.0", "alpha"),
        ("unet.a.attn1.processor.to_q_lora.down.weight.alpha", "unet", "a.attn1.to_q", "alpha"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model", "blocks.0.self_attn.q", "lora_A"),
    ],
)
def test_every_spelling_of_a_key_is_understood(key: str, component: str | None, path: str, leaf: str) -> None:
    found = parse_key(key)
    assert found is not None
    assert (found.component, found.path, found.leaf) == (component, path, leaf)


@pytest.mark.parametrize(
    "key",
    ["unet.conv_in.weight", "unet.a.hada_w1_a", "lora_unet_a.lora_down.weight", "unet.a.lora_C.weight", "unet.bias"],
)
def test_a_key_of_others_is_not_taken_for_one_of_diffusers(key: str) -> None:
    assert parse_key(key) is None


def test_alphas_count_where_no_metadata_stands_and_the_rest_is_scaled_by_one(tmp_path: Path) -> None:
    other = module("conv_in", (6, 4, 3, 3), rank=3)
    shaped = {
        "unet.conv_in.lora_A.weight": other.lora_A.reshape(3, 4, 3, 3),
        "unet.conv_in.lora_B.weight": other.lora_B.reshape(6, 3, 1, 1),
    }
    tensors = {**state(module()), f"unet.{QUERY}.alpha": torch.tensor(5.0), **shaped}
    save_file(tensors, tmp_path / FILE)
    adapter = adaptertools.read(tmp_path / FILE)
    assert {m.target.parameter: m.scaling for m in adapter.modules} == {QUERY: 2.5, "conv_in": 1.0}
    assert any("1 module has no alpha, such as conv_in" in note for note in adapter.notes)
    (conv,) = [m for m in adapter.modules if m.kind is Kind.CONV]
    expected = torch.einsum("or,rikl->oikl", other.lora_B, other.lora_A.reshape(3, 4, 3, 3))
    torch.testing.assert_close(conv.delta_weight(), expected)


@pytest.mark.parametrize("root", [True, False])
def test_metadata_counts_as_the_configuration_of_peft_would(root: bool, tmp_path: Path) -> None:
    modules = [module(f"down_blocks.{n}.attn.{leaf}", rank=r) for n in (0, 1) for leaf, r in (("to_q", 2), ("to_v", 4))]
    fields = {
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": root,
        "rank_pattern": {"to_q": 2},
        "alpha_pattern": {r"^down_blocks\.0\..*": 3, "to_q": 5},
    }
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in fields.items()})}
    tensors = {key: value for one in modules for key, value in state(one).items()}
    save_file(tensors, tmp_path / FILE, metadata=metadata)
    found = {m.target.parameter: m.scaling for m in adaptertools.read(tmp_path / FILE).modules}
    alphas = {"down_blocks.0.attn.to_q": 3, "down_blocks.0.attn.to_v": 3, "down_blocks.1.attn.to_q": 5}
    for one in modules:
        alpha = alphas.get(one.target.parameter, 6)
        assert found[one.target.parameter] == alpha / (one.rank**0.5 if root else one.rank)


def test_a_folder_with_both_files_is_read_where_they_are_the_same(tmp_path: Path) -> None:
    save_file(state(module()), tmp_path / FILE)
    torch.save(state(module()), tmp_path / "pytorch_lora_weights.bin")
    adapter = adaptertools.read(tmp_path)
    assert adapter.origin is not None
    assert adapter.origin.container == "safetensors"
    assert any("holds the same tensors" in note for note in adapter.notes)
    changed = {key: value + 1 for key, value in state(module()).items()}
    torch.save(changed, tmp_path / "pytorch_lora_weights.bin")
    assert detect(Source(tmp_path)) == "diffusers"
    with pytest.raises(AmbiguousFormatError, match=r"2 of 2 tensors differ.*name the file that is meant"):
        adaptertools.read(tmp_path)
    by_name = adaptertools.read(tmp_path / "pytorch_lora_weights.bin").modules[0]
    assert torch.equal(by_name.lora_A, changed[f"unet.{QUERY}.lora_A.weight"])


def test_keys_without_a_component_need_a_name_or_a_header_that_says_what_they_are(tmp_path: Path) -> None:
    save_file(state(module(), ""), tmp_path / "model.safetensors")
    with pytest.raises(UnknownFormatError):
        adaptertools.read(tmp_path / "model.safetensors")
    shutil.copy(tmp_path / "model.safetensors", tmp_path / FILE)
    assert str(adaptertools.read(tmp_path / FILE).modules[0].target) == QUERY
    assert str(adaptertools.read(tmp_path / FILE, component="unet").modules[0].target) == f"unet:{QUERY}"
    named = adaptertools.read(tmp_path / "model.safetensors", format="diffusers", component="transformer")
    assert named.modules[0].target.component == "transformer"
    with pytest.raises(OptionError, match="no component of a pipeline"):
        adaptertools.read(tmp_path / FILE, component="vae-decoder")


def test_attention_processors_without_a_component_are_those_of_the_unet(tmp_path: Path) -> None:
    home = "mid_block.attentions.0.attn1.processor.to_out_lora"
    tensors = {f"{home}.down.weight": torch.ones(2, 4), f"{home}.up.weight": torch.ones(6, 2)}
    torch.save(tensors, tmp_path / "anything.bin")
    (found,) = adaptertools.read(tmp_path / "anything.bin").modules
    assert str(found.target) == "unet:mid_block.attentions.0.attn1.to_out.0"


def test_a_name_that_starts_like_a_component_comes_back_as_it_was(tmp_path: Path) -> None:
    adapter = adapter_of(module("transformer.h.0.attn", component=""))
    adaptertools.write(adapter, tmp_path / "out.safetensors", format="diffusers")
    assert adaptertools.read(tmp_path / "out.safetensors").modules[0].target == adapter.modules[0].target


def test_magnitudes_that_the_metadata_denies_count_only_if_the_caller_says_so(tmp_path: Path) -> None:
    tensors = {**state(module()), f"unet.{QUERY}.lora_magnitude_vector": torch.ones(6)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.use_dora": False})}
    save_file(tensors, tmp_path / FILE, metadata=metadata)
    with pytest.raises(ConfigError, match="use_dora is false"):
        adaptertools.read(tmp_path / FILE)
    assert adaptertools.read(tmp_path / FILE, dora=True).modules[0].magnitude is not None
    left = adaptertools.read(tmp_path / FILE, dora=False)
    assert left.modules[0].magnitude is None
    assert "left out: the DoRA magnitudes, as asked for" in left.notes


def test_a_folded_file_says_nothing_of_scales_and_has_one_rank(tmp_path: Path) -> None:
    adapter = adapter_of(
        module(alpha=3.0),
        module("conv_in", (6, 4, 3, 3), rank=5, alpha=0.7),
        module("text_model.encoder.layers.0.self_attn.q_proj", component="text_encoder", rank=3, alpha=0.9),
    )
    report = adaptertools.write(adapter, tmp_path / FILE, format="diffusers")
    tensors = load_file(tmp_path / FILE)
    assert "lora_adapter_metadata" not in header(tmp_path / FILE)
    assert not any("alpha" in key for key in tensors)
    assert tensors[f"unet.{QUERY}.lora_A.weight"].shape == (5, 4)
    assert tensors["unet.conv_in.lora_B.weight"].shape == (6, 5, 1, 1)
    for one in adapter.modules:
        home = f"{one.target.component}.{one.target.parameter}"
        product = tensors[f"{home}.lora_B.weight"].double().flatten(1) @ tensors[
            f"{home}.lora_A.weight"
        ].double().flatten(1)
        torch.testing.assert_close(product, dense(one), rtol=1e-6, atol=1e-6)
    assert any("ranks 2 to 5 of unet are all written as 5" in note for note in report.notes)
    assert report.max_relative_error < 1e-7


def test_metadata_states_ranks_and_alphas_of_each_component_exactly(tmp_path: Path) -> None:
    adapter = adapter_of(
        module(alpha=3.0),
        module("conv_in", (6, 4, 3, 3), rank=5, alpha=0.7),
        module("conv_out", (6, 4, 3, 3), rank=5, alpha=0.7),
        module(
            "a.self_attn.q_proj", component="text_encoder", rank=3, alpha=0.9, scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK
        ),
    )
    report = adaptertools.write(adapter, tmp_path / FILE, format="diffusers", scale="metadata")
    assert report.exact
    fields = json.loads(header(tmp_path / FILE)["lora_adapter_metadata"])
    assert (fields["unet.r"], fields["unet.lora_alpha"], fields["unet.use_rslora"]) == (5, 0.7, False)
    assert list(fields["unet.rank_pattern"].values()) == [2]
    assert (fields["text_encoder.r"], fields["text_encoder.lora_alpha"]) == (3, 0.9)
    assert fields["text_encoder.use_rslora"] is True
    after = adaptertools.read(tmp_path / FILE)
    assert {(str(m.target), m.rank, m.scaling) for m in after.modules} == {
        (str(m.target), m.rank, m.scaling) for m in adapter.modules
    }
    assert after.origin is not None
    assert after.origin.options == {"scale": "metadata"}


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_metadata_comes_back_with_every_scaling_as_it_was(data: st.DataObject) -> None:
    from adaptertools import formats
    from adaptertools.encoding import Encoder

    rules = data.draw(st.lists(st.sampled_from(list(ScaleRule)), min_size=1, max_size=4))
    modules = [
        module(
            f"block.{index}",
            rank=data.draw(st.integers(1, 5)),
            alpha=data.draw(st.sampled_from((0.1, 1.0, 7.0))),
            scale_rule=rule,
        )
        for index, rule in enumerate(rules)
    ]
    encoder = Encoder()
    artifact = formats.get("diffusers").write(adapter_of(*modules), encoder, container="safetensors", scale="metadata")
    fields = json.loads(artifact.metadata["lora_adapter_metadata"])
    for one in modules:
        name = one.target.parameter
        at = {
            key: fields[f"unet.{key}_pattern"].get(f"^{name}$".replace(".", r"\."), None) for key in ("rank", "alpha")
        }
        rank, alpha = (
            at["rank"] or fields["unet.r"],
            at["alpha"] if at["alpha"] is not None else fields["unet.lora_alpha"],
        )
        assert rank == one.rank
        scaling = alpha / (rank**0.5 if fields["unet.use_rslora"] else rank)
        assert scaling == pytest.approx(one.scaling, rel=1e-15)
        if not encoder.losses:
            assert scaling == one.scaling


def test_the_prefix_is_that_of_the_model_and_leaves_text_encoders_alone(tmp_path: Path) -> None:
    adapter = adapter_of(module(component=""), module("a.fc1", component="text_encoder"))
    with pytest.raises(UnsupportedFeatureError, match="belongs to no component"):
        adaptertools.write(adapter, tmp_path / FILE, format="diffusers")
    adaptertools.write(adapter, tmp_path / FILE, format="diffusers", prefix="unet")
    keys = set(load_file(tmp_path / FILE))
    assert f"unet.{QUERY}.lora_A.weight" in keys
    assert "text_encoder.a.fc1.lora_linear_layer.down.weight" in keys
    two = adapter_of(module(component="transformer"), module(component="transformer_2"))
    with pytest.raises(OptionError, match="write each with --only"):
        adaptertools.write(two, tmp_path / "two.safetensors", format="diffusers", prefix="unet")
    with pytest.raises(OptionError, match="no component of a pipeline"):
        adaptertools.write(adapter, tmp_path / "odd.safetensors", format="diffusers", prefix="lora_unet_")


def test_a_file_without_component_says_how_it_is_loaded(tmp_path: Path) -> None:
    report = adaptertools.write(adapter_of(module(component="")), tmp_path / FILE, format="diffusers")
    assert any("prefix=None" in note for note in report.notes)
    assert set(load_file(tmp_path / FILE)) == {f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"}


def test_what_one_component_cannot_say_is_refused_by_name(tmp_path: Path) -> None:
    dora = module("conv_in", magnitude=torch.ones(6))
    with pytest.raises(UnsupportedFeatureError, match=f"unet:{QUERY} without DoRA"):
        adaptertools.write(adapter_of(module(), dora), tmp_path / FILE, format="diffusers")
    adaptertools.write(adapter_of(module(component="transformer"), dora), tmp_path / FILE, format="diffusers")
    both = replace(dora, lora_bias=torch.ones(6))
    with pytest.raises(UnsupportedFeatureError, match="no DoRA with lora_bias"):
        adaptertools.write(adapter_of(both), tmp_path / "both.safetensors", format="diffusers")
    opaque = replace(module(), target=Target(parameter="down_blocks_0_attn", component="unet", opaque=True))
    with pytest.raises(UnsupportedFeatureError, match="down_blocks_0_attn: names that could not be turned back"):
        adaptertools.write(adapter_of(opaque), tmp_path / "opaque.safetensors", format="diffusers")
    with pytest.raises(OptionError, match="scale is"):
        adaptertools.write(adapter_of(module()), tmp_path / "odd.safetensors", format="diffusers", scale="alpha")


@pytest.mark.parametrize("scale", ["fold", "metadata"])
def test_a_bias_is_given_to_all_layers_of_a_component_that_has_one(scale: str, tmp_path: Path) -> None:
    adapter = adapter_of(module(alpha=5.0, lora_bias=torch.full((6,), 3.0)), module("conv_in"))
    adaptertools.write(adapter, tmp_path / FILE, format="diffusers", scale=scale)
    tensors = load_file(tmp_path / FILE)
    assert torch.equal(tensors["unet.conv_in.lora_B.bias"], torch.zeros(6))
    found = {m.target.parameter: m for m in adaptertools.read(tmp_path / FILE).modules}[QUERY]
    assert found.lora_bias is not None
    assert torch.equal(found.lora_bias * found.scaling, torch.full((6,), 7.5))


def test_history_bases_and_entries_of_others_stay_in_the_header_and_stale_ones_go(tmp_path: Path) -> None:
    metadata = {
        "modelspec.title": "Toy",
        "sshs_model_hash": "0xdead",
        "modelspec.hash_sha256": "0xdead",
        "format": "pt",
    }
    save_file(state(module()), tmp_path / FILE, metadata=metadata)
    adapter = replace(adaptertools.read(tmp_path / FILE), bases={"unet": Base(id="org/sd", revision="main")})
    out = tmp_path / "out.safetensors"
    entry = HistoryEntry(operation="rescale", source="x")
    adaptertools.write(adapter, out, format="diffusers", operation=entry)
    strings = header(out)
    assert strings["modelspec.title"] == "Toy"
    assert strings["format"] == "pt"
    assert not {"sshs_model_hash", "modelspec.hash_sha256"} & strings.keys()
    again = adaptertools.read(out)
    assert again.bases == {"unet": Base(id="org/sd", revision="main")}
    assert [entry.operation for entry in again.history] == ["rescale"]


def test_a_base_model_says_which_names_it_does_not_have(tmp_path: Path) -> None:
    save_file({f"{QUERY}.weight": torch.zeros(6, 4)}, tmp_path / "base.safetensors")
    adaptertools.write(adapter_of(module(), module("conv_in")), tmp_path / FILE, format="diffusers")
    notes = adaptertools.read(tmp_path / FILE, base=tmp_path / "base.safetensors").notes
    assert any("lacks 1 parameter that the adapter changes, such as conv_in" in note for note in notes)


def flux_modules(
    width: int = 8, rank: Callable[[int], int] = lambda index: 1 + index % 3, **fields: Any
) -> list[LoraModule]:
    """A layer of every kind that Flux.1 has, by diffusers' names."""
    modules = []
    for index, name in enumerate(flux.NATIVE_NAMES):
        if any(part.isdigit() and int(part) > 1 for part in name.split(".")[1:2]):
            continue
        rows = {"proj_mlp": 4, "proj": 4, "linear": 2}.get(name.rpartition(".")[2], 1) * width
        made = module(name, (rows, width), rank(index), component="transformer", alpha=1.0 + index % 2, **fields)
        modules.append(made)
    return modules


def published(adapter: Adapter) -> dict[str, torch.Tensor]:
    """ΔW by published names, rows of fused projections put together by hand."""
    names = {
        "attn.to_q": 0,
        "attn.to_k": 1,
        "attn.to_v": 2,
        "proj_mlp": 3,
        "attn.add_q_proj": 0,
        "attn.add_k_proj": 1,
        "attn.add_v_proj": 2,
    }
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for one in adapter.modules:
        native = flux.NATIVE_NAMES[one.target.parameter][0]
        delta = dense(one)
        if native.endswith("adaLN_modulation.1"):
            delta = torch.cat([delta[len(delta) // 2 :], delta[: len(delta) // 2]])
        place = next((at for end, at in names.items() if one.target.parameter.endswith(end)), 0)
        found.setdefault(native, []).append((place, delta))
    return {name: torch.cat([delta for _, delta in sorted(parts, key=lambda p: p[0])]) for name, parts in found.items()}


def test_flux_is_fused_for_kohya_and_comes_back_with_the_factors_that_it_had(tmp_path: Path) -> None:
    """No base model and no record of ours: the flat names are a closed set."""
    adapter = adapter_of(*flux_modules(rank=lambda index: 2))
    adaptertools.write(adapter, tmp_path / "kohya.safetensors", format="kohya")
    tensors = load_file(tmp_path / "kohya.safetensors")
    save_file(tensors, tmp_path / "kohya.safetensors")
    for name, delta in published(adapter).items():
        home = f"lora_unet_{name.replace('.', '_')}"
        scaling = float(tensors[f"{home}.alpha"]) / tensors[f"{home}.lora_down.weight"].shape[0]
        product = tensors[f"{home}.lora_up.weight"].double() @ tensors[f"{home}.lora_down.weight"].double() * scaling
        torch.testing.assert_close(product, delta, rtol=1e-6, atol=1e-6)
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (6, 8)
    assert tensors["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (8, 8)
    adaptertools.convert(tmp_path / "kohya.safetensors", tmp_path / FILE, to="diffusers")
    after = {m.target: m for m in adaptertools.read(tmp_path / FILE).modules}
    assert after.keys() == {m.target for m in adapter.modules}
    for one in adapter.modules:
        assert after[one.target].rank == 2
        assert torch.equal(after[one.target].lora_A, one.lora_A)
        torch.testing.assert_close(dense(after[one.target]), dense(one), rtol=1e-6, atol=1e-7)


def test_a_fused_projection_of_flux_that_is_not_sparse_shares_its_lora_a(tmp_path: Path) -> None:
    home = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = tensor((4, 8), torch.float32, 1), tensor((24, 4), torch.float32, 2)
    save_file(
        {f"{home}.lora_down.weight": down, f"{home}.lora_up.weight": up, f"{home}.alpha": torch.tensor(2.0)},
        tmp_path / "k.safetensors",
    )
    adaptertools.convert(tmp_path / "k.safetensors", tmp_path / FILE, to="diffusers")
    modules = adaptertools.read(tmp_path / FILE).modules
    assert [m.target.parameter.rpartition(".")[2] for m in modules] == ["to_k", "to_q", "to_v"]
    for one, rows in zip(modules, (slice(8, 16), slice(0, 8), slice(16, 24)), strict=True):
        assert torch.equal(one.lora_A, down)
        assert torch.equal(one.lora_B, up[rows] / 2)


def test_parts_of_a_fused_projection_that_change_nothing_are_left_out(tmp_path: Path) -> None:
    names = ("to_q", "to_v")
    adapter = adapter_of(
        *(module(f"transformer_blocks.3.attn.{name}", (8, 8), 2, component="transformer") for name in names),
        module("single_transformer_blocks.2.proj_out", (8, 40), 2, component="transformer"),
    )
    adaptertools.write(adapter, tmp_path / "k.safetensors", format="kohya")
    adaptertools.convert(tmp_path / "k.safetensors", tmp_path / FILE, to="diffusers")
    assert {m.target for m in adaptertools.read(tmp_path / FILE).modules} == {m.target for m in adapter.modules}
    assert adaptertools.diff(adapter, adaptertools.read(tmp_path / FILE), tolerance=0.0).same
    assert adaptertools.diff(adapter, adaptertools.read(tmp_path / "k.safetensors"), tolerance=0.0).same


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_stacking_and_splitting_flux_keeps_the_delta_weights_whatever_the_ranks(data: st.DataObject) -> None:
    from adaptertools.encoding import Encoder

    ranks = data.draw(st.lists(st.integers(1, 4), min_size=7, max_size=7))
    alphas = data.draw(st.lists(st.sampled_from((1.0, 2.0, 0.3)), min_size=7, max_size=7))
    names = [*(f"attn.{n}" for n in ("to_q", "to_k", "to_v")), "proj_mlp"]
    kept = data.draw(st.sets(st.sampled_from(names), min_size=1))
    modules = [
        module(
            f"single_transformer_blocks.1.{n}", (32 if n == "proj_mlp" else 8, 8), r, component="transformer", alpha=a
        )
        for n, r, a in zip(names, ranks, alphas, strict=False)
        if n in kept
    ]
    encoder = Encoder()
    (fused,) = flux.fused(modules, encoder)
    assert fused.target.parameter == "single_blocks.1.linear1"
    assert fused.rank == sum(m.rank for m in modules)
    again = {m.target.parameter: m for m in flux.to_diffusers([fused])}
    assert again.keys() == {m.target.parameter for m in modules}
    error = max((loss.max_relative_error for loss in encoder.losses), default=0.0)
    for one in modules:
        found = again[one.target.parameter]
        assert torch.equal(found.lora_A, one.lora_A)
        bound = (error + 1e-15) * float((one.lora_B.double().abs() @ one.lora_A.double().abs()).max()) * one.scaling
        assert float((dense(found) - dense(one)).abs().max()) <= bound + 1e-300


def test_dora_of_a_fused_projection_is_split_and_joined_by_its_rows(tmp_path: Path) -> None:
    modules = [replace(m, magnitude=torch.rand(m.out_features)) for m in flux_modules()]
    adapter = adapter_of(*modules)
    adaptertools.write(adapter, tmp_path / "k.safetensors", format="kohya")
    assert load_file(tmp_path / "k.safetensors")["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"].shape == (24, 1)
    adaptertools.convert(tmp_path / "k.safetensors", tmp_path / FILE, to="diffusers")
    after = {m.target: m for m in adaptertools.read(tmp_path / FILE).modules}
    for one in modules:
        assert torch.equal(after[one.target].magnitude, one.magnitude)
    partly = [m for m in modules if not m.target.parameter.endswith("attn.to_k")]
    with pytest.raises(UnsupportedFeatureError, match="a magnitude for all rows or none"):
        adaptertools.write(adapter_of(*partly), tmp_path / "p.safetensors", format="kohya")


def test_comfyui_gets_flux_in_published_names_and_gives_it_back(tmp_path: Path) -> None:
    adapter = adapter_of(*flux_modules())
    adaptertools.write(adapter, tmp_path / "comfy.safetensors", format="diffusers", prefix="diffusion_model")
    keys = set(load_file(tmp_path / "comfy.safetensors"))
    assert "diffusion_model.double_blocks.0.txt_attn.qkv.lora_A.weight" in keys
    assert not any("alpha" in key for key in keys)
    between = adaptertools.read(tmp_path / "comfy.safetensors")
    assert {m.target.component for m in between.modules} == {"diffusion_model"}
    again = tmp_path / "again.safetensors"
    adaptertools.write(between, again, format="diffusers")
    assert load_file(again).keys() == load_file(tmp_path / "comfy.safetensors").keys()
    adaptertools.convert(tmp_path / "comfy.safetensors", tmp_path / FILE, to="diffusers", prefix="transformer")
    assert adaptertools.diff(adapter, adaptertools.read(tmp_path / FILE)).same


def test_names_that_flux_shares_with_other_models_are_not_taken_for_its_own(tmp_path: Path) -> None:
    """HunyuanVideo has double blocks too, with other layers in them and more of them; SD3 has diffusers' names."""
    for names in (
        ("double_blocks_0_img_attn_qkv", "double_blocks_0_img_mlp_fc1"),
        ("double_blocks_0_img_attn_qkv", "double_blocks_19_img_attn_qkv"),
    ):
        opaque = [replace(module(n, (24, 8)), target=Target(parameter=n, component="unet", opaque=True)) for n in names]
        assert flux.unflatten(opaque) == opaque
        with pytest.raises(UnsupportedFeatureError, match="could not be turned back"):
            adaptertools.write(adapter_of(*opaque), tmp_path / FILE, format="diffusers")
    sd3 = [module("transformer_blocks.0.attn.to_q", (8, 8), component="transformer")]
    assert not flux.has_diffusers_names(sd3)
    wrong = replace(module("single_blocks.0.linear1", (30, 8), component="transformer"))
    with pytest.raises(UnsupportedFeatureError, match=r"30 rows at a width of 8, where Flux.1 has 56"):
        adaptertools.write(adapter_of(wrong), tmp_path / FILE, format="diffusers")


def test_a_model_without_a_name_is_compared_with_the_only_one_of_the_other(tmp_path: Path) -> None:
    adapter = adapter_of(module(component=""), module("conv_in", component=""))
    adaptertools.write(adapter, tmp_path / "peft", format="peft")
    adaptertools.convert(tmp_path / "peft", tmp_path / FILE, to="diffusers", prefix="unet")
    assert adaptertools.diff(adapter, adaptertools.read(tmp_path / FILE), tolerance=0.0).same
    changed = adapter.map_modules(lambda one: replace(one, alpha=one.alpha * 2))
    assert not adaptertools.diff(changed, adaptertools.read(tmp_path / FILE)).same


def test_the_command_line_takes_the_options(tmp_path: Path, run: Callable[..., Any]) -> None:
    save_file(state(module(), ""), tmp_path / FILE)
    dst = tmp_path / "out.safetensors"
    ran = run("convert", tmp_path / FILE, dst, "--to", "diffusers", "--in", "component=unet", "--out", "scale=metadata")
    assert ran.code == 0, ran.err
    assert f"unet.{QUERY}.lora_A.weight" in load_file(dst)
    assert "unet.r" in json.loads(header(dst)["lora_adapter_metadata"])
    assert run("inspect", dst, "--json").json["format"] == "diffusers"


def test_double_blocks_alone_are_those_of_flux_where_the_caller_says_so(tmp_path: Path) -> None:
    """SD3 has the same names. Slices of another model are joined and keep their names."""
    names = ("to_q", "to_k", "to_v")
    adapter = adapter_of(
        *(module(f"transformer_blocks.0.attn.{name}", (8, 8), 2, component="transformer") for name in names)
    )
    fused_home = "lora_unet_double_blocks_0_img_attn_qkv"
    adaptertools.write(adapter, tmp_path / "sd3.safetensors", format="kohya")
    assert not any(fused_home in key for key in load_file(tmp_path / "sd3.safetensors"))
    adaptertools.write(adapter, tmp_path / "flux.safetensors", format="kohya", model="flux")
    assert load_file(tmp_path / "flux.safetensors")[f"{fused_home}.lora_up.weight"].shape == (24, 6)
    for options in ({}, {"model": "flux"}):
        path = tmp_path / f"comfy{len(options)}.safetensors"
        report = adaptertools.write(adapter, path, format="diffusers", prefix="diffusion_model", **options)
        is_flux = any("double_blocks.0.img_attn.qkv" in key for key in load_file(path))
        assert is_flux == bool(options)
        assert any("model=flux" in note for note in report.notes) == (not options)
    rows = RowSlice(start=0, stop=8, total=24)
    slot = replace(module("a.qkv", (8, 8)), target=Target(parameter="a.qkv", component="transformer", rows=rows))
    adaptertools.write(adapter_of(*adapter.modules, slot), tmp_path / "slot.safetensors", format="kohya")
    keys = load_file(tmp_path / "slot.safetensors")
    assert "lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight" in keys
    assert keys["lora_unet_a_qkv.lora_up.weight"].shape == (24, 2)


@pytest.mark.parametrize(
    ("flat", "name"),
    [
        (
            "input_blocks_4_1_transformer_blocks_0_attn1_to_out_0",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
        ),
        ("input_blocks_8_1_proj_in", "down_blocks.2.attentions.1.proj_in"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_7_0_skip_connection", "down_blocks.2.resnets.0.conv_shortcut"),
        (
            "middle_block_1_transformer_blocks_9_ff_net_0_proj",
            "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
        ),
        ("middle_block_2_in_layers_2", "mid_block.resnets.1.conv1"),
        ("output_blocks_5_1_transformer_blocks_1_ff_net_2", "up_blocks.1.attentions.2.transformer_blocks.1.ff.net.2"),
        ("output_blocks_5_2_conv", "up_blocks.1.upsamplers.0.conv"),
        ("output_blocks_6_0_emb_layers_1", "up_blocks.2.resnets.0.time_emb_proj"),
        ("input_blocks_0_0", "conv_in"),
        ("label_emb_0_2", "add_embedding.linear_2"),
        ("down_blocks_0_attentions_0_proj_in", None),
        ("input_blocks_0_1_proj_in", None),
        ("input_blocks_4_2_proj_in", None),
        ("input_blocks_4_1_transformer_blocks_0_attn3_to_q", None),
        ("input_blocks_4_1_transformer_blocks_0_attn1_to_out", None),
        ("input_blocks_3_0_in_layers_2", None),
        ("middle_block_3_in_layers_2", None),
    ],
)
def test_names_of_the_unet_of_sdxl_turn_back(flat: str, name: str | None) -> None:
    assert diffusers_name(flat) == name


def kohya_file(path: Path, *names: str) -> Path:
    factors = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2), "alpha": torch.tensor(2.0)}
    save_file({f"{name}.{part}": value.clone() for name in names for part, value in factors.items()}, path)
    return path


def test_a_file_for_sdxl_becomes_one_of_diffusers_without_a_base(tmp_path: Path) -> None:
    clip = "text_model_encoder_layers_31_mlp_fc1"
    path = kohya_file(tmp_path / "a.safetensors", "lora_unet_middle_block_1_proj_in", f"lora_te2_{clip}")
    adaptertools.convert(path, tmp_path / "b.safetensors", to="diffusers")
    made = adaptertools.read(tmp_path / "b.safetensors")
    assert [str(m.target) for m in made.modules] == [
        "text_encoder_2:text_model.encoder.layers.31.mlp.fc1",
        "unet:mid_block.attentions.0.proj_in",
    ]
    assert adaptertools.diff(adaptertools.read(path), made).same
    adaptertools.convert(path, tmp_path / "c.safetensors", to="kohya")
    assert load_file(tmp_path / "c.safetensors").keys() == load_file(path).keys()


def test_one_name_that_this_unet_does_not_have_leaves_all_as_they_are(tmp_path: Path) -> None:
    path = kohya_file(
        tmp_path / "a.safetensors", "lora_unet_middle_block_1_proj_in", "lora_unet_middle_block_9_proj_in"
    )
    with pytest.raises(UnsupportedFeatureError, match="could not be turned back"):
        adaptertools.convert(path, tmp_path / "b.safetensors", to="diffusers")
