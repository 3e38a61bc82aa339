"""Adapters that other people trained, where a folder of them stands beside the checkout; without it nothing is lost."""

from pathlib import Path

import pytest
import torch

import adaptertools
from adaptertools import formats
from adaptertools.adapter import Adapter
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


def read(name: str) -> Adapter:
    return adaptertools.read(REAL / name, alpha=16) if name == LORALIB else adaptertools.read(REAL / name)


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


@pytest.mark.parametrize("format", [name for name in formats.names() if formats.get(name).CONTAINERS])
@pytest.mark.parametrize("name", [LORALIB, *PEFT])
def test_real_adapters_survive_every_format_that_can_hold_them(name: str, format: str, tmp_path: Path) -> None:
    adapter = read(name)
    dst = tmp_path / "out"
    missing = adapter.features - formats.get(format).CARRIES
    if missing:
        with pytest.raises(UnsupportedFeatureError):
            adaptertools.write(adapter, dst, format=format)
        assert not dst.exists()
    report = adaptertools.write(adapter, dst, format=format, drop=[feature.value for feature in missing])
    assert formats.detect(Source(dst)) == format
    again = {str(module.target): module for module in adaptertools.read(dst).modules}
    assert again.keys() == {str(module.target) for module in adapter.modules}
    for module in adapter.modules:
        other = again[str(module.target)]
        delta = module.lora_B.double() @ module.lora_A.double() * module.scaling
        error = (other.lora_B.double() @ other.lora_A.double() * other.scaling - delta).norm() / delta.norm()
        assert error <= report.max_relative_error + 1e-15
