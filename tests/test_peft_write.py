"""What the PEFT writer makes of adapters: names, patterns, settings and refusals; PEFT itself judges what it can."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors import safe_open
from torch import Tensor, nn

import adaptertools
from adaptertools.adapter import Adapter, Base, FullWeight, HistoryEntry, RowWeights, WeightRole
from adaptertools.errors import OptionError, UnsupportedFeatureError
from adaptertools.module import Kind, LoraModule, RowSlice, ScaleRule, Target

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def module(name: str, n_in: int = 6, n_out: int = 8, rank: int = 2, **changes: Any) -> LoraModule:
    """A module with values that differ for every name."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    settings: dict[str, Any] = {
        "target": Target(parameter=name),
        "lora_A": torch.randn(rank, n_in, generator=generator),
        "lora_B": torch.randn(n_out, rank, generator=generator),
        "alpha": 4.0,
    }
    return LoraModule(**{**settings, **changes})


def written(adapter: Adapter, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors without their prefix, and the configuration."""
    tensors, config = adapter.to_state_dict("peft", **options)
    assert all(key.startswith("base_model.model.") for key in tensors)
    return {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}, config


def config_of(*modules: LoraModule, **parts: Any) -> dict[str, Any]:
    return written(Adapter(modules=modules, **parts))[1]


class Nets(nn.Module):
    """Modules whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 8)
        self.a = nn.ModuleDict({"proj": nn.Linear(8, 8), "x.proj".replace(".", "_"): nn.Linear(8, 8)})
        self.pre_head = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        self.embed = nn.Embedding(9, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.proj(self.embed(tokens))
        for layer in (self.a["proj"], self.a["x_proj"], self.pre_head):
            hidden = torch.tanh(layer(hidden))
        return self.head(hidden)


def nets() -> Nets:
    torch.manual_seed(0)
    return Nets().eval()


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(9))


def load(folder: Path) -> PeftModel:
    """The adapter as PEFT loads it into Nets, every key in its place."""
    fresh = get_peft_model(nets(), LoraConfig.from_pretrained(folder))
    result = set_peft_model_state_dict(fresh, load_peft_weights(folder, device="cpu"))
    assert result.unexpected_keys == []
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key or "tokens" in key]
    return PeftModel.from_pretrained(nets(), folder).eval()


def changed(adapter: Adapter) -> Nets:
    """Nets with the adapter put into its weights by hand."""
    model = nets()
    weights = model.state_dict()
    with torch.no_grad():
        for name, weight in adapter.full_weights.items():
            weights[name].copy_(weight.weight)
        for name, rows in adapter.row_weights.items():
            weights[name][list(rows.indices)] = rows.rows
        for part in adapter.modules:
            weights[f"{part.target.parameter}.weight"] += part.delta_weight()
            if part.lora_bias is not None:
                weights[f"{part.target.parameter}.bias"] += part.lora_bias * part.scaling
    return model


def assert_runs_in_peft(adapter: Adapter, folder: Path, **options: Any) -> dict[str, Any]:
    """PEFT's forward pass with the written adapter is that of weights changed by hand. Returns the configuration."""
    adaptertools.write(adapter, folder, format="peft", **options)
    wanted = run(changed(adapter))
    assert (wanted - run(nets())).abs().max() > 1e-3
    assert (run(load(folder)) - wanted).abs().max() <= 1e-5
    document: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return document


def test_targets_are_whole_paths_in_natural_order() -> None:
    names = [f"layers.{layer}.q_proj" for layer in (10, 2, 1)]
    config = config_of(*(module(name) for name in names))
    assert config["target_modules"] == ["layers.1.q_proj", "layers.2.q_proj", "layers.10.q_proj"]
    assert config["peft_type"] == "LORA"
    assert config["inference_mode"] is True


def test_newer_settings_are_written_only_where_they_say_something() -> None:
    plain = config_of(module("proj"))
    assert not [key for key in plain if key.endswith("_config") and key not in ("loftq_config", "megatron_config")]
    assert "lora_bias" not in plain
    assert {"r", "lora_alpha", "use_dora", "use_rslora", "layer_replication", "peft_version"} <= plain.keys()
    assert config_of(module("proj", lora_bias=torch.ones(8)))["lora_bias"] is True


@pytest.mark.parametrize(
    ("stated", "kept"), [(False, False), ("gaussian", "gaussian"), (True, True), (0, True), ("eva", True), ([1], True)]
)
def test_an_initialisation_that_loading_replaces_is_kept(stated: Any, kept: Any, tmp_path: Path) -> None:
    metadata = {"peft": {"init_lora_weights": stated}}
    document = assert_runs_in_peft(Adapter(modules=(module("a.proj", 8),), metadata=metadata), tmp_path / "by_us")
    found = document["init_lora_weights"]
    assert (type(found), found) == (type(kept), kept)


def test_a_path_hits_no_other_module_that_ends_alike(tmp_path: Path) -> None:
    adapter = Adapter(modules=(module("a.proj", 8),))
    assert_runs_in_peft(adapter, tmp_path / "by_us")
    model = load(tmp_path / "by_us")
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert adapted == {"base_model.model.a.proj"}


def test_patterns_name_only_the_modules_that_differ(tmp_path: Path) -> None:
    adapter = Adapter(
        modules=(
            module("proj"),
            module("a.proj", 8, rank=3),
            module("a.x_proj", 8, alpha=6.5),
            module("pre_head", 8, rank=3, alpha=1.0),
            module("head.0", 8),
            module("head.2", 8, 3),
        )
    )
    config = assert_runs_in_peft(adapter, tmp_path / "by_us")
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["rank_pattern"] == {r"^a\.proj$": 3, "^pre_head$": 3}
    assert config["alpha_pattern"] == {r"^a\.x_proj$": 6.5, "^pre_head$": 1}
    again = adaptertools.read(tmp_path / "by_us")
    assert {str(m.target): (m.rank, m.alpha) for m in again.modules} == {
        str(m.target): (m.rank, m.alpha) for m in adapter.modules
    }


def test_rslora_is_kept_where_all_modules_use_it_and_turned_into_alpha_where_not() -> None:
    root = {"scale_rule": ScaleRule.ALPHA_OVER_SQRT_RANK}
    config = config_of(module("proj", **root), module("a.proj", rank=3, **root))
    assert config["use_rslora"] is True
    assert (config["lora_alpha"], config["alpha_pattern"]) == (4, {})
    mixed = config_of(module("proj", rank=4, **root), module("a.proj", rank=4))
    assert mixed["use_rslora"] is False
    assert mixed["alpha_pattern"] | {"most": mixed["lora_alpha"]} == {r"^a\.proj$": 4, "most": 8}


def test_lora_bias_is_filled_up_with_zeros(tmp_path: Path) -> None:
    adapter = Adapter(modules=(module("proj", lora_bias=torch.ones(8)), module("a.proj", 8)))
    config = assert_runs_in_peft(adapter, tmp_path / "by_us")
    assert config["lora_bias"] is True
    tensors, _ = written(adapter)
    assert tensors["a.proj.lora_B.bias"].tolist() == [0.0] * 8


@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_heads_biases_and_token_rows_go_along(container: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    full = {
        "head.0.weight": FullWeight(weight=torch.randn(8, 8)),
        "head.0.bias": FullWeight(weight=torch.randn(8)),
        "head.2.weight": FullWeight(weight=torch.randn(3, 8)),
        "head.2.bias": FullWeight(weight=torch.randn(3)),
        "proj.bias": FullWeight(weight=torch.randn(8), role=WeightRole.BIAS),
        "pre_head.bias": FullWeight(weight=torch.randn(8), role=WeightRole.BIAS),
        "a.x_proj.weight": FullWeight(weight=torch.randn(8, 8), role=WeightRole.BASE),
        "a.proj.weight": FullWeight(weight=torch.randn(8, 8)),
    }
    rows = {"embed.weight": RowWeights(indices=(4, 1), rows=torch.randn(2, 6))}
    adapter = Adapter(modules=(module("proj"), module("a.proj", 8)), full_weights=full, row_weights=rows)
    config = assert_runs_in_peft(adapter, tmp_path / "by_us", container=container)
    assert config["modules_to_save"] == ["head.0", "head.2"]
    assert config["bias"] == "all"
    assert config["trainable_token_indices"] == {"embed": [4, 1]}
    again = adaptertools.read(tmp_path / "by_us")
    assert again.full_weights.keys() == full.keys()
    for name, weight in full.items():
        assert torch.equal(again.full_weights[name].weight, weight.weight)
    assert again.full_weights["proj.bias"].role is WeightRole.BIAS


def test_biases_of_adapted_layers_alone_are_lora_only(tmp_path: Path) -> None:
    bias = {"a.proj.bias": FullWeight(weight=torch.ones(8), role=WeightRole.BIAS)}
    config = assert_runs_in_peft(Adapter(modules=(module("a.proj", 8),), full_weights=bias), tmp_path / "by_us")
    assert config["bias"] == "lora_only"


def weights(*names: str) -> dict[str, FullWeight]:
    return {name: FullWeight(weight=torch.ones(2)) for name in names}


@pytest.mark.parametrize(
    ("names", "targets", "saved"),
    [
        (["classifier.dense.weight", "classifier.out_proj.weight"], ["roberta.q"], ["classifier"]),
        (["model.score.weight"], ["model.layers.0.q"], ["model.score"]),
        (["qa_outputs.weight", "qa_outputs.bias"], ["bert.q"], ["qa_outputs"]),
        (["decoder.embed.weight"], ["encoder.q"], ["decoder.embed"]),
        (["model.norm.weight", "lm_head.weight"], ["model.layers.0.q"], ["model.norm", "lm_head"]),
        (["classifier.norm.weight"], ["classifier.dense"], None),  # PEFT would leave out the layer
        (["proj.weight"], ["proj"], None),  # goes into base_layer
        (["norm.bias"], ["proj"], None),  # not the whole module
        (["cls_token"], ["proj"], None),  # no module of its own
    ],
)
def test_the_modules_to_save_are_those_that_hold_the_weights(
    names: list[str], targets: list[str], saved: list[str] | None
) -> None:
    adapter = Adapter(modules=tuple(module(name) for name in targets), full_weights=weights(*names))
    tensors, config = written(adapter)
    assert config["modules_to_save"] == saved
    again = adaptertools.from_state_dict(
        {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, config, format="peft"
    )
    assert again.full_weights.keys() == set(names)


def test_the_original_modules_to_save_are_kept_while_they_cover_something() -> None:
    metadata = {"peft": {"modules_to_save": ["head", "score"]}}
    adapter = Adapter(
        modules=(module("proj"),),
        full_weights=weights("model.head.0.weight", "model.head.2.weight", "norm.weight"),
        metadata=metadata,
    )
    assert written(adapter)[1]["modules_to_save"] == ["head", "norm"]
    assert written(adapter, drop=["full-weights"])[1]["modules_to_save"] is None


def test_a_roberta_head_becomes_the_classifier_that_peft_saves(tmp_path: Path) -> None:
    from peft_cases import make_base
    from peft_cases import run as run_case

    base = make_base("roberta")
    torch.manual_seed(2)
    head = {name: torch.randn_like(t) for name, t in base.state_dict().items() if name.startswith("classifier")}
    path = "roberta.encoder.layer.0.attention.self.query"
    adapter = Adapter(
        modules=(module(path, 12, 12),), full_weights={name: FullWeight(weight=tensor) for name, tensor in head.items()}
    )
    adaptertools.write(adapter, tmp_path / "by_us", format="peft")
    model = PeftModel.from_pretrained(make_base("roberta"), tmp_path / "by_us").eval()
    with torch.no_grad():
        base.get_parameter(f"{path}.weight").add_(adapter.modules[0].delta_weight())
        for name, tensor in head.items():
            base.get_parameter(name).copy_(tensor)
    assert (run_case("roberta", model) - run_case("roberta", base)).abs().max() <= 1e-5


@pytest.mark.parametrize("container", ["safetensors", "torch"])
def test_history_and_settings_survive_both_containers(container: str, tmp_path: Path) -> None:
    adapter = Adapter(
        modules=(module("proj"),),
        bases={"": Base(id="org/model", revision="abc")},
        invocation_tokens=(3, 4),
        history=(HistoryEntry(operation="rescale", source="x", details={"alpha": 32}),),
        metadata={"peft": {"task_type": "CAUSAL_LM", "lora_dropout": 0.1}},
    )
    adaptertools.write(adapter, tmp_path / "by_us", format="peft", container=container)
    again = adaptertools.read(tmp_path / "by_us")
    assert again.history == adapter.history
    assert again.bases == adapter.bases
    assert again.invocation_tokens == (3, 4)
    assert again.metadata["peft"]["task_type"] == "CAUSAL_LM"
    assert again.metadata["peft"]["lora_dropout"] == 0.1
    assert again.origin is not None
    assert (again.origin.format, again.origin.container) == ("peft", container)
    names = {path.name for path in (tmp_path / "by_us").iterdir()}
    weights_file = {"safetensors": "adapter_model.safetensors", "torch": "adapter_model.bin"}[container]
    assert names == {weights_file, "adapter_config.json"} | ({"adaptertools.json"} if container == "torch" else set())
    if container == "safetensors":
        with safe_open(tmp_path / "by_us" / weights_file, "pt") as file:
            assert file.metadata()["format"] == "pt"


def test_overwriting_leaves_no_weights_of_the_other_container(tmp_path: Path) -> None:
    adapter = Adapter(modules=(module("proj"),))
    adaptertools.write(adapter, tmp_path / "by_us", format="peft", container="torch")
    (tmp_path / "by_us" / "README.md").write_text("about it")
    adaptertools.write(adapter, tmp_path / "by_us", format="peft", overwrite=True)
    names = {path.name for path in (tmp_path / "by_us").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "README.md"}


def test_dora_on_some_layers_is_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"a\.proj without DoRA.*--drop dora"):
        config_of(module("proj", magnitude=torch.ones(8)), module("a.proj", 8))


def test_dora_with_a_bias_is_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match="lora-bias"):
        config_of(module("proj", magnitude=torch.ones(8), lora_bias=torch.ones(8)))


def test_a_magnitude_for_each_input_is_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match="each input"):
        config_of(module("proj", magnitude=torch.ones(6), magnitude_axis="in"))


def test_a_bias_beside_an_embedding_is_refused() -> None:
    embedding = module("embed", 9, 6, kind=Kind.EMBEDDING, transposed=True)
    with pytest.raises(UnsupportedFeatureError, match="embed beside"):
        config_of(module("proj", lora_bias=torch.ones(8)), embedding)


def test_an_embedding_held_the_other_way_round_is_turned(tmp_path: Path) -> None:
    adapter = Adapter(modules=(module("embed", 6, 9, kind=Kind.EMBEDDING, transposed=False),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_runs_in_peft(adapter, tmp_path / "by_us")


def test_rows_with_dora_need_all_rows() -> None:
    def part(start: int) -> LoraModule:
        rows = RowSlice(start=start, stop=start + 4, total=8)
        return module(f"{start}", n_out=4, target=Target(parameter="qkv", rows=rows), magnitude=torch.ones(4))

    tensors, config = written(Adapter(modules=(part(0), part(4))))
    assert tensors["qkv.lora_magnitude_vector"].shape == (8,)
    assert config["r"] == 4
    with pytest.raises(UnsupportedFeatureError, match="part of its rows"):
        config_of(part(0))


def test_slices_on_a_changed_base_are_refused() -> None:
    rows = RowSlice(start=0, stop=8, total=24)
    adapter = Adapter(
        modules=(module("x", target=Target(parameter="qkv", rows=rows)),), bases={"": Base(change="pissa")}
    )
    with pytest.raises(UnsupportedFeatureError, match="changed base"):
        written(adapter)


@pytest.mark.parametrize("change", ["svdquant", "unheard"])
def test_a_change_of_the_base_that_peft_cannot_be_told_is_refused(change: str) -> None:
    adapter = Adapter(modules=(module("proj"),), bases={"": Base(change=change)})
    with pytest.raises(UnsupportedFeatureError, match="--drop changed-base"):
        written(adapter)
    assert written(adapter, drop=["changed-base"])[1]["init_lora_weights"] is True


@pytest.mark.parametrize(
    ("change", "carried"),
    [
        ("corda", {"corda_config": {"corda_method": "kpm"}}),
        ("lora_ga", {"lora_ga_config": {"direction": "ArB2r"}}),
        ("loftq", {"loftq_config": {"loftq_bits": 4}}),
        ("pissa_niter_4", {}),
    ],
)
def test_what_changed_the_base_is_written_with_its_settings(change: str, carried: dict[str, Any]) -> None:
    adapter = Adapter(modules=(module("proj"),), bases={"": Base(change=change)}, metadata={"peft": carried})
    tensors, config = written(adapter)
    assert config["init_lora_weights"] == change
    assert config.items() >= carried.items()
    again = adaptertools.from_state_dict(
        {f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, config, format="peft"
    )
    assert again.bases[""].change == change
    if change == "loftq":
        with pytest.raises(UnsupportedFeatureError, match="loftq_config"):
            written(Adapter(modules=adapter.modules, bases=adapter.bases))


def test_names_that_cannot_be_turned_back_are_refused() -> None:
    target = Target(parameter="lora_unet_mid_block", opaque=True)
    with pytest.raises(UnsupportedFeatureError, match="--base"):
        config_of(module("x", target=target))


def test_an_adapter_for_several_models_is_refused_and_one_for_one_is_not(tmp_path: Path) -> None:
    parts = [module("proj", target=Target(parameter="proj", component=name)) for name in ("unet", "text_encoder")]
    with pytest.raises(UnsupportedFeatureError, match="text_encoder, unet"):
        config_of(*parts)
    report = adaptertools.write(Adapter(modules=(parts[0],)), tmp_path / "by_us", format="peft")
    assert any("unet" in note for note in report.notes)


def test_parameters_in_an_unknown_order_are_refused_unless_the_order_is_remembered() -> None:
    parts = [
        module(f"experts.{name}", kind=Kind.PARAMETER, lora_A=torch.ones(3, 2, 4), lora_B=torch.ones(3, size, 2))
        for name, size in (("w1", 5), ("w2", 6))
    ]
    with pytest.raises(UnsupportedFeatureError, match="order"):
        config_of(*parts)
    metadata = {"peft": {"parameter_orders": [["w2", "w1"]]}}
    tensors, config = written(Adapter(modules=tuple(parts), metadata=metadata))
    assert tensors["experts.base_layer.lora_B.weight"].shape == (6, 6)
    assert tensors["experts.lora_B.weight"].shape == (5, 6)
    assert config["target_parameters"] == ["experts.w1", "experts.w2"]
    assert config["peft_version"] == "0.21.2"


def test_a_parameter_of_the_outermost_module_is_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match="outermost"):
        config_of(module("mask", kind=Kind.PARAMETER))


def test_a_module_and_its_own_parameter_are_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match="same module"):
        config_of(module("experts"), module("experts.w", kind=Kind.PARAMETER))


def test_an_adapter_without_modules_is_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match="no module"):
        written(Adapter(full_weights=weights("score.weight")))


def test_a_dtype_that_is_asked_for_is_written_and_its_error_reported(tmp_path: Path) -> None:
    report = adaptertools.write(Adapter(modules=(module("proj"),)), tmp_path / "by_us", format="peft", dtype="f16")
    assert not report.exact
    assert 0 < report.max_relative_error < 1e-3
    assert {m.lora_A.dtype for m in adaptertools.read(tmp_path / "by_us").modules} == {torch.float16}


class OneConvolution(nn.Module):
    """What loralib's convolution stands in for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_the_convolution_of_loralib_is_factored_anew_on_request(tmp_path: Path) -> None:
    import loralib

    torch.manual_seed(0)
    layer = loralib.Conv2d(2, 6, 3, r=1, lora_alpha=3)
    nn.init.normal_(layer.lora_B)
    base = OneConvolution()
    base.conv.load_state_dict(layer.conv.state_dict())
    part = LoraModule(
        target=Target(parameter="conv"),
        kind=Kind.CONV,
        shape=(6, 2, 3, 3),
        lora_A=layer.lora_A.detach(),
        lora_B=layer.lora_B.detach(),
        alpha=3.0,
    )
    adapter = Adapter(modules=(part,))
    with pytest.raises(UnsupportedFeatureError, match="conv=svd"):
        adaptertools.write(adapter, tmp_path / "by_us", format="peft")
    with pytest.raises(OptionError, match="svd"):
        adaptertools.write(adapter, tmp_path / "by_us", format="peft", conv="fft")
    report = adaptertools.write(adapter, tmp_path / "by_us", format="peft", conv="svd")
    assert report.max_relative_error < 1e-6
    x = torch.randn(1, 2, 5, 5)
    layer.train()
    with torch.no_grad():
        wanted = layer(x)
        got = PeftModel.from_pretrained(base, tmp_path / "by_us").eval()(x)
    assert (got - wanted).abs().max() <= 1e-5
    (again,) = adaptertools.read(tmp_path / "by_us").modules
    assert again.rank <= 6
    assert again.kernel_fold == 1
