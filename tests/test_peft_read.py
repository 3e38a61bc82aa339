"""What the PEFT reader makes of files: fixtures made by PEFT, odd but legal folders, and what it refuses."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import adaptertools
from adaptertools import formats
from adaptertools.adapter import Adapter, WeightRole
from adaptertools.containers.jsonfile import format_json
from adaptertools.containers.source import Source
from adaptertools.dialects.peft import config as peft_config
from adaptertools.dialects.peft import files as peft_files
from adaptertools.errors import (
    AdapterToolsError,
    AmbiguousFormatError,
    ConfigError,
    DamagedFileError,
    MissingAlphaError,
    OptionError,
    SourceNotFoundError,
    UnclaimedTensorError,
    UnknownFormatError,
    UnsupportedFeatureError,
)
from adaptertools.module import Kind, LoraModule, ScaleRule

PEFT = formats.get("peft")
FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft"
PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def pair(path: str, rank: int = 2, n_in: int = 4, n_out: int = 3, prefix: str = PREFIX) -> dict[str, Tensor]:
    """lora_A and lora_B of a module, different for every path."""
    generator = torch.Generator().manual_seed(sum(path.encode()))
    return {
        f"{prefix}{path}.lora_A.weight": torch.randn(rank, n_in, generator=generator),
        f"{prefix}{path}.lora_B.weight": torch.randn(n_out, rank, generator=generator),
    }


def from_memory(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = CONFIG, **options: Any) -> Adapter:
    documents = {} if config is None else {"adapter_config.json": config}
    return PEFT.read(Source.in_memory(tensors, documents), **options)


def save(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = CONFIG, suffix: str = ""
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if suffix == ".bin":
        torch.save(dict(tensors), folder / "adapter_model.bin")
    else:
        save_file(dict(tensors), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def only(adapter: Adapter) -> LoraModule:
    (module,) = adapter.modules
    return module


@pytest.mark.parametrize("folder", sorted(FIXTURES.iterdir()), ids=lambda folder: folder.name)
def test_delta_weights_are_those_that_peft_made(folder: Path) -> None:
    case = json.loads((folder / "case.json").read_text())
    shapes = {name: tuple(shape) for name, shape in case["shapes"].items()}
    expected = load_file(folder / "expected.safetensors")
    base = load_file(folder / "base.safetensors") if (folder / "base.safetensors").exists() else {}
    adapter = PEFT.read(Source(folder), base=SimpleNamespace(shapes=shapes, config=case["config"]))
    found: dict[str, Tensor] = {}
    for module in adapter.modules:
        name = module.target.parameter
        name = name if name in shapes else f"{name}.weight"
        assert module.weight_shape == shapes[name]
        if name in expected:
            found[name] = found.get(name, 0) + module.delta_weight(base_weight=base.get(name))
        if module.lora_bias is not None:
            found[f"{module.target.parameter}.bias"] = module.lora_bias * module.scaling
    for name, delta in found.items():
        assert (delta - expected[name]).abs().max() <= 1e-6, name
    beside = {*adapter.full_weights, *adapter.row_weights}
    assert expected.keys() - found.keys() <= beside
    assert formats.detect(Source(folder)) == "peft"


@pytest.mark.parametrize("suffix", ["", ".bin"])
def test_a_folder_and_its_weights_file_read_the_same(suffix: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", pair("q_proj"), suffix=suffix)
    name = f"adapter_model{suffix or '.safetensors'}"
    assert formats.detect(Source(folder / name)) == "peft"
    one, other = only(adaptertools.read(folder)), only(adaptertools.read(folder / name))
    assert torch.equal(one.delta_weight(), other.delta_weight())
    assert one.scaling == other.scaling == 2.0


def test_header_entries_that_are_left_behind_are_named(peft_folder: Path) -> None:
    path = peft_folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "author": "someone"})
    assert adaptertools.read(peft_folder).notes == ("header entries that PEFT does not know are not carried: author",)


def test_shards_are_read_with_and_without_their_index(tmp_path: Path) -> None:
    names = [f"adapter_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, path in zip(names, ("q_proj", "v_proj"), strict=True):
        save_file(pair(path), tmp_path / name)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert len(adaptertools.read(tmp_path).modules) == 2
    assert len(adaptertools.read(tmp_path / names[1]).modules) == 2
    weight_map = {key: name for name, path in zip(names, ("q_proj", "v_proj"), strict=True) for key in pair(path)}
    (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert len(adaptertools.read(tmp_path).modules) == 2
    save_file(pair("k_proj"), tmp_path / "adapter_model-00003-of-00003.safetensors")
    with pytest.raises(DamagedFileError, match="00003"):
        adaptertools.read(tmp_path)


def test_safetensors_stands_before_bin_and_their_differences_are_found(tmp_path: Path) -> None:
    save(tmp_path, pair("q_proj"))
    save(tmp_path, pair("q_proj"), suffix=".bin")
    assert peft_files.differences(Source(tmp_path)) == ()
    changed = pair("q_proj")
    changed[f"{PREFIX}q_proj.lora_B.weight"] += 1
    save(tmp_path, {**changed, **pair("v_proj")}, suffix=".bin")
    adapter = adaptertools.read(tmp_path)
    assert torch.equal(only(adapter).lora_B, pair("q_proj")[f"{PREFIX}q_proj.lora_B.weight"])
    assert any("adapter_model.bin" in note for note in adapter.notes)
    assert peft_files.differences(Source(tmp_path)) == (f"{PREFIX}q_proj.lora_B.weight", *pair("v_proj"))


def test_one_named_sub_folder_is_taken_and_several_ask_for_a_name(tmp_path: Path) -> None:
    save(tmp_path / "english", pair("q_proj"))
    adapter = adaptertools.read(tmp_path)
    assert any("english" in note for note in adapter.notes)
    save(tmp_path / "french", pair("q_proj", rank=3))
    with pytest.raises(AmbiguousFormatError, match=r"english, french.*/english"):
        adaptertools.read(tmp_path)
    assert only(adaptertools.read(tmp_path / "french")).rank == 3
    assert only(adaptertools.read(tmp_path, adapter_name="french")).rank == 3


def test_configurations_of_others_are_not_taken_for_peft(tmp_path: Path) -> None:
    mlx = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 2.0}}
    save(tmp_path / "mlx", pair("q_proj"), mlx)
    adapterhub = {"config": {"r": 8, "alpha": 16, "architecture": "lora"}, "model_type": "bert"}
    save(tmp_path / "adapterhub", pair("q_proj"), adapterhub)
    for name in ("mlx", "adapterhub"):
        assert not PEFT.detect(Source(tmp_path / name))
        with pytest.raises(ConfigError, match="peft_type"):
            adaptertools.read(tmp_path / name, format="peft")


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj.lora_A", "q_proj.lora_B"],  # loralib
        ["q_proj.lora_a", "q_proj.lora_b"],  # MLX
        ["unet.q_proj.lora_A.weight", "unet.q_proj.lora_B.weight"],  # diffusers
        ["lora_unet_q_proj.lora_down.weight", "lora_unet_q_proj.lora_up.weight"],  # kohya
    ],
)
def test_keys_of_other_formats_are_not_taken_for_peft(keys: list[str], tmp_path: Path) -> None:
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "model.safetensors")
    assert not PEFT.detect(Source(tmp_path / "model.safetensors"))


def test_a_bare_file_is_known_by_its_keys_and_needs_alpha(tmp_path: Path) -> None:
    save_file(pair("q_proj"), tmp_path / "some_name.safetensors")
    assert formats.detect(Source(tmp_path / "some_name.safetensors")) == "peft"
    absent = r"adapter_config\.json is not there.*alpha=… in Python, --source-alpha on the command line.*16 for rank 8"
    with pytest.raises(MissingAlphaError, match=absent):
        adaptertools.read(tmp_path / "some_name.safetensors")
    assert only(adaptertools.read(tmp_path / "some_name.safetensors", alpha=6)).scaling == 3.0


@pytest.mark.parametrize("stated", [None, "16", float("nan"), True, 10**400, [1]])
def test_an_alpha_that_is_no_number_can_be_replaced(stated: Any) -> None:
    config = {**CONFIG, "lora_alpha": stated}
    with pytest.raises((MissingAlphaError, ConfigError)):
        from_memory(pair("q_proj"), config)
    adapter = from_memory(pair("q_proj"), config, alpha=8)
    assert only(adapter).scaling == 4.0
    assert (stated is None) != any("8 was given" in note for note in adapter.notes)


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), 5e-324, 10**400, "16", True])
def test_an_alpha_that_is_given_must_be_a_positive_number(alpha: Any) -> None:
    for config in (None, CONFIG, {**CONFIG, "lora_alpha": 0}):
        with pytest.raises(OptionError, match="expected a positive number"):
            from_memory(pair("q_proj"), config, alpha=alpha)


def test_a_configuration_without_alpha_says_so() -> None:
    with pytest.raises(
        MissingAlphaError, match=r"no lora_alpha.*alpha=… in Python, --source-alpha on the command line"
    ):
        from_memory(pair("q_proj"), {**CONFIG, "lora_alpha": None})


def test_a_file_without_lora_and_configuration_is_no_adapter() -> None:
    whole = {f"{PREFIX}head.weight": torch.ones(2, 2), f"{PREFIX}head.bias": torch.ones(2)}
    for tensors in (whole, {"model.layers.0.q_proj.weight": torch.ones(2, 2)}):
        with pytest.raises(UnknownFormatError, match=f"none of its {len(tensors)} tensors? is a factor of LoRA"):
            from_memory(tensors, None)
    adapter = from_memory(whole, {**CONFIG, "modules_to_save": ["head"]})
    assert adapter.full_weights.keys() == {"head.weight", "head.bias"}


def test_a_stated_alpha_is_not_contradicted() -> None:
    assert only(from_memory(pair("q_proj"), alpha=4)).alpha == 4.0
    with pytest.raises(OptionError, match="rescale"):
        from_memory(pair("q_proj"), alpha=8)


def test_alpha_zero_is_said_and_may_be_replaced() -> None:
    adapter = from_memory(pair("q_proj"), {**CONFIG, "lora_alpha": 0})
    assert only(adapter).scaling == 0.0
    assert any("changes nothing" in note for note in adapter.notes)
    assert only(from_memory(pair("q_proj"), {**CONFIG, "lora_alpha": 0}, alpha=4)).scaling == 2.0


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("q_proj", "a.q_proj", True),
        ("q_proj", "q_proj", True),
        ("q_proj", "a.xq_proj", False),
        ("self_attn", "self_attn.q_proj", False),
        ("layers.0.q_proj", "layersX0.q_proj", True),
        ("q_proj|v_proj", "a.v_proj", True),
        ("^q_proj$", "a.q_proj", False),
        (r"^a\.q_proj$", "a.q_proj", True),
        (r"^a\.q_proj$", "b.a.q_proj", False),
        ("base_model.model.a.q_proj", "a.q_proj", False),
    ],
)
def test_patterns_match_the_end_of_a_path_from_a_dot_on(pattern: str, path: str, matches: bool) -> None:
    adapter = from_memory(pair(path), {**CONFIG, "alpha_pattern": {pattern: 6}})
    assert only(adapter).alpha == (6.0 if matches else 4.0)


def test_the_first_pattern_in_the_file_counts() -> None:
    tensors = {**pair("layers.0.q_proj"), **pair("layers.1.q_proj")}
    for first, second in (("q_proj", r"^layers\.0\.q_proj$"), (r"^layers\.0\.q_proj$", "q_proj")):
        adapter = from_memory(tensors, {**CONFIG, "alpha_pattern": {first: 6, second: 8}})
        alphas = {module.target.parameter: module.alpha for module in adapter.modules}
        assert alphas == {"layers.0.q_proj": 6.0, "layers.1.q_proj": 6.0 if first == "q_proj" else 8.0}


def test_rank_and_alpha_patterns_are_looked_up_apart() -> None:
    config = {**CONFIG, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 9}}
    adapter = from_memory({**pair("q_proj", rank=3), **pair("v_proj")}, config)
    assert [module.scaling for module in adapter.modules] == [4 / 3, 9 / 2]
    assert adapter.notes == ()


def test_ranks_come_from_the_tensors_and_a_claim_of_others_is_said() -> None:
    adapter = from_memory(pair("q_proj", rank=3))
    assert only(adapter).scaling == 4 / 3
    assert any("ranks" in note for note in adapter.notes)


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    module = only(from_memory(pair("q_proj"), {**CONFIG, "use_rslora": True}))
    assert module.scale_rule is ScaleRule.ALPHA_OVER_SQRT_RANK
    assert module.scaling == 4 / 2**0.5


@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.",
        "base_model.model.base_model.model.",
        "_orig_mod.base_model.model.",
        "module.base_model.model.",
        "base_model.model._orig_mod.",
        "state_dict/module.base_model.model._fsdp_wrapped_module.",
        "",
    ],
)
def test_what_wrappers_put_in_front_is_taken_off(prefix: str) -> None:
    adapter = from_memory(pair("model.layers.0.q_proj", prefix=prefix))
    assert only(adapter).target.parameter == "model.layers.0.q_proj"
    assert bool(adapter.notes) == (prefix == "" or prefix.count("base_model") > 1)


def test_a_prefix_inside_the_path_is_taken_out() -> None:
    adapter = from_memory(pair("q_proj", prefix="thinker.base_model.model."))
    assert only(adapter).target.parameter == "thinker.q_proj"


def test_adapter_names_in_keys_are_taken_out() -> None:
    tensors = {key.replace(".weight", ".default.weight"): tensor for key, tensor in pair("q_proj").items()}
    tensors |= {f"{PREFIX}score.modules_to_save.default.weight": torch.ones(2, 3)}
    tensors |= {f"{PREFIX}embed.lora_embedding_A.default": torch.ones(2, 9)}
    tensors |= {f"{PREFIX}embed.lora_embedding_B.default": torch.ones(5, 2)}
    adapter = from_memory(tensors)
    assert [module.target.parameter for module in adapter.modules] == ["embed", "q_proj"]
    assert list(adapter.full_weights) == ["score.weight"]
    with pytest.raises(OptionError, match="default"):
        from_memory(tensors, adapter_name="other")


def test_a_trained_copy_stands_before_the_weight_beside_it() -> None:
    tensors = {
        **pair("q_proj"),
        f"{PREFIX}lm_head.weight": torch.zeros(2, 3),
        f"{PREFIX}lm_head.original_module.weight": torch.zeros(2, 3),
        f"{PREFIX}lm_head.modules_to_save.weight": torch.ones(2, 3),
    }
    for order in (list(tensors), list(reversed(tensors))):
        adapter = from_memory({key: tensors[key] for key in order}, {**CONFIG, "modules_to_save": ["lm_head"]})
        assert list(adapter.full_weights) == ["lm_head.weight"]
        assert adapter.full_weights["lm_head.weight"].weight.min() == 1
        assert any("original_module" in note for note in adapter.notes)
        assert any("twice" in note for note in adapter.notes)


def test_whole_weights_get_the_role_that_the_configuration_gives_them() -> None:
    config = {**CONFIG, "bias": "all", "modules_to_save": ["head"], "task_type": "SEQ_CLS"}
    names = {
        "head.proj.weight": ("head.proj.weight", WeightRole.MODULE),
        "head.proj.bias": ("head.proj.bias", WeightRole.MODULE),
        "score.weight": ("score.weight", WeightRole.MODULE),
        "q_proj.base_layer.bias": ("q_proj.bias", WeightRole.BIAS),
        "norm.bias": ("norm.bias", WeightRole.BIAS),
        "embed.base_layer.weight": ("embed.weight", WeightRole.BASE),
        "norm.weight": ("norm.weight", WeightRole.BASE),
    }
    adapter = from_memory({**pair("q_proj"), **{PREFIX + name: torch.ones(3) for name in names}}, config)
    assert {name: weight.role for name, weight in adapter.full_weights.items()} == dict(names.values())
    (note,) = adapter.notes
    assert "norm.weight" in note


def test_a_head_that_is_listed_and_absent_is_said() -> None:
    adapter = from_memory(pair("q_proj"), {**CONFIG, "modules_to_save": ["score"]})
    assert any("score, of which the file has nothing; it is left out when written" in note for note in adapter.notes)
    assert adapter.to_state_dict("peft")[1]["modules_to_save"] is None


def test_biases_that_peft_lost_are_said() -> None:
    adapter = from_memory(pair("q_proj"), {**CONFIG, "bias": "lora_only"})
    assert any("lora_only" in note for note in adapter.notes)


def test_unknown_keys_are_said() -> None:
    adapter = from_memory(pair("q_proj"), {**CONFIG, "frobnicate": 3, "new_config": None})
    assert any("frobnicate, new_config" in note for note in adapter.notes)


@pytest.mark.parametrize("suffix", ["", ".weight", ".default.weight", ".default"])
def test_magnitudes_are_read_under_all_their_names(suffix: str) -> None:
    tensors = pair("q_proj")
    if "default" in suffix:
        tensors = {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}
    tensors |= {f"{PREFIX}q_proj.lora_magnitude_vector{suffix}": torch.ones(3)}
    assert only(from_memory(tensors, {**CONFIG, "use_dora": True})).magnitude is not None


def test_magnitudes_that_the_configuration_denies_need_a_decision() -> None:
    tensors = {**pair("q_proj"), f"{PREFIX}q_proj.lora_magnitude_vector": torch.ones(3)}
    with pytest.raises(ConfigError, match="dora=true"):
        from_memory(tensors)
    assert only(from_memory(tensors, dora=True)).magnitude is not None
    without = from_memory(tensors, dora=False)
    assert only(without).magnitude is None
    assert any("magnitudes" in note for note in without.notes)
    assert only(from_memory(tensors, None, alpha=4)).magnitude is not None


def headers(shapes: dict[str, tuple[int, ...]], model_type: str | None = None) -> Any:
    return SimpleNamespace(shapes=shapes, config={"model_type": model_type} if model_type else {})


@pytest.mark.parametrize(
    ("shape", "path", "model_type", "transposed"),
    [
        ((3, 4), "h.0.attn.c_proj", "gpt2", False),
        ((4, 3), "h.0.attn.c_proj", "gpt2", True),
        ((4, 3), "h.0.attn.c_proj", None, True),
        ((4, 4), "h.0.attn.c_proj", "gpt2", True),
        ((4, 4), "h.0.attn.c_proj", "qwen", False),
        ((4, 4), "h.0.attn.lm_head", "gpt2", False),
        ((4, 4), "h.0.attn.c_proj", None, None),
        (None, "h.0.attn.c_proj", "gpt2", None),
        ((5, 3), "h.0.attn.c_proj", "gpt2", None),
    ],
)
def test_orientation_is_what_the_base_model_shows(
    shape: tuple[int, ...] | None, path: str, model_type: str | None, transposed: bool | None
) -> None:
    n_out = 4 if shape == (4, 4) else 3
    shapes = {f"transformer.{path}.weight": shape, "transformer.other.weight": (4, 3)} if shape else {}
    for prefix in ("transformer.", ""):  # the adapter may have been trained on the model without its head
        adapter = from_memory(
            pair(f"{prefix}{path}", n_out=n_out),
            {**CONFIG, "fan_in_fan_out": True},
            base=headers(shapes, model_type),
        )
        assert only(adapter).transposed is transposed


def test_a_base_model_that_does_not_fit_is_said() -> None:
    base = headers({"a.q_proj.weight": (3, 4), "a.v_proj.weight": (7, 7)}, "llama")
    fitting = from_memory(pair("a.q_proj"), base=base)
    assert fitting.notes == ()
    other = from_memory({**pair("a.v_proj"), **pair("a.k_proj")}, base=base)
    assert any("a.k_proj" in note for note in other.notes)
    assert any("a.v_proj in shape (7, 7)" in note and "(3, 4)" in note for note in other.notes)


def test_without_a_base_model_no_orientation_is_claimed() -> None:
    for stated in (True, False):
        assert only(from_memory(pair("c_attn"), {**CONFIG, "fan_in_fan_out": stated})).transposed is None


def stacks(a: int, b: int, experts: int = 3, rank: int = 2, nesting: int = 0) -> dict[str, Tensor]:
    home = f"{PREFIX}mlp.experts{'.base_layer' * nesting}"
    generator = torch.Generator().manual_seed(a + 10 * b)
    return {
        f"{home}.lora_A.weight": torch.randn(experts * rank, a, generator=generator),
        f"{home}.lora_B.weight": torch.randn(b, rank * experts, generator=generator),
    }


def expert_config(version: str | None, *names: str) -> dict[str, Any]:
    targets = [f"mlp.experts.{name}" for name in names]
    return {**CONFIG, "target_modules": [], "target_parameters": targets, "peft_version": version}


@pytest.mark.parametrize(
    ("version", "model_type", "plain"),
    [
        ("0.21.2", "mixtral", True),
        ("0.19.1", None, True),
        ("0.21.2", "gpt_oss", True),
        ("0.19.0", "mixtral", False),
        ("0.19.0", "gpt_oss", False),
        ("0.18.1", "mixtral", False),
        ("0.18.1", "gpt_oss", True),
        (None, "mixtral", False),
        (None, "gpt_oss", True),
        ("0.18.1", None, None),
        ("0.18.2.dev0@UNKNOWN", None, None),
        ("0.18.2.dev0@UNKNOWN", "mixtral", None),
        ("0.20.0.dev0", "mixtral", True),
    ],
)
def test_square_experts_are_laid_out_by_version_and_model(
    version: str | None, model_type: str | None, plain: bool | None
) -> None:
    tensors = stacks(4, 4)
    base = headers({"mlp.experts.w": (3, 4, 4)}, model_type)
    if plain is None:
        with pytest.raises(UnsupportedFeatureError, match="--base"):
            from_memory(tensors, expert_config(version, "w"), base=base)
        return
    module = only(from_memory(tensors, expert_config(version, "w"), base=base))
    lora_A, lora_B = tensors.values()
    A, B = lora_A.reshape(3, 2, 4), lora_B.reshape(4, 2, 3).permute(2, 0, 1)
    expected = 2.0 * (B @ A if plain else (B @ A).transpose(1, 2))
    oriented = expected.transpose(1, 2) if model_type == "gpt_oss" else expected
    assert torch.allclose(module.delta_weight(), oriented, atol=1e-6)
    assert module.kind is Kind.PARAMETER


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", "0.21.2", "0.18.2.dev0@UNKNOWN"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("takes_first", [True, False])
def test_the_shape_of_the_parameter_settles_the_layout(version: str, model_type: str, takes_first: bool) -> None:
    tensors = stacks(5, 4) if takes_first else stacks(4, 5)
    base = headers({"model.mlp.experts.w": (3, 5, 4)}, model_type)
    module = only(from_memory(tensors, expert_config(version, "w"), base=base))
    lora_A, lora_B = tensors.values()
    A, B = lora_A.reshape(3, 2, -1), lora_B.reshape(-1, 2, 3).permute(2, 0, 1)
    expected = 2.0 * ((B @ A).transpose(1, 2) if takes_first else B @ A)
    assert module.weight_shape == (3, 5, 4)
    assert torch.allclose(module.delta_weight(), expected, atol=1e-6)


def test_nested_pairs_belong_to_parameters_in_the_order_of_registration() -> None:
    tensors = {**stacks(5, 8, nesting=1), **stacks(4, 5)}
    adapter = from_memory(tensors, expert_config("0.21.2", "down_proj", "gate_up_proj"))
    shapes = {module.target.parameter: module.weight_shape for module in adapter.modules}
    assert shapes == {"mlp.experts.gate_up_proj": (3, 8, 5), "mlp.experts.down_proj": (3, 5, 4)}
    for order in (tensors, dict(reversed(tensors.items()))):
        adapter = from_memory(order, expert_config("0.21.2", "gate_up_proj", "down_proj"))
        assert adapter.metadata["peft"]["parameter_orders"] == [["gate_up_proj", "down_proj"]]
    turned = from_memory(
        {**stacks(4, 5, nesting=1), **stacks(5, 8)}, expert_config("0.21.2", "gate_up_proj", "down_proj")
    )
    assert {module.target.parameter: module.weight_shape for module in turned.modules} == shapes
    assert turned.metadata["peft"]["parameter_orders"] == [["down_proj", "gate_up_proj"]]
    assert "base_model.model.mlp.experts.base_layer.lora_A.weight" in turned.to_state_dict("peft")[0]
    assert turned.to_state_dict("peft")[0]["base_model.model.mlp.experts.lora_A.weight"].shape == (6, 5)
    with pytest.raises(UnsupportedFeatureError, match="which pair"):
        from_memory(tensors, expert_config("0.21.2", "w1", "w2"))
    base = headers({"mlp.experts.w2": (3, 8, 5), "mlp.experts.w1": (3, 5, 4)}, "custom")
    adapter = from_memory(tensors, expert_config("0.21.2", "w1", "w2"), base=base)
    assert {module.target.parameter: module.weight_shape for module in adapter.modules} == {
        "mlp.experts.w2": (3, 8, 5),
        "mlp.experts.w1": (3, 5, 4),
    }


@pytest.mark.parametrize("pooled", [True, False])
def test_qalora_pools_its_inputs_as_peft_does(pooled: bool) -> None:
    from peft.tuners.lora.variants import QALoraLinearVariant

    tensors = pair("q_proj", n_in=3 if pooled else 12)
    lora_A, lora_B = tensors.values()
    config = {**CONFIG, "use_qalora": True, "qalora_group_size": 4}
    module = only(from_memory(tensors, config, base=headers({"q_proj.weight": (3, 12)})))
    if not pooled:  # a layer that is not quantised beside others that are
        assert torch.equal(module.delta_weight(), 2.0 * lora_B @ lora_A)
        return
    layer = SimpleNamespace(
        lora_A={"x": SimpleNamespace(weight=lora_A)},
        lora_B={"x": SimpleNamespace(weight=lora_B)},
        lora_dropout={"x": torch.nn.Identity()},
        scaling={"x": 2.0},
        qalora_group_size={"x": 4},
        in_features=12,
        training=False,
    )
    effect = QALoraLinearVariant.forward(layer, "x", torch.eye(12), torch.zeros(12, 3)).T
    assert torch.allclose(module.delta_weight(), effect, atol=1e-6)


def test_a_slot_mask_that_is_missing_is_asked_for() -> None:
    tensors = {f"{PREFIX}c_attn.lora_A.weight": torch.ones(4, 5), f"{PREFIX}c_attn.lora_B.weight": torch.ones(8, 2, 1)}
    with pytest.raises(ConfigError, match="enable_lora"):
        from_memory(tensors)
    adapter = from_memory(tensors, {**CONFIG, "enable_lora": [True, False, True]})
    assert [str(module.target) for module in adapter.modules] == ["c_attn[0:4]", "c_attn[8:12]"]
    assert len({module.scaling for module in adapter.modules}) == 1


def test_every_other_tensor_is_an_error() -> None:
    for key in ("q_proj.lora_C.weight", "q_proj.lora_A.x.y.weight", "q_proj.lora_A.bias", "lora_A.weight"):
        with pytest.raises(UnclaimedTensorError):
            from_memory({**pair("q_proj"), PREFIX + key: torch.ones(2, 2)})


def test_the_original_settings_are_kept_for_writing_again() -> None:
    config = {**CONFIG, "task_type": "CAUSAL_LM", "lora_dropout": 0.1, "peft_version": "0.17.0"}
    kept = from_memory(pair("q_proj"), config).metadata["peft"]
    assert kept["task_type"] == "CAUSAL_LM"
    assert kept["target_modules"] == ["q_proj", "v_proj"]
    assert kept["lora_dropout"] == 0.1


def test_a_setting_that_json_cannot_hold_is_said_and_not_kept() -> None:
    adapter = from_memory(pair("q_proj"), {**CONFIG, "lora_dropout": float("nan")})
    assert "lora_dropout" not in adapter.metadata["peft"]
    assert any("lora_dropout is nan" in note for note in adapter.notes)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(SourceNotFoundError, match=r"adapter_model\.safetensors"):
        adaptertools.read(tmp_path)


def test_reading_touches_no_values(tmp_path: Path) -> None:
    tensors = {key: torch.full_like(tensor, float("nan")) for key, tensor in pair("q_proj").items()}
    assert only(adaptertools.read(save(tmp_path, tensors))).lora_A.isnan().all()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("pissa"),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=4,
)


FIELDS = st.sampled_from(sorted({*peft_config.DEFAULTS, "enable_lora"}))


def read_and_write(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Nothing but our own errors may leave the reader and the writer."""
    with suppress(AdapterToolsError):
        _, written = from_memory(tensors, config).to_state_dict("peft")
        format_json(written)


@given(changes=st.dictionaries(FIELDS, JSON, max_size=4), experts=st.booleans())
@settings(max_examples=300, deadline=None)
def test_no_configuration_makes_the_reader_fail_otherwise(changes: dict[str, Any], experts: bool) -> None:
    tensors = stacks(4, 4) if experts else {**pair("a.q_proj"), f"{PREFIX}score.weight": torch.ones(2, 3)}
    read_and_write(tensors, {**(expert_config("0.21.2", "w") if experts else CONFIG), **changes})


PARTS = """base_model model layers 0 q_proj lora_A lora_B weight bias default modules_to_save original_module base_layer
    lora_embedding_A lora_embedding_B lora_magnitude_vector token_adapter trainable_tokens_delta out_proj module"""
KEYS = st.lists(st.sampled_from(PARTS.split()), min_size=1, max_size=8).map(".".join)


@given(keys=st.lists(KEYS, min_size=1, max_size=6, unique=True), shapes=st.data())
@settings(max_examples=300, deadline=None)
def test_no_names_or_shapes_make_the_reader_fail_otherwise(keys: list[str], shapes: st.DataObject) -> None:
    sizes = st.lists(st.integers(0, 3), max_size=4)
    read_and_write({PREFIX + key: torch.zeros(shapes.draw(sizes)) for key in keys}, CONFIG)


PATHS = st.lists(st.sampled_from(["a", "b", "attn", "experts"]), min_size=1, max_size=3).map(".".join)
LEAVES = ("lora_A.weight", "lora_B.weight", "lora_A.weight", "lora_B.weight", "lora_embedding_A", "base_layer.bias")


@given(paths=st.lists(PATHS, min_size=1, max_size=3, unique=True), draw=st.data())
@settings(max_examples=300, deadline=None)
def test_no_pair_of_any_shape_makes_the_reader_fail_otherwise(paths: list[str], draw: st.DataObject) -> None:
    tensors = {}
    for path in paths:
        home = PREFIX + path + draw.draw(st.sampled_from(["", ".base_layer", ".base_layer.out_proj"]))
        for leaf in draw.draw(st.lists(st.sampled_from(LEAVES), min_size=2, max_size=4)):
            tensors[f"{home}.{leaf}"] = torch.ones(draw.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    for config in (CONFIG, expert_config("0.21.2", "w"), {**CONFIG, "enable_lora": [True, False, True]}):
        read_and_write(tensors, config)
