"""Adapters between real PEFT and this library: delta weights as PEFT merges them, forward passes as PEFT runs them."""

import copy
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from peft_cases import CASES, headers, make_adapter, make_base, quiet, run
from safetensors.torch import load_file
from torch import Tensor, nn

import adaptertools
from adaptertools import formats
from adaptertools.adapter import Adapter
from adaptertools.containers.source import Source
from adaptertools.dialects.peft import config as peft_config
from adaptertools.encoding import Encoder
from adaptertools.errors import ConfigError, UnsupportedFeatureError
from adaptertools.module import Feature, Kind, LoraModule, RowSlice, ScaleRule, Target
from adaptertools.operations.summary import summarize

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias"),  # peft 0.21 takes a bias for a factor
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match.*:RuntimeWarning"),  # it overlooks parameters
]

PEFT = formats.get("peft")
REFORMED = {"bdlora", "velora", "monteclora"}
"""Cases that are written as plain factors, without what their variants store beside or instead of them."""

NOT_MERGED = {
    "alora": "it acts after its tokens only",
    "attention_parameter": "PEFT leaves the layer inside the wrapped module as it is",
    "llama_tied": "PEFT merges the tied weight twice, unlike its own forward pass",
}


def saved(case: str, folder: Path, **changes: Any) -> tuple[PeftModel, Path]:
    """An adapter trained and saved by PEFT."""
    model = make_adapter(case, make_base(case), **changes)
    with quiet():
        model.save_pretrained(folder / "by_peft")
    return model, folder / "by_peft"


def read(folder: Path, base: nn.Module | None = None, **options: Any) -> Adapter:
    return PEFT.read(Source(folder), **({"base": headers(base)} if base is not None else {}), **options)


def load(case: str, folder: Path) -> PeftModel:
    """The adapter in a folder as PEFT loads it."""
    with quiet():
        return PeftModel.from_pretrained(make_base(case), folder).eval()


def load_strictly(case: str, folder: Path) -> PeftModel:
    """The same, and every key finds its place, and every place its key or that of a parameter it shares."""
    with quiet():
        fresh = get_peft_model(make_base(case), LoraConfig.from_pretrained(folder))
        result = set_peft_model_state_dict(fresh, load_peft_weights(folder, device="cpu"))
    assert result.unexpected_keys == []
    marks = ("lora_", "modules_to_save", "trainable_tokens")
    places = {key: tensor.data_ptr() for key, tensor in fresh.state_dict().items()}
    filled = {place for key, place in places.items() if key not in result.missing_keys}
    missing = [key for key in result.missing_keys if places[key] not in filled]
    assert [key for key in missing if any(mark in key for mark in marks)] == []
    return load(case, folder)


def full_name(parameter: str, weights: dict[str, Tensor]) -> str:
    return parameter if parameter in weights else f"{parameter}.weight"


def tied_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """The names under which a model holds one and the same weight."""
    places: dict[int, str] = {}
    return [
        (places[tensor.data_ptr()], name)
        for name, tensor in model.state_dict().items()
        if places.setdefault(tensor.data_ptr(), name) != name
    ]


@pytest.mark.parametrize("case", [case for case in CASES if case not in NOT_MERGED])
def test_our_delta_weights_are_those_that_peft_merges(case: str, tmp_path: Path) -> None:
    model, folder = saved(case, tmp_path)
    before = {name: tensor.clone() for name, tensor in make_base(case).state_dict().items()}
    adapter = read(folder, make_base(case))
    with quiet():
        after = model.merge_and_unload().state_dict()
    expected = {name: before[name].clone() for name in before}
    for name, weight in adapter.full_weights.items():
        expected[name] = weight.weight.clone()
    for name, rows in adapter.row_weights.items():
        expected[name][list(rows.indices)] = rows.rows
    for module in adapter.modules:
        name = full_name(module.target.parameter, before)
        expected[name] = expected[name] + module.delta_weight(base_weight=before[name])
        if module.lora_bias is not None:
            bias = module.target.parameter + ".bias"
            expected[bias] = expected[bias] + module.lora_bias * module.scaling
    for one, other in tied_pairs(make_base(case)):
        changed = one if not torch.equal(expected[one], before[one]) else other
        expected[one] = expected[other] = expected[changed]
    if case == "bdlora":
        assert adapter.notes
    assert after.keys() == expected.keys()
    for name, tensor in after.items():
        assert (tensor - expected[name]).abs().max() <= 1e-6, name
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed, "the case changes nothing"


@pytest.mark.parametrize("container", PEFT.CONTAINERS)
@pytest.mark.parametrize("case", CASES)
def test_what_we_write_runs_in_peft_as_what_peft_wrote(case: str, container: str, tmp_path: Path) -> None:
    model, folder = saved(case, tmp_path)
    wanted = run(case, load(case, folder))
    assert (wanted - run(case, model)).abs().max() <= 1e-6
    assert (wanted - run(case, make_base(case))).abs().max() > 1e-3, "the case changes nothing"
    report = adaptertools.write(read(folder), tmp_path / "by_us", format="peft", container=container)
    assert report.exact
    assert (run(case, load_strictly(case, tmp_path / "by_us")) - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case not in REFORMED])
def test_every_tensor_comes_back_as_peft_wrote_it(case: str, tmp_path: Path) -> None:
    _, folder = saved(case, tmp_path)
    adaptertools.write(read(folder), tmp_path / "by_us", format="peft")
    before, after = load_peft_weights(folder, device="cpu"), load_peft_weights(tmp_path / "by_us", device="cpu")
    copies = (".original_module.", ".modules_to_save.")  # with bias="all" PEFT stores these beside the module itself
    before = {key: tensor for key, tensor in before.items() if not any(copy in key for copy in copies)}
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


@pytest.mark.parametrize("case", CASES)
def test_peft_knows_every_key_of_our_configuration(case: str, tmp_path: Path) -> None:
    _, folder = saved(case, tmp_path)
    adaptertools.write(read(folder), tmp_path / "by_us", format="peft")
    text = (tmp_path / "by_us" / "adapter_config.json").read_text()
    document = json.loads(text)
    assert list(document) == sorted(document)
    theirs = json.loads((folder / "adapter_config.json").read_text())
    assert document.keys() <= theirs.keys()
    newer = document.keys() & peft_config.NEWER_DEFAULTS.keys()
    assert not [key for key in newer if document[key] == peft_config.NEWER_DEFAULTS[key]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if case == "alora" or case.startswith("gpt2"):
            warnings.filterwarnings("ignore", message="aLoRA is currently only")
        config = LoraConfig.from_pretrained(tmp_path / "by_us")
        (tmp_path / "filled").mkdir()
        filled = json.dumps({**peft_config.DEFAULTS, **document})
        (tmp_path / "filled" / "adapter_config.json").write_text(filled)
        assert config == LoraConfig.from_pretrained(tmp_path / "filled")
    assert config.task_type == LoraConfig.from_pretrained(folder).task_type


def test_a_tied_pair_counts_once_as_in_the_forward_pass(tmp_path: Path) -> None:
    model, folder = saved("llama_tied", tmp_path)
    adapter = read(folder)
    assert not any(module.target.parameter == "lm_head" for module in adapter.modules)
    base = make_base("llama_tied")
    weights = base.state_dict()
    with torch.no_grad():
        for module in adapter.modules:
            weights[f"{module.target.parameter}.weight"] += module.delta_weight()
    assert (run("llama_tied", base) - run("llama_tied", model)).abs().max() <= 1e-5


def test_patterns_follow_the_order_of_the_file_as_peft_reads_it(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {}, "alpha_pattern": {"z_proj|q_proj": 3, r"layers\.0\..*": 5, "self_attn.q_proj": 7}}
    _, folder = saved("llama", tmp_path, **patterns)
    model = load("llama", folder)
    for module in read(folder).modules:
        layer = model.get_submodule(f"base_model.model.{module.target.parameter}")
        assert module.scaling == layer.scaling["default"]
        assert module.rank == layer.r["default"]


def test_fused_rows_become_one_pair_of_higher_rank(tmp_path: Path) -> None:
    torch.manual_seed(2)
    shared = torch.randn(2, 12)
    rows = [RowSlice(start=start, stop=start + 12, total=36) for start in (0, 24)]
    modules = []
    for layer, lora_A in ((0, None), (1, shared)):
        for index, part in enumerate(rows):
            modules.append(
                LoraModule(
                    target=Target(parameter=f"transformer.h.{layer}.attn.c_attn", rows=part),
                    lora_A=torch.randn(2, 12) if lora_A is None else lora_A,
                    lora_B=torch.randn(12, 2),
                    alpha=3.0 if layer == 1 or index == 0 else 6.0,
                    transposed=True,
                )
            )
    adapter = Adapter(modules=tuple(modules))
    report = adaptertools.write(adapter, tmp_path / "by_us", format="peft")
    assert report.exact
    assert [note for note in report.notes if "fused" in note] == [
        f"1 fused projection of 2 slots became one pair each, of rank {rank}; as loralib they would no longer be "
        "MergedLinear"
        for rank in (4, 2)
    ]
    document = json.loads((tmp_path / "by_us" / "adapter_config.json").read_text())
    assert sorted([document["r"], *document["rank_pattern"].values()]) == [2, 4]
    base = make_base("gpt2")
    with torch.no_grad():
        for module in modules:
            base.get_parameter(f"{module.target.parameter}.weight").add_(module.delta_weight())
    assert (run("gpt2", load_strictly("gpt2", tmp_path / "by_us")) - run("gpt2", base)).abs().max() <= 1e-5


@pytest.mark.parametrize("rules", [("direct",), ("direct", "alpha/r"), ("alpha/r", "alpha/sqrt(r)")])
def test_scales_that_peft_cannot_mix_become_alpha_over_rank(rules: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(3)
    shapes = {"lin0": (6, 8), "lin1": (8, 6), "head": (6, 3)}
    modules = tuple(
        LoraModule(
            target=Target(parameter=name),
            lora_A=torch.randn(rank, n_in),
            lora_B=torch.randn(n_out, rank),
            alpha=alpha,
            scale_rule=ScaleRule(rules[index % len(rules)]),
        )
        for index, ((name, (n_in, n_out)), rank, alpha) in enumerate(
            zip(shapes.items(), (3, 2, 5), (0.1, 0.7, 2.0), strict=True)
        )
    )
    adapter = Adapter(modules=modules)
    report = adaptertools.write(adapter, tmp_path / "by_us", format="peft")
    assert report.max_relative_error <= 3e-16
    model = load_strictly("linear", tmp_path / "by_us")
    for module in modules:
        layer = model.get_submodule(f"base_model.model.{module.target.parameter}")
        assert layer.scaling["default"] == pytest.approx(module.scaling, rel=3e-16)
        assert report.exact is False or layer.scaling["default"] == module.scaling
        assert torch.equal(layer.lora_B["default"].weight, module.lora_B)
    base = make_base("linear")
    with torch.no_grad():
        for module in modules:
            base.get_parameter(f"{module.target.parameter}.weight").add_(module.delta_weight())
    assert (run("linear", model) - run("linear", base)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("ranks", "alphas"), [((2, 2), (3.0, 6.0)), ((2, 2), (3.0, 5.0)), ((2, 3), (4.0, 6.0)), ((3, 2), (0.0, 6.0))]
)
def test_both_projections_of_an_attention_share_rank_and_alpha(
    ranks: tuple[int, int], alphas: tuple[float, float], tmp_path: Path
) -> None:
    torch.manual_seed(4)
    modules = tuple(
        LoraModule(
            target=Target(parameter=f"attn.{name}"),
            kind=kind,
            lora_A=torch.randn(rank, 8),
            lora_B=torch.randn(n_out, rank),
            alpha=alpha,
            transposed=False,
        )
        for (name, n_out, kind), rank, alpha in zip(
            (("in_proj_weight", 24, Kind.PARAMETER), ("out_proj", 8, Kind.LINEAR)), ranks, alphas, strict=True
        )
    )
    report = adaptertools.write(Adapter(modules=modules), tmp_path / "by_us", format="peft")
    base = make_base("attention")
    with torch.no_grad():
        for module in modules:
            base.get_parameter(full_name(module.target.parameter, base.state_dict())).add_(module.delta_weight())
    got = run("attention", load_strictly("attention", tmp_path / "by_us"))
    assert (got - run("attention", base)).abs().max() <= 1e-5
    again = {module.target.parameter: module for module in read(tmp_path / "by_us").modules}
    for module in modules:
        difference = again[module.target.parameter].delta_weight() - module.delta_weight()
        assert difference.abs().max() <= (1e-6 if not report.exact else 1e-7)


def test_an_attention_without_out_proj_is_adapted_by_its_parameter(tmp_path: Path) -> None:
    torch.manual_seed(5)
    module = LoraModule(
        target=Target(parameter="attn.in_proj_weight"),
        kind=Kind.PARAMETER,
        lora_A=torch.randn(2, 8),
        lora_B=torch.randn(24, 2),
        alpha=3.0,
        transposed=False,
    )
    adaptertools.write(Adapter(modules=(module,)), tmp_path / "by_us", format="peft")
    base = make_base("attention")
    with torch.no_grad():
        base.get_parameter("attn.in_proj_weight").add_(module.delta_weight())
    got = run("attention", load_strictly("attention", tmp_path / "by_us"))
    assert (got - run("attention", base)).abs().max() <= 1e-5
    (again,) = read(tmp_path / "by_us").modules
    assert again.target == module.target
    assert torch.equal(again.delta_weight(), module.delta_weight())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_on_changed_weights_says_so_and_loads_again(init: str, tmp_path: Path) -> None:
    with quiet():
        model = get_peft_model(
            make_base("llama"), LoraConfig(**{**CASES["llama"][1], "init_lora_weights": init})
        ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05)
    wanted = run("llama", model)
    model.save_pretrained(tmp_path / "by_peft")
    adapter = read(tmp_path / "by_peft")
    assert adapter.bases[""].change == init
    assert Feature.CHANGED_BASE in adapter.features
    adaptertools.write(adapter, tmp_path / "by_us", format="peft")
    assert (run("llama", load_strictly("llama", tmp_path / "by_us")) - wanted).abs().max() <= 1e-4
    adaptertools.write(adapter, tmp_path / "dropped", format="peft", drop=["changed-base"])
    assert json.loads((tmp_path / "dropped" / "adapter_config.json").read_text())["init_lora_weights"] is True


REPLICATION: dict[str, Any] = {"layer_replication": [[0, 2], [1, 2], [0, 2]], "modules_to_save": None, "bias": "none"}


def published(parameter: str) -> str:
    """The parameter of the two published layers that one of the five replicated layers shares."""
    return re.sub(r"layers\.(\d)", lambda found: f"layers.{(0, 1, 1, 0, 1)[int(found[1])]}", parameter)


def test_replicated_layers_are_no_changed_weights(tmp_path: Path) -> None:
    model, folder = saved("llama", tmp_path, **REPLICATION)
    adapter = read(folder, make_base("llama"))
    assert adapter.bases[""].change is None
    assert adapter.bases[""].layer_replication == ((0, 2), (1, 2), (0, 2))
    assert Feature.LAYER_REPLICATION in adapter.features
    assert "built of layers [[0, 2], [1, 2], [0, 2]]" in summarize(adapter).bases[""]
    assert not any("the base model" in note for note in adapter.notes)
    layers = {module.target.parameter.split(".layers.")[1][0] for module in adapter.modules}
    assert layers == set("01234")
    weights = make_base("llama").state_dict()
    assert all(
        module.weight_shape == weights[f"{published(str(module.target))}.weight"].shape for module in adapter.modules
    )
    adaptertools.write(adapter, tmp_path / "by_us", format="peft")
    assert (run("llama", load_strictly("llama", tmp_path / "by_us")) - run("llama", model)).abs().max() <= 1e-5


def replaced(model: PeftModel, adapter: Adapter, delta: Callable[[LoraModule], Tensor]) -> PeftModel:
    """PEFT's own model whose factors of each module are replaced by others with this delta weight."""
    for module in adapter.modules:
        layer = model.get_submodule(f"base_model.model.{module.target.parameter}")
        wanted = delta(module).double() / layer.scaling["default"]
        left, values, right = torch.linalg.svd(wanted, full_matrices=False)
        rank = layer.lora_A["default"].weight.shape[0]
        assert float(values[rank:].sum()) <= 1e-6
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(right[:rank])
            layer.lora_B["default"].weight.copy_(left[:, :rank] * values[:rank])
    return model


def test_an_adapter_of_replicated_layers_is_truncated_and_rescaled_and_peft_loads_all_of_it(tmp_path: Path) -> None:
    model, folder = saved("llama", tmp_path, **REPLICATION)
    adapter = adaptertools.read(folder)

    def nearest(module: LoraModule) -> Tensor:
        left, values, right = torch.linalg.svd(module.delta_weight().double())
        return values[0] * left[:, :1] @ right[:1]

    cut = adaptertools.truncate(adapter, rank=1).adapter
    adaptertools.write(cut, tmp_path / "cut", format="peft")
    rescaled = adaptertools.rescale(cut, 8)
    adaptertools.write(rescaled, tmp_path / "rescaled", format="peft")
    before = run("llama", model)
    wanted = run("llama", replaced(model, adapter, nearest))
    assert (wanted - before).abs().max() > 1e-3
    for name in ("cut", "rescaled"):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["layer_replication"] == REPLICATION["layer_replication"]
        assert (run("llama", load_strictly("llama", tmp_path / name)) - wanted).abs().max() <= 1e-5


def test_adapters_of_the_same_replicated_layers_are_stacked_and_no_others(tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path, **REPLICATION)
    adapter = adaptertools.read(folder)
    other = adapter.map_modules(lambda module: replace(module, lora_A=module.lora_A.flip(0)))
    adaptertools.write(adaptertools.stack([adapter, other], [0.5, 1.0]).adapter, tmp_path / "stacked", format="peft")
    deltas = {
        str(one.target): 0.5 * one.delta_weight() + two.delta_weight()
        for one, two in zip(adapter.modules, other.modules, strict=True)
    }
    loaded = load_strictly("llama", tmp_path / "stacked")
    for name, delta in deltas.items():
        got = loaded.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        assert (got - delta).abs().max() <= 1e-5, name
    for layers in ((), ((0, 2), (0, 2), (1, 2))):
        another = replace(other, bases={"": replace(other.bases[""], layer_replication=layers)})
        for force in (False, True):
            with pytest.raises(
                UnsupportedFeatureError, match=r"layers \[\[0, 2\], \[1, 2\], \[0, 2\]\].*layer_replication"
            ):
                adaptertools.stack([adapter, another], force=force)
        assert any(
            "layers [[0, 2], [1, 2], [0, 2]] in A" in said for said in adaptertools.diff(adapter, another).others
        )


def test_other_formats_refuse_replicated_layers_and_say_what_giving_them_up_costs(tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path, **REPLICATION)
    adapter = adaptertools.read(folder)
    with pytest.raises(UnsupportedFeatureError, match=r"layer-replication \(.* built of layers \[\[0, 2\].*or none\)"):
        adaptertools.write(adapter, tmp_path / "flax", format="flax")
    report = adaptertools.write(adapter, tmp_path / "flax", format="flax", drop=["layer-replication"])
    (dropped,) = report.dropped
    assert "on the published layers, factors meet others than they were trained on, or none" in dropped


@pytest.mark.parametrize("ranges", [[[0]], [[0, 1, 2]], [[2, 0]], [["0", 2]], "all", {"0": 2}, [[-1, 2]], [[0, True]]])
def test_a_layer_replication_that_is_none_is_an_error(ranges: Any, tmp_path: Path) -> None:
    _, folder = saved("llama", tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "layer_replication": ranges}))
    with pytest.raises(ConfigError, match="layer_replication is"):
        read(folder)


def test_patterns_for_parameters_are_applied_whatever_peft_warns(tmp_path: Path) -> None:
    _, folder = saved("moe", tmp_path)
    adapter = adaptertools.read(folder)
    ranks = iter(range(1, 99))
    uneven = adapter.map_modules(
        lambda module: (
            replace(
                module,
                lora_A=torch.cat([module.lora_A] * rank, dim=-2),
                lora_B=torch.cat([module.lora_B] * rank, dim=-1),
            )
            if module.kind is Kind.PARAMETER and (rank := next(ranks))
            else module
        )
    )
    report = adaptertools.write(uneven, tmp_path / "by_us", format="peft")
    assert any("PEFT 0.21 warns at loading that keys of rank_pattern were ignored" in note for note in report.notes)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(make_base("moe"), tmp_path / "by_us").eval()
    assert any("rank_pattern keys did not match" in str(warning.message) for warning in said)
    assert load_strictly("moe", tmp_path / "by_us") is not None
    again = read(tmp_path / "by_us")
    before = make_base("moe").state_dict()
    merged = loaded.merge_and_unload().state_dict()
    for module in uneven.modules:
        name = full_name(module.target.parameter, before)
        assert (merged[name] - before[name] - module.delta_weight()).abs().max() <= 1e-5, name
    assert {module.rank for module in again.modules} == {module.rank for module in uneven.modules}
    assert not any(
        "warns at loading" in note for note in adaptertools.write(adapter, tmp_path / "even", format="peft").notes
    )


def test_half_precision_factors_keep_their_bits(tmp_path: Path) -> None:
    base = make_base("llama").to(torch.bfloat16)
    with quiet():
        model = get_peft_model(base, LoraConfig(**CASES["llama"][1]), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path / "by_peft")
    adapter = read(tmp_path / "by_peft")
    assert {module.lora_A.dtype for module in adapter.modules} == {torch.bfloat16}
    adaptertools.write(adapter, tmp_path / "by_us", format="peft", container="torch")
    before, after = (load_peft_weights(tmp_path / name, device="cpu") for name in ("by_peft", "by_us"))
    assert all(torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype for key, tensor in before.items())


def test_a_state_dict_with_adapter_names_is_read_by_name(tmp_path: Path) -> None:
    model = make_adapter("bias_all", make_base("bias_all"), bias="none")
    second = make_adapter("bias_all", make_base("bias_all"), bias="none", r=3)
    second.save_pretrained(tmp_path / "second")
    model.load_adapter(tmp_path / "second", adapter_name="second")
    tensors = {
        key: tensor for key, tensor in model.state_dict().items() if "original" not in key and "base_l" not in key
    }
    tensors = {key: tensor for key, tensor in tensors.items() if "lora_" in key or "modules_to_save" in key}
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    adapter = adaptertools.from_state_dict(tensors, config, format="peft", adapter_name="second")
    assert {module.rank for module in adapter.modules} == {3}
    reference = read(tmp_path / "second")
    for module, other in zip(adapter.modules, reference.modules, strict=True):
        assert torch.equal(module.delta_weight(), other.delta_weight())
    assert adapter.full_weights.keys() == reference.full_weights.keys() == {"head.weight", "head.bias"}
    for name, weight in reference.full_weights.items():
        assert torch.equal(adapter.full_weights[name].weight, weight.weight)


class Stored(nn.Module):
    """A model with just the parameters of a fixture, in layers of the kind that they belong to."""

    def __init__(self, shapes: dict[str, list[int]], experts_are_transposed: bool) -> None:
        super().__init__()
        for name in sorted(shapes, reverse=True):  # gate_up_proj before down_proj, as in models of transformers
            shape = shapes[name]
            *path, leaf = name.split(".")
            home: nn.Module = self
            for depth, part in enumerate(path):
                if part not in home._modules:
                    linear = depth == len(path) - 1 and f"{'.'.join(path)}.weight" in shapes
                    bias = f"{'.'.join(path)}.bias" in shapes
                    home.add_module(part, nn.Linear(shape[-1], shape[0], bias=bias) if linear else nn.Module())
                home = home.get_submodule(part)
            if leaf not in home._parameters:
                home.register_parameter(leaf, nn.Parameter(torch.randn(shape)))
                home.is_transposed = experts_are_transposed


EARLIER = sorted((Path(__file__).parents[1] / "fixtures" / "peft").glob("*_peft_0_*"))


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("folder", EARLIER, ids=lambda folder: folder.name)
def test_what_earlier_versions_wrote_means_the_same_in_todays_peft(folder: Path, tmp_path: Path) -> None:
    case = json.loads((folder / "case.json").read_text())
    shapes = {name: tuple(shape) for name, shape in case["shapes"].items()}
    adapter = PEFT.read(Source(folder), base=SimpleNamespace(shapes=shapes, config=case["config"]))
    adaptertools.write(adapter, tmp_path / "by_us", format="peft")
    base = Stored(case["shapes"], case["config"].get("model_type") == "gpt_oss")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    assert before.keys() == case["shapes"].keys()
    after = PeftModel.from_pretrained(base, tmp_path / "by_us").merge_and_unload().state_dict()
    expected = load_file(folder / "expected.safetensors")
    assert expected
    for name, tensor in after.items():
        assert (tensor - before[name] - expected.get(name, 0)).abs().max() <= 1e-6, name


def test_named_adapters_stand_in_sub_folders(tmp_path: Path) -> None:
    model = make_adapter("linear", make_base("linear"))
    with quiet():
        model.add_adapter("french", LoraConfig(**{**CASES["linear"][1], "r": 1}))
    model.save_pretrained(tmp_path / "both")
    assert {module.rank for module in read(tmp_path / "both").modules} == {3}
    assert {module.rank for module in read(tmp_path / "both" / "french").modules} == {1}
    assert {module.rank for module in read(tmp_path / "both", adapter_name="french").modules} == {1}
    assert any("french" in note for note in read(tmp_path / "both").notes)


def test_rewriting_does_not_touch_the_adapter(tmp_path: Path) -> None:
    _, folder = saved("moe", tmp_path)
    adapter = read(folder)
    before = copy.deepcopy({name: tensor.clone() for name, tensor in adapter.named_tensors.items()})
    artifact = PEFT.write(adapter, Encoder(), container="safetensors")
    for tensor in artifact.tensors.values():
        tensor.compute()
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter.named_tensors.items())
