"""Adapters that other people trained, where a folder of them stands beside the checkout; without it nothing is lost."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from hollow_models import hollow_model, shapes_of
from proof import assert_diff_proves, without_component

import adaptertools
from adaptertools import api, formats
from adaptertools.adapter import Adapter, LoraModule
from adaptertools.containers.source import Source
from adaptertools.errors import MissingAlphaError, NotLoraError, UnsupportedFeatureError

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="no folder of real adapters beside the checkout")

LORALIB = "loralib_roberta_base_mnli"
PEFT = {
    "peft_monteclora_roberta_mrpc": {"modules": 24, "ranks": {8}, "scalings": {2.0}},
    "peftreg_lora_mlp": {"modules": 1, "ranks": {8}, "scalings": {1.0}},
    "peftreg_lora_mlp_modules_to_save": {"modules": 1, "ranks": {8}, "scalings": {1.0}},
    "gpt2_tigrinya": {"modules": 36, "ranks": {8}, "scalings": {4.0}},
    "privacyfilter_moe_tokcls": {"modules": None, "ranks": {16}, "scalings": {2.0}},
    "gptneox_opencalm1b_f16_r1": {"modules": None, "ranks": {1}, "scalings": {32.0}},
}


MLX = ("mlx_discollama_llama3_8b", "mlx_npz_potter")
DIFFUSERS = tuple(f"sd15_diffusers_bin_and_st/pytorch_lora_weights.{suffix}" for suffix in ("bin", "safetensors"))
STATED = {LORALIB: {"alpha": 16}, "mlx_npz_potter": {"scale": 20.0}}
"""What a file does not say about its adapter."""


def read(name: str) -> Adapter:
    return adaptertools.read(REAL / name, **STATED.get(name, {}))


@pytest.mark.parametrize("name", PEFT)
def test_real_peft_adapters_are_read(name: str) -> None:
    adapter = read(name)
    facts = PEFT[name]
    assert {module.rank for module in adapter.modules} == facts["ranks"]
    assert {module.scaling for module in adapter.modules} == facts["scalings"]
    if facts["modules"] is not None:
        assert len(adapter.modules) == facts["modules"]


@pytest.mark.parametrize(("name", "kind"), [("peftreg_ia3_mlp", "IA3"), ("peftreg_adalora_mlp", "ADALORA")])
def test_adapters_that_are_not_lora_are_refused_by_name(name: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(NotLoraError, match=kind):
        adaptertools.read(REAL / name)
    assert list(tmp_path.iterdir()) == []


def test_the_real_loralib_checkpoint_needs_alpha() -> None:
    with pytest.raises(MissingAlphaError, match="16"):
        adaptertools.read(REAL / LORALIB)
    adapter = read(LORALIB)
    assert len(adapter.modules) == 24
    assert {tuple(module.lora_A.shape) for module in adapter.modules} == {(8, 768)}
    assert len(adapter.full_weights) == 4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_real_loralib_checkpoint_becomes_an_adapter_that_peft_loads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    adaptertools.convert(REAL / LORALIB, tmp_path / "peft", to="peft", read_options={"alpha": 16})
    config = transformers.RobertaConfig(num_labels=3, vocab_size=100, max_position_embeddings=66)
    model = transformers.RobertaForSequenceClassification(config)
    base = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "peft")
    result = wrapped.load_adapter(tmp_path / "peft", adapter_name="again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "again" in key]
    merged = wrapped.merge_and_unload().state_dict()
    stored = torch.load(REAL / LORALIB / "roberta_base_lora_mnli.bin", map_location="cpu", weights_only=True)
    for layer in range(12):
        for name in ("query", "value"):
            home = f"roberta.encoder.layer.{layer}.attention.self.{name}"
            delta = (stored[f"{home}.lora_B"] @ stored[f"{home}.lora_A"]) * 2.0
            assert torch.allclose(merged[f"{home}.weight"], base[f"{home}.weight"] + delta, atol=1e-6)
    assert torch.equal(merged["classifier.out_proj.weight"], stored["classifier.out_proj.weight"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_two_real_adapters_are_stacked_truncated_and_loaded_by_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    sources = [read(LORALIB), read("peft_monteclora_roberta_mrpc")]
    with pytest.raises(
        UnsupportedFeatureError, match=r"source 1 \(loralib_roberta_base_mnli\).*classifier\.dense\.bias"
    ):
        adaptertools.stack(sources)
    done = adaptertools.stack(sources, full_weights=1, rank=8)
    assert done.exact
    assert done.truncation is not None
    assert {m.rank for m in done.adapter.modules} == {8}
    assert len(done.left_out) == 4
    adaptertools.write(done.adapter, tmp_path / "out", format="peft")
    config = transformers.RobertaConfig(num_labels=3, vocab_size=100, max_position_embeddings=66)
    model = transformers.RobertaForSequenceClassification(config)
    base = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    merged = wrapped.merge_and_unload().state_dict()
    deltas = [{m.target.parameter: m.delta_weight(dtype=torch.float64) for m in one.modules} for one in sources]
    assert deltas[0].keys() == deltas[1].keys()
    total = distance = 0.0
    for name, first in deltas[0].items():
        exact = first + deltas[1][name]
        found = merged[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        total, distance = total + float(exact.norm()) ** 2, distance + float((found - exact).norm()) ** 2
    assert (distance / total) ** 0.5 == pytest.approx(done.truncation.relative_error, rel=1e-3)
    stored = torch.load(REAL / LORALIB / "roberta_base_lora_mnli.bin", map_location="cpu", weights_only=True)
    assert torch.equal(merged["classifier.out_proj.weight"], stored["classifier.out_proj.weight"])


LLAMA_3 = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
CONFIGS = {
    MLX[0]: LLAMA_3,
    MLX[1]: LLAMA_3 | {"model_type": "mistral", "vocab_size": 32000},
    "gpt2_tigrinya": {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768},
    "gptneox_opencalm1b_f16_r1": {"model_type": "gpt_neox", "num_hidden_layers": 24, "num_attention_heads": 16},
}
"""What formats that need the base model's config.json read there."""

REFUSED = {
    **{(name, "gguf"): r"the base is a '\w+' model, whose tensors llama.cpp may store" for name in (LORALIB, *PEFT)},
    **{(name, "gguf"): "is of an image model, and GGUF adapters are for language models" for name in DIFFUSERS},
}
"""The adapters that a format refuses beyond what its CARRIES says, and what the message says of it."""


@pytest.mark.parametrize("format", [name for name in formats.names() if formats.get(name).CONTAINERS])
@pytest.mark.parametrize("name", [LORALIB, *PEFT, *MLX, *DIFFUSERS])
def test_real_adapters_survive_every_format_that_can_hold_them(name: str, format: str, tmp_path: Path) -> None:
    adapter = read(name)
    dst = tmp_path / "out"
    base = hollow_model(tmp_path / "base", shapes_of(adapter), CONFIGS.get(name, {"model_type": "roberta"}))
    options: dict[str, Any] = {"base": base}
    missing = adapter.features - formats.get(format).CARRIES
    if missing:
        with pytest.raises(UnsupportedFeatureError):
            adaptertools.write(adapter, dst, format=format, **options)
        assert not dst.exists()
    options["drop"] = [feature.value for feature in missing]
    if (name, format) in REFUSED:
        with pytest.raises(UnsupportedFeatureError, match=REFUSED[name, format]):
            adaptertools.write(adapter, dst, format=format, **options)
        return
    report = adaptertools.write(adapter, dst, format=format, **options)
    assert formats.detect(Source(dst)) == format
    before = without_component(api.without(adapter, missing))
    after = without_component(adaptertools.read(dst, base=base))
    assert_diff_proves(before, after, report)
    again = {str(module.target): module for module in after.modules}
    assert again.keys() == {str(module.target) for module in before.modules}
    for module in before.modules:
        other = again[str(module.target)]
        assert relative_distance(module, other) <= report.max_relative_error + 1e-15


def relative_distance(module: LoraModule, other: LoraModule) -> float:
    """The distance of two dense delta weights by the norm of the first, some rows at a time: they are large."""
    distance = norm = 0.0
    pairs = zip(module.lora_B.double().split(256, dim=-2), other.lora_B.double().split(256, dim=-2), strict=True)
    for rows, other_rows in pairs:
        delta = rows @ module.lora_A.double() * module.scaling
        norm += float(delta.norm()) ** 2
        distance += float((other_rows @ other.lora_A.double() * other.scaling - delta).norm()) ** 2
    return (distance / norm) ** 0.5


def test_the_real_loralib_checkpoint_and_its_conversion_to_peft_are_the_same(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    adaptertools.convert(REAL / LORALIB, tmp_path / "peft", to="peft", read_options={"alpha": 16})
    ran = run("diff", REAL / LORALIB, tmp_path / "peft", "--source-alpha", "16", "--tolerance", "0", "--json")
    assert (ran.code, ran.json["relative_distance"], ran.json["weights"]) == (0, 0, [])
    assert ran.json["modules"] == {"in_both": 24, "identical": 24, "only_in_a": [], "only_in_b": []}
    assert run("diff", REAL / LORALIB, tmp_path / "peft", "--source-alpha", "8").code == 4


def test_two_real_adapters_of_one_model_are_not_the_same(run: Callable[..., Ran]) -> None:
    other = "peft_monteclora_roberta_mrpc"
    ran = run("diff", REAL / LORALIB, REAL / other, "--source-alpha", "16", "--json")
    assert ran.code == 4
    one, two = (
        {m.target.parameter: m.lora_B.double() @ m.lora_A.double() * m.scaling for m in read(name).modules}
        for name in (LORALIB, other)
    )
    assert one.keys() == two.keys()
    norm, apart = (
        math.hypot(*(float(matrix.norm()) for matrix in matrices))
        for matrices in (one.values(), [one[name] - two[name] for name in one])
    )
    assert ran.json["norm_a"] == pytest.approx(norm, rel=1e-12)
    assert ran.json["relative_distance"] == pytest.approx(apart / norm, rel=1e-12)
    assert {weight["name"] for weight in ran.json["weights"]} >= {
        "classifier.out_proj.weight",
        "classifier.dense.weight",
    }
