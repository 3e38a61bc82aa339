"""kohya files: factors, alphas, names, magnitudes and headers, against hand-made tensors and files of the libraries."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adaptertools
from adaptertools import formats
from adaptertools.adapter import Adapter, Kind, LoraModule, RowSlice, ScaleRule, Target
from adaptertools.containers.source import Source
from adaptertools.errors import (
    ConfigError,
    MatchError,
    NonFiniteError,
    OptionError,
    ShapeError,
    UnpairedFactorError,
    UnsupportedFeatureError,
)
from adaptertools.operations.select import select

FIXTURES = Path(__file__).parents[1] / "fixtures" / "kohya"
CASES = sorted(folder.name for folder in FIXTURES.iterdir())
TINY = FIXTURES / "unet_and_text_encoder"
NAME = "lora_unet_mid_block_attentions_0_proj_in"


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def group(name: str = NAME, n_out: int = 6, n_in: int = 4, rank: int = 2, **parts: torch.Tensor) -> dict[str, Any]:
    """The tensors of one linear module."""
    found = {
        "lora_down.weight": random(rank, n_in),
        "lora_up.weight": random(n_out, rank),
        "alpha": torch.tensor(1.0),
    }
    found |= {key.replace("_weight", ".weight"): tensor for key, tensor in parts.items()}
    return {f"{name}.{part}": tensor for part, tensor in found.items() if tensor is not None}


def saved(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata)
    return path


def only(path: Path, **options: Any) -> LoraModule:
    (module,) = adaptertools.read(path, **options).modules
    return module


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def assert_same_tensors(one: Path, other: Path) -> None:
    before, after = load_file(one), load_file(other)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[key].dtype, after[key].shape), key
        assert tensor.equal(after[key]), key


# Files that LyCORIS and its network for sd-scripts saved


@pytest.mark.parametrize("name", CASES)
def test_delta_weights_are_those_that_lycoris_merges(name: str) -> None:
    case = json.loads((FIXTURES / name / "case.json").read_text())
    path = FIXTURES / name / case["file"]
    expected = load_file(FIXTURES / name / "expected.safetensors")
    base = load_file(FIXTURES / name / "base.safetensors") if name == "locon" else {}
    named = adaptertools.read(path, base=FIXTURES / name / case["base"])
    assert len(named.modules) == len(expected)
    assert not any(module.target.opaque for module in named.modules)
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
    for module in named.modules:
        parameter = module.target.parameter
        flat = prefix[module.target.component] + parameter.replace(".", "_")
        delta = expected.get(parameter, expected.get(flat))
        assert delta is not None, parameter
        weight = base.get(f"{parameter}.weight")
        found = module.delta_weight(base_weight=weight)
        assert found.shape == delta.shape
        assert (found - delta).norm() < 2e-6 * delta.norm(), parameter


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_told_by_its_keys_and_written_again_bit_by_bit(name: str, tmp_path: Path) -> None:
    path = FIXTURES / name / "adapter.safetensors"
    assert formats.detect(Source(path)) == "kohya"
    assert formats.detect(Source(path.parent)) == "kohya"
    for number, options in enumerate(
        ({}, {"base": FIXTURES / name / json.loads((path.parent / "case.json").read_text())["base"]})
    ):
        adapter = adaptertools.read(path, **options)
        report = adaptertools.write(adapter, tmp_path / f"{number}.safetensors", format="kohya")
        assert report.losses == ()
        if name != "locon":  # there Tucker's core is folded
            assert_same_tensors(path, tmp_path / f"{number}.safetensors")


def test_what_training_said_is_kept_and_the_hashes_are_made_anew(tmp_path: Path) -> None:
    path = TINY / "adapter.safetensors"
    adaptertools.convert(path, tmp_path / "again.safetensors", to="kohya")
    before, after = header(path), header(tmp_path / "again.safetensors")
    hashes = {key for key in after if key.startswith("sshs_")}
    assert hashes == {"sshs_model_hash", "sshs_legacy_hash"}
    history = json.loads(after.pop("adaptertools"))["history"]
    assert [entry["operation"] for entry in history] == ["convert"]
    assert {k: v for k, v in after.items() if k not in hashes} == {k: v for k, v in before.items() if k not in hashes}
    assert after["sshs_legacy_hash"] != before["sshs_legacy_hash"]


# Hashes, against the files of the safetensors library


def library_hashes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    """As sd-scripts describes them: of the file that the library makes of the tensors and the ss_ entries."""
    data = safetensors.torch.save(tensors, {key: text for key, text in metadata.items() if key.startswith("ss_")})
    start = 8 + int.from_bytes(data[:8], "little")
    return hashlib.sha256(data[start:]).hexdigest(), hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("columns", [16, 40_000, 70_000])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float16, torch.float32, torch.bfloat16, torch.float64)])
def test_the_hashes_are_those_of_sd_scripts(columns: int, dtypes: tuple[torch.dtype, ...], tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for index, name in enumerate(("lora_unet_b", "lora_unet_a", "lora_te_c")):
        dtype = dtypes[index % len(dtypes)]
        tensors |= group(name, n_in=columns, lora_down_weight=random(2, columns, dtype=dtype))
        tensors[f"{name}.lora_up.weight"] = random(6, 2, dtype=dtypes[-1 - index % len(dtypes)])
    path = saved(tmp_path / "in.safetensors", tensors, ss_training_comment="größer «é»\n", other="x")
    adaptertools.convert(path, tmp_path / "out.safetensors", to="kohya")
    written, strings = load_file(tmp_path / "out.safetensors"), header(tmp_path / "out.safetensors")
    assert (strings["sshs_model_hash"], strings["sshs_legacy_hash"]) == library_hashes(written, strings)


def test_the_foreseen_size_is_that_of_the_file(tmp_path: Path) -> None:
    from adaptertools import api

    adapter = adaptertools.read(TINY / "adapter.safetensors")
    adaptertools.write(adapter, tmp_path / "x.safetensors", format="kohya")
    assert api.stored_size(adapter, format="kohya") == (tmp_path / "x.safetensors").stat().st_size


# Alpha


def test_a_module_without_alpha_has_the_scaling_one_and_is_written_with_its_rank(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", group(alpha=None))
    adapter = adaptertools.read(path)
    assert adapter.modules[0].scaling == 1.0
    assert any("1 module has no alpha" in note for note in adapter.notes)
    adaptertools.write(adapter, tmp_path / "y.safetensors", format="kohya")
    alpha = load_file(tmp_path / "y.safetensors")[f"{NAME}.alpha"]
    assert (alpha.ndim, float(alpha)) == (0, 2.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_alpha_keeps_its_dtype_and_loses_its_dimensions(dtype: torch.dtype, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", group(alpha=torch.tensor([3], dtype=dtype)))
    assert only(path).scaling == 1.5
    adaptertools.convert(path, tmp_path / "y.safetensors", to="kohya")
    alpha = load_file(tmp_path / "y.safetensors")[f"{NAME}.alpha"]
    assert (alpha.ndim, float(alpha)) == (0, 3.0)
    assert alpha.dtype == (dtype if dtype.is_floating_point else torch.float32)


@pytest.mark.parametrize(("alpha", "words"), [(0.0, "ComfyUI"), (float("nan"), "finite"), ((1.0, 2.0), "one number")])
def test_an_alpha_that_means_nothing_certain_is_refused(alpha: Any, words: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", group(alpha=torch.tensor(alpha)))
    with pytest.raises(ConfigError, match=words):
        adaptertools.read(path)


def linear(alpha: float, rule: ScaleRule = ScaleRule.ALPHA_OVER_RANK, **fields: Any) -> LoraModule:
    given = {"target": Target(parameter="a.b"), "lora_A": random(3, 5), "lora_B": random(4, 3), **fields}
    return LoraModule(alpha=alpha, scale_rule=rule, **given)


@pytest.mark.parametrize(
    ("alpha", "rule", "stated"),
    [(6.0, ScaleRule.ALPHA_OVER_RANK, 6.0), (0.5, ScaleRule.DIRECT, 1.5), (0.1, ScaleRule.ALPHA_OVER_RANK, 3.0)],
)
def test_alpha_says_the_scaling_exactly_or_the_scaling_is_folded(
    alpha: float, rule: ScaleRule, stated: float, tmp_path: Path
) -> None:
    module = linear(alpha, rule)
    report = adaptertools.write(Adapter(modules=(module,)), tmp_path / "x.safetensors", format="kohya")
    stored = load_file(tmp_path / "x.safetensors")
    assert float(stored["lora_unet_a_b.alpha"]) == stated
    exact = stored["lora_unet_a_b.lora_up.weight"].equal(module.lora_B)
    assert exact == (stated / 3 == module.scaling) == (report.losses == ())
    up, down = (stored[f"lora_unet_a_b.lora_{side}.weight"].double() for side in ("up", "down"))
    expected = module.scaling * module.lora_B.double() @ module.lora_A.double()
    assert (up @ down * stated / 3 - expected).abs().max() <= (report.max_relative_error + 1e-15) * 4


def test_a_common_alpha_is_stated_for_all_and_the_rest_is_folded(tmp_path: Path) -> None:
    modules = (linear(6.0), linear(1.0, target=Target(parameter="c")))
    adaptertools.write(Adapter(modules=modules), tmp_path / "x.safetensors", format="kohya", common_alpha=2)
    stored = load_file(tmp_path / "x.safetensors")
    assert {float(stored[f"lora_unet_{name}.alpha"]) for name in ("a_b", "c")} == {2.0}
    again = {m.target.parameter: m for m in adaptertools.read(tmp_path / "x.safetensors").modules}
    for module in modules:
        delta = module.delta_weight()
        assert (again[module.target.parameter].delta_weight() - delta).norm() < 1e-6 * delta.norm()


# Convolutions


def test_a_core_does_what_its_two_convolutions_do(tmp_path: Path) -> None:
    down, mid, up = random(2, 4, 1, 1), random(2, 2, 3, 3), random(6, 2, 1, 1)
    tensors = group(lora_down_weight=down, lora_up_weight=up, lora_mid_weight=mid)
    adapter = adaptertools.read(saved(tmp_path / "x.safetensors", tensors))
    (module,) = adapter.modules
    assert (module.kind, module.shape, module.rank) == (Kind.CONV, (6, 4, 3, 3), 2)
    image = random(1, 4, 7, 7)
    conv = torch.nn.functional.conv2d
    expected = conv(conv(conv(image, down), mid), up) * 0.5
    found = conv(image, module.delta_weight())
    assert torch.allclose(found, expected, atol=1e-5)
    assert any("factors of 1 module were computed: 1 factor was rounded" in note for note in adapter.notes)


def test_a_core_of_double_precision_stays_one(tmp_path: Path) -> None:
    parts = {"lora_down_weight": random(2, 4, 1, 1), "lora_up_weight": random(6, 2, 1, 1)}
    parts["lora_mid_weight"] = random(2, 2, 3, 3)
    doubles = group(**{name: tensor.double() for name, tensor in parts.items()})
    module = only(saved(tmp_path / "x.safetensors", doubles))
    expected = torch.einsum(
        "om,mnkl,ni->oikl",
        *(
            doubles[f"{NAME}.lora_{part}.weight"].squeeze(-1, -2)
            if part != "mid"
            else doubles[f"{NAME}.lora_mid.weight"]
            for part in ("up", "mid", "down")
        ),
    )
    assert module.lora_A.dtype is torch.float64
    assert (module.delta_weight(dtype=torch.float64) - expected / 2).abs().max() < 1e-15 * 10


def test_a_convolution_of_loralib_is_written_as_one_of_kohya(tmp_path: Path) -> None:
    module = LoraModule(
        target=Target(parameter="conv"),
        lora_A=random(6, 12),
        lora_B=random(15, 6),
        alpha=4.0,
        kind=Kind.CONV,
        shape=(5, 4, 3, 3),
    )
    adaptertools.write(Adapter(modules=(module,)), tmp_path / "x.safetensors", format="kohya")
    again = only(tmp_path / "x.safetensors")
    assert again.rank == 18
    assert torch.allclose(again.delta_weight(), module.delta_weight(), atol=1e-6)


def test_a_rank_that_disagrees_is_an_error_that_names_the_module(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", group(lora_up_weight=random(6, 3)))
    with pytest.raises(ShapeError, match="mid_block"):
        adaptertools.read(path)


# DoRA


@pytest.mark.parametrize(
    ("shape", "sizes", "axis"),
    [
        ((6, 1), (6, 4), "out"),
        ((1, 4), (6, 4), "in"),
        ((6, 1), (6, 6), "out"),
        ((1, 6), (6, 6), "in"),
        ((6,), (6, 4), "out"),
    ],
)
def test_the_axis_of_a_magnitude_is_told_by_its_shape(
    shape: tuple[int, ...], sizes: tuple[int, int], axis: str, tmp_path: Path
) -> None:
    scale = random(*shape).abs() + 0.5
    path = saved(tmp_path / "x.safetensors", group(n_out=sizes[0], n_in=sizes[1], dora_scale=scale))
    module = only(path)
    assert module.magnitude_axis == axis
    weight = random(*sizes, seed=9)
    changed = weight + module.lora_B @ module.lora_A * 0.5
    matrix = scale.reshape(-1, 1) if axis == "out" else scale.reshape(1, -1)
    expected = matrix * changed / changed.norm(dim=1 if axis == "out" else 0, keepdim=True)
    assert torch.allclose(weight + module.delta_weight(base_weight=weight), expected, atol=1e-6)
    adaptertools.convert(path, tmp_path / "y.safetensors", to="kohya")
    if len(shape) == 2:
        assert_same_tensors(path, tmp_path / "y.safetensors")


def test_a_magnitude_that_may_be_of_rows_or_columns_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", group(n_out=4, n_in=4, dora_scale=torch.ones(4)))
    with pytest.raises(ShapeError, match="rows or of the columns"):
        adaptertools.read(path)


def conv_parts(**parts: torch.Tensor) -> dict[str, torch.Tensor]:
    return group(lora_down_weight=random(2, 4, 3, 3), lora_up_weight=random(6, 2, 1, 1), **parts)


def test_norms_over_the_kernel_of_a_convolution_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", conv_parts(dora_scale=torch.ones(1, 4, 1, 1)))
    with pytest.raises(UnsupportedFeatureError, match="wd_on_out"):
        adaptertools.read(path)
    path = saved(tmp_path / "y.safetensors", conv_parts(dora_scale=torch.ones(1, 5, 1, 1)))
    with pytest.raises(ShapeError, match="expected"):
        adaptertools.read(path)


def test_dora_of_a_convolution_is_written_as_it_was(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", conv_parts(dora_scale=torch.rand(6, 1, 1, 1)))
    report = adaptertools.convert(path, tmp_path / "y.safetensors", to="kohya")
    assert_same_tensors(path, tmp_path / "y.safetensors")
    assert any("diffusers leaves dora_scale out" in note for note in report.notes)


# Names


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_flux_becomes_modules_of_other_formats_without_a_base(to: str, tmp_path: Path) -> None:
    """Its flat names are a closed set; both then mean the same, fused projections split."""
    flat = FIXTURES.parent / "diffusers" / "flux_kohya_dense" / "kohya.safetensors"
    adaptertools.convert(flat, tmp_path / "made", to=to)
    made = adaptertools.read(tmp_path / "made")
    assert any(m.target.parameter == "transformer_blocks.0.attn.to_q" for m in made.modules)
    assert not any(m.target.opaque for m in made.modules)
    found = adaptertools.diff(adaptertools.read(flat), made)
    assert found.same
    assert {row.only_in for row in found.modules} == {None}


def test_the_unet_of_sdxl_becomes_peft_without_a_base_and_is_compared_with_it(tmp_path: Path) -> None:
    attention = "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"lora_unet_{attention}.lora_down.weight": torch.randn(2, 6),
        f"lora_unet_{attention}.lora_up.weight": torch.randn(6, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    adaptertools.convert(tmp_path / "a.safetensors", tmp_path / "peft", to="peft")
    made = adaptertools.read(tmp_path / "peft")
    assert [str(m.target) for m in made.modules] == ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"]
    found = adaptertools.diff(adaptertools.read(tmp_path / "a.safetensors"), made)
    assert (found.same, [row.only_in for row in found.modules]) == (True, [None])


@pytest.mark.parametrize("to", ["peft", "mlx", "diffusers", "loralib"])
def test_a_base_that_was_given_and_has_none_of_the_names_is_not_asked_for_again(to: str, tmp_path: Path) -> None:
    base = FIXTURES.parent / "base" / "llama_tiny"
    unet = select(adaptertools.read(FIXTURES / "unet_and_text_encoder", base=base), only=["unet:*to_*"])
    with pytest.raises(UnsupportedFeatureError, match=f"The base given, {base}, has no weight of that name"):
        adaptertools.write(unet, tmp_path / "out", format=to)
    bare = select(adaptertools.read(FIXTURES / "unet_and_text_encoder"), only=["unet:*to_*"])
    with pytest.raises(UnsupportedFeatureError, match="Read the adapter with --base"):
        adaptertools.write(bare, tmp_path / "out", format=to)


@pytest.mark.parametrize("to", ["peft", "mlx", "loralib", "gguf"])
def test_formats_of_one_model_say_how_to_write_each_of_several(to: str, tmp_path: Path) -> None:
    encoder = LoraModule(
        target=Target(parameter="model.layers.0.mlp.up_proj", component="text_encoder"),
        lora_A=torch.ones(2, 4),
        lora_B=torch.ones(6, 2),
        alpha=1.0,
    )
    other = replace(encoder, target=replace(encoder.target, component="text_encoder_2"))
    with pytest.raises(UnsupportedFeatureError, match=r"\(text_encoder, text_encoder_2\).*--only 'COMPONENT:\*'"):
        adaptertools.write(Adapter(modules=(encoder, other)), tmp_path / "out", format=to)


def test_without_a_base_names_stay_flat_and_every_operation_works_on_them(
    tmp_path: Path, run: Callable[..., Any]
) -> None:
    path = TINY / "adapter.safetensors"
    adapter = adaptertools.read(path)
    assert all(module.target.opaque for module in adapter.modules)
    keys = load_file(path).keys()
    for command in (
        ("rescale", path, tmp_path / "rescaled.safetensors", "--alpha", "4"),
        ("truncate", path, tmp_path / "truncated.safetensors", "--rank", "1"),
        ("stack", path, path, tmp_path / "stacked.safetensors"),
        ("convert", path, tmp_path / "converted.safetensors", "--to", "kohya"),
    ):
        assert run(*command).code == 0
    for made in ("rescaled", "truncated", "stacked", "converted"):
        assert load_file(tmp_path / f"{made}.safetensors").keys() == keys
    assert run("diff", path, tmp_path / "converted.safetensors").code == 0
    assert adaptertools.diff(adapter, adaptertools.read(tmp_path / "rescaled.safetensors")).same
    doubled = {str(m.target): m for m in adaptertools.read(tmp_path / "stacked.safetensors").modules}
    for module in adapter.modules:
        delta = module.delta_weight(dtype=torch.float64)
        assert torch.allclose(doubled[str(module.target)].delta_weight(dtype=torch.float64), 2 * delta, atol=1e-6)
    assert header(tmp_path / "truncated.safetensors")["ss_network_dim"] == "1"
    with pytest.raises(UnsupportedFeatureError, match="could not be turned back"):
        adaptertools.convert(path, tmp_path / "peft", to="peft", only=["*down_blocks*"])


def test_prefixes_are_those_of_the_models(tmp_path: Path) -> None:
    components = {
        "lora_unet_x": "unet",
        "lora_te1_x": "text_encoder",
        "lora_te2_x": "text_encoder_2",
        "lora_te3_x": "text_encoder_3",
        "lora_transformer_x": "transformer",
        "lycoris_x": "",
        "lora_prior_unet_x": "",
    }
    tensors: dict[str, torch.Tensor] = {}
    for name in components:
        tensors |= group(name)
    path = saved(tmp_path / "x.safetensors", tensors)
    adapter = adaptertools.read(path)
    assert sorted(m.target.component for m in adapter.modules) == sorted(components.values())
    adaptertools.write(adapter, tmp_path / "y.safetensors", format="kohya")
    assert_same_tensors(path, tmp_path / "y.safetensors")
    path = saved(tmp_path / "z.safetensors", group("lora_te_x") | group("lora_te1_x"))
    with pytest.raises(ConfigError, match=r"lora_te1?_ and lora_te1?_ both stand"):
        adaptertools.read(path)


@pytest.mark.parametrize(
    ("components", "prefix"),
    [
        (("unet", "text_encoder"), "lora_te_"),
        (("text_encoder", "text_encoder_2"), "lora_te1_"),
        (("transformer", "text_encoder"), "lora_te1_"),
    ],
)
def test_the_one_text_encoder_of_stable_diffusion_has_no_number(
    components: tuple[str, ...], prefix: str, tmp_path: Path
) -> None:
    modules = tuple(linear(1.0, target=Target(parameter="a.b", component=name)) for name in components)
    adaptertools.write(Adapter(modules=modules), tmp_path / "x.safetensors", format="kohya")
    assert f"{prefix}a_b.alpha" in load_file(tmp_path / "x.safetensors")


def test_a_prefix_may_be_given_for_what_has_no_name(tmp_path: Path) -> None:
    adapter = Adapter(modules=(linear(1.0),))
    adaptertools.write(adapter, tmp_path / "x.safetensors", format="kohya", prefix="lora_te2_")
    assert "lora_te2_a_b.alpha" in load_file(tmp_path / "x.safetensors")
    assert str(only(tmp_path / "x.safetensors").target) == "a.b"
    other = Adapter(modules=(linear(1.0, target=Target(parameter="a", component="vae")),))
    with pytest.raises(UnsupportedFeatureError, match="vae"):
        adaptertools.write(other, tmp_path / "y.safetensors", format="kohya")


@pytest.mark.parametrize(
    ("parameter", "prefix", "guessed"),
    [
        ("model.layers.0.self_attn.q_proj", "lora_unet_", True),
        ("transformer.h.0.attn.c_attn", "lora_unet_", True),
        ("text_model.encoder.layers.0.self_attn.q_proj", "lora_te_", True),
        ("down_blocks.0.attentions.0.proj_in", "lora_unet_", False),
        ("double_blocks.0.img_attn.proj", "lora_unet_", False),
    ],
)
def test_a_prefix_that_is_a_guess_is_stated_with_the_option_that_chooses_another(
    parameter: str, prefix: str, guessed: bool, tmp_path: Path
) -> None:
    adapter = Adapter(modules=(linear(1.0, target=Target(parameter=parameter)),))
    report = adaptertools.write(adapter, tmp_path / "x.safetensors", format="kohya")
    assert f"{prefix}{parameter.replace('.', '_')}.alpha" in load_file(tmp_path / "x.safetensors")
    notes = [note for note in report.notes if f"written behind {prefix}" in note and "--out prefix=…" in note]
    assert len(notes) == guessed
    assert str(only(tmp_path / "x.safetensors").target) == parameter
    chosen = adaptertools.write(adapter, tmp_path / "y.safetensors", format="kohya", prefix="lora_llm_")
    assert not [note for note in chosen.notes if "written behind" in note]
    assert f"lora_llm_{parameter.replace('.', '_')}.alpha" in load_file(tmp_path / "y.safetensors")


def test_names_that_flatten_to_one_are_an_error_that_names_both(tmp_path: Path) -> None:
    modules = tuple(linear(1.0, target=Target(parameter=name)) for name in ("a.b_c", "a.b.c"))
    with pytest.raises(UnsupportedFeatureError, match=r"a\.b_c and a\.b\.c"):
        adaptertools.write(Adapter(modules=modules), tmp_path / "x.safetensors", format="kohya")


def test_a_record_that_flattening_contradicts_is_not_believed(tmp_path: Path) -> None:
    said = {"kohya": {"names": {NAME: ["unet", "some.other.name"], "x": ["unet", "x"]}}}
    path = saved(tmp_path / "x.safetensors", group(), adaptertools=json.dumps(said))
    assert only(path).target.opaque
    said["kohya"]["names"][NAME] = ["unet", "mid_block.attentions.0.proj_in"]
    path = saved(tmp_path / "y.safetensors", group(), adaptertools=json.dumps(said))
    assert only(path).target == Target(parameter="mid_block.attentions.0.proj_in", component="unet")
    for wrong in ({"names": [1]}, {"names": {"x": ["a"]}}, {"bases": {"x": 1}}, 3):
        path = saved(tmp_path / "z.safetensors", group(), adaptertools=json.dumps({"kohya": wrong}))
        with pytest.raises(ConfigError, match="adaptertools"):
            adaptertools.read(path)


@pytest.mark.parametrize(
    "given", ["mid_block.attentions.0.proj_in", "model.diffusion_model.mid_block.attentions.0.proj_in"]
)
def test_a_model_of_one_file_turns_names_back(given: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", group())
    base = saved(tmp_path / "base.safetensors", {f"{given}.weight": torch.zeros(6, 4), "a.bias": torch.zeros(6)})
    assert only(path, base=base).target == Target(parameter="mid_block.attentions.0.proj_in", component="unet")


def test_a_weight_of_another_shape_is_not_taken_for_the_module(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", group())
    base = saved(tmp_path / "base.safetensors", {"mid_block.attentions.0.proj_in.weight": torch.zeros(6, 5)})
    adapter = adaptertools.read(path, base=base)
    assert adapter.modules[0].target.opaque
    assert any("no weight of that name and shape for 1 module" in note for note in adapter.notes)


def test_a_linear_layer_and_a_convolution_of_one_pixel_stand_for_one_another(tmp_path: Path) -> None:
    parts = {"lora_down_weight": random(2, 4, 1, 1), "lora_up_weight": random(6, 2, 1, 1)}
    path = saved(tmp_path / "x.safetensors", group(**parts))
    base = saved(tmp_path / "base.safetensors", {"mid_block.attentions.0.proj_in.weight": torch.zeros(6, 4)})
    module = only(path, base=base)
    assert (module.kind, module.weight_shape) == (Kind.LINEAR, (6, 4))


def test_a_base_with_two_names_for_one_flat_name_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", group("lora_unet_a_b_c"))
    base = saved(tmp_path / "base.safetensors", {f"{n}.weight": torch.zeros(6, 4) for n in ("a.b_c", "a_b.c")})
    with pytest.raises(MatchError, match="both flattened"):
        adaptertools.read(path, base=base)


def test_a_pipeline_is_no_base_of_a_format_that_knows_one_model(tmp_path: Path, plain: Adapter) -> None:
    folder = adaptertools.write(plain, tmp_path / "peft", format="peft").path
    with pytest.raises(OptionError, match="several models"):
        adaptertools.read(folder, base=TINY / "base")


def test_slices_of_a_fused_projection_become_one_pair(tmp_path: Path) -> None:
    modules = tuple(
        linear(
            6.0,
            target=Target(parameter="qkv", rows=RowSlice(start=4 * k, stop=4 * k + 4, total=12)),
            lora_A=random(3, 5, seed=k),
        )
        for k in (0, 2)
    )
    adaptertools.write(Adapter(modules=modules), tmp_path / "x.safetensors", format="kohya")
    again = only(tmp_path / "x.safetensors")
    expected = sum(module.delta_weight() for module in modules)
    assert again.rank == 6
    assert torch.allclose(again.delta_weight(), expected, atol=1e-6)


# Other files


@pytest.mark.parametrize("suffix", ["pt", "ckpt"])
def test_a_torch_file_is_read_and_written_as_safetensors(suffix: str, tmp_path: Path) -> None:
    tensors = group() | group("lora_te_x")
    torch.save(tensors, tmp_path / f"x.{suffix}")
    adaptertools.convert(tmp_path / f"x.{suffix}", tmp_path / "y.safetensors", to="kohya")
    assert_same_tensors(saved(tmp_path / "z.safetensors", tensors), tmp_path / "y.safetensors")


@pytest.mark.parametrize("dotted", ["diffusion_model.a.lora_down.weight", "unet.a.b.lora_up.weight"])
def test_names_with_dots_are_not_kohyas(dotted: str, tmp_path: Path) -> None:
    assert not formats.get("kohya").detect(Source(saved(tmp_path / "x.safetensors", {dotted: random(2, 2)})))


def test_rank_alpha_and_those_of_convolutions_are_renewed_where_they_changed(tmp_path: Path) -> None:
    args = json.dumps({"conv_dim": "2", "conv_alpha": "1", "algo": "locon"})
    tensors = (
        group("lora_unet_a")
        | group("lora_unet_b", rank=3)
        | {key.replace(NAME, "lora_unet_c"): tensor for key, tensor in conv_parts().items()}
    )
    given = {"ss_network_dim": "2", "ss_network_alpha": "1", "ss_network_args": args}
    path = saved(tmp_path / "x.safetensors", tensors, **given)
    adapter = adaptertools.read(path)
    adaptertools.write(adapter, tmp_path / "y.safetensors", format="kohya")
    strings = header(tmp_path / "y.safetensors")
    assert (strings["ss_network_dim"], strings["ss_network_alpha"]) == ("Dynamic", "1")
    assert strings["ss_network_args"] == args
    lowered = adaptertools.truncate(adapter, rank=1).adapter
    adaptertools.write(lowered, tmp_path / "z.safetensors", format="kohya")
    strings = header(tmp_path / "z.safetensors")
    assert strings["ss_network_dim"] == "1"
    assert json.loads(strings["ss_network_args"])["conv_dim"] == "1"


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_kohya_to_peft_and_back_keeps_every_delta_weight(data: st.DataObject, tmp_path_factory: Any) -> None:
    tmp_path = tmp_path_factory.mktemp("there_and_back")
    names = data.draw(st.lists(st.sampled_from(("a.to_q", "a.to_out.0", "b_c.d", "e.conv")), min_size=1, unique=True))
    tensors: dict[str, torch.Tensor] = {}
    base: dict[str, torch.Tensor] = {}
    for index, name in enumerate(names):
        rank, n_out, n_in = (data.draw(st.integers(1, 4)) for _ in range(3))
        kernel = (3, 3) if name.endswith("conv") else ()
        alpha = data.draw(st.sampled_from((1.0, 2.0, 0.5, 3.0, 0.3)))
        dtype = data.draw(st.sampled_from((torch.float32, torch.float16)))
        ones = (1,) * len(kernel)
        tensors |= group(
            f"lora_unet_{name.replace('.', '_')}",
            lora_down_weight=random(rank, n_in, *kernel, dtype=dtype, seed=index),
            lora_up_weight=random(n_out, rank, *ones, dtype=dtype, seed=index + 9),
            alpha=torch.tensor(alpha, dtype=dtype),
        )
        base[f"{name}.weight"] = torch.zeros(n_out, n_in, *kernel)
    path = saved(tmp_path / "x.safetensors", tensors)
    read = {"base": saved(tmp_path / "base.safetensors", base)}
    adaptertools.convert(path, tmp_path / "peft", to="peft", read_options=read)
    report = adaptertools.convert(tmp_path / "peft", tmp_path / "y.safetensors", to="kohya")
    one, other = (adaptertools.read(tmp_path / name, **read) for name in ("x.safetensors", "y.safetensors"))
    after = {module.target.parameter: module for module in other.modules}
    assert after.keys() == set(names)
    for module in one.modules:
        delta = module.delta_weight(dtype=torch.float64)
        found = after[module.target.parameter].delta_weight(dtype=torch.float64)
        assert found.shape == delta.shape
        size = module.lora_B.double().abs() @ module.lora_A.double().abs() * abs(module.scaling)
        assert ((found - delta).abs().reshape(size.shape) <= (report.max_relative_error + 4e-16) * size).all()


def test_flux_by_the_names_of_diffusers_is_written_by_those_of_its_publisher(tmp_path: Path) -> None:
    """Separate q, k and v become the fused layer, block by block; the names are those that sd-scripts trains."""
    home = "single_transformer_blocks.0"
    sizes = {f"{home}.attn.to_{part}": 5 for part in "qkv"} | {f"{home}.proj_mlp": 20}
    modules = tuple(
        LoraModule(
            target=Target(parameter=name, component="transformer"),
            lora_A=random(2, 5, seed=index),
            lora_B=random(rows, 2, seed=index),
            alpha=2.0,
        )
        for index, (name, rows) in enumerate(sizes.items())
    )
    adaptertools.write(Adapter(modules=modules), tmp_path / "x.safetensors", format="kohya")
    assert "lora_unet_single_blocks_0_linear1.alpha" in load_file(tmp_path / "x.safetensors")
    module = only(tmp_path / "x.safetensors")
    assert (module.rank, str(module.target)) == (8, "transformer:single_blocks.0.linear1")
    assert torch.allclose(module.delta_weight(), torch.cat([part.delta_weight() for part in modules]), atol=1e-6)


def test_a_model_with_a_folder_of_that_name_in_it_is_no_pipeline(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", group())
    weights = {"mid_block.attentions.0.proj_in.weight": torch.zeros(6, 4)}
    (tmp_path / "base" / "text_encoder").mkdir(parents=True)
    saved(tmp_path / "base" / "model.safetensors", weights)
    assert only(path, base=tmp_path / "base").target.component == "unet"
    (tmp_path / "base" / "model_index.json").write_text("{}")
    (tmp_path / "base" / "text_encoder").rmdir()
    (tmp_path / "base" / "transformer").mkdir()
    saved(tmp_path / "base" / "transformer" / "model.safetensors", weights)
    assert only(path, base=tmp_path / "base").target.component == "transformer"


def test_alphas_that_were_not_fetched_are_asked_for(tmp_path: Path) -> None:
    tensors = {key: tensor.to("meta") for key, tensor in group().items()}
    with pytest.raises(UnsupportedFeatureError, match="Download it first"):
        adaptertools.from_state_dict(tensors, format="kohya")


def test_tensors_in_memory_go_with_the_strings_of_the_header(tmp_path: Path) -> None:
    adapter = adaptertools.read(TINY / "adapter.safetensors", base=TINY / "base")
    tensors, strings = adapter.to_state_dict(format="kohya")
    save_file(tensors, tmp_path / "x.safetensors", strings)
    adaptertools.write(adapter, tmp_path / "y.safetensors", format="kohya")
    assert header(tmp_path / "x.safetensors") == header(tmp_path / "y.safetensors")
    again = adaptertools.from_state_dict(tensors, strings, format="kohya")
    assert [m.target for m in again.modules] == [m.target for m in adapter.modules]


def test_values_that_are_not_finite_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    module = linear(6.0, lora_B=torch.full((4, 3), float("inf")))
    with pytest.raises(NonFiniteError, match="lora_up"):
        adaptertools.write(Adapter(modules=(module,)), tmp_path / "x.safetensors", format="kohya")
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_a_module_names_the_file(tmp_path: Path) -> None:
    save_file({"lora_unet_a.lora_down.weight": torch.ones(2, 4)}, tmp_path / "half.safetensors")
    with pytest.raises(UnpairedFactorError, match=r"half\.safetensors: lora_unet_a: lora_down"):
        adaptertools.read(tmp_path / "half.safetensors")


def test_what_training_said_goes_through_another_format_and_back(tmp_path: Path) -> None:
    factors = {"lora_unet_a.lora_down.weight": torch.ones(2, 4), "lora_unet_a.lora_up.weight": torch.ones(3, 2)}
    save_file(factors, tmp_path / "a.safetensors", {"ss_epoch": "3", "modelspec.title": "a", "format": "pt"})
    adapter = adaptertools.read(tmp_path / "a.safetensors")
    named = replace(adapter, modules=tuple(replace(m, target=Target(parameter="a")) for m in adapter.modules))
    report = adaptertools.write(named, tmp_path / "peft", format="peft")
    assert not [note for note in report.notes if "not carried" in note]
    adaptertools.convert(tmp_path / "peft", tmp_path / "back.safetensors", to="kohya")
    assert {"ss_epoch": "3", "modelspec.title": "a"}.items() <= header(tmp_path / "back.safetensors").items()
    same = adaptertools.write(adapter, tmp_path / "again.safetensors", format="kohya")
    assert not [note for note in same.notes if "not carried" in note]
