"""Adapters that other people trained, merged into models of the shapes that they were trained on, with random weights.

They lie in a folder beside the checkout; without it nothing is lost.
"""

from collections.abc import Callable
from pathlib import Path

import loralib
import pytest
import torch
import transformers
from conftest import Ran
from merged_models import weights_in
from peft import PeftModel
from peft_cases import quiet
from safetensors.torch import load_file, save_file
from test_merge_oracle import assert_equal_to
from test_real_adapters import LORALIB, REAL
from torch import Tensor, nn

import adaptertools

pytestmark = [
    pytest.mark.skipif(not REAL.is_dir(), reason="no folder of real adapters beside the checkout"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.slow,
]

TOKENS = torch.arange(40).reshape(2, 20) * 613 % 50257
SHARD = "200MB"


def roberta() -> nn.Module:
    """roberta-base with a head of three labels, its weights random."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "num_labels": 3}
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes)).eval()


def gpt2() -> nn.Module:
    """gpt2, its weights random."""
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()


def save(model: nn.Module, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder, max_shard_size=SHARD)
    return folder


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS).logits
    return result


def loaded(kind: type, folder: Path) -> nn.Module:
    """As transformers loads it, every tensor claimed."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def assert_proven(run: Callable[..., Ran], *places: str | Path) -> None:
    proof = run("verify", *places, "--device", "cpu", "--json")
    assert (proof.code, proof.json["ok"]) == (0, True), proof.out
    assert [each["verdict"] for each in proof.json["adapters"]] == ["once"]


def test_the_real_mnli_adapter_merges_as_loralib_and_peft_merge_it(run: Callable[..., Ran], tmp_path: Path) -> None:
    model = roberta()
    base, ours, adapter = save(model, tmp_path / "base"), tmp_path / "ours", REAL / LORALIB
    assert len(list(base.glob("*.safetensors"))) > 1
    before = logits(model)
    assert run("merge", base, adapter, ours, "--source-alpha", "16", "--device", "cpu").code == 0
    assert_proven(run, base, adapter, ours, "--source-alpha", "16")
    found = weights_in(ours)

    for layer in model.roberta.encoder.layer:
        for name in ("query", "value"):
            old = getattr(layer.attention.self, name)
            new = loralib.Linear(768, 768, r=8, lora_alpha=16)
            new.load_state_dict(old.state_dict(), strict=False)
            setattr(layer.attention.self, name, new)
    stored = torch.load(adapter / "roberta_base_lora_mnli.bin", map_location="cpu", weights_only=True)
    model.train()
    report = model.load_state_dict(stored, strict=False)
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if "lora_" in key]
    model.eval()
    assert_equal_to(found, {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name})
    wanted = logits(model)
    assert (logits(loaded(transformers.RobertaForSequenceClassification, ours)) - wanted).abs().max() <= 1e-5
    assert (wanted - before).abs().max() > 1e-2

    adaptertools.convert(adapter, tmp_path / "peft", to="peft", read_options={"alpha": 16})
    with quiet():
        merged = PeftModel.from_pretrained(roberta(), tmp_path / "peft").merge_and_unload()
    assert_equal_to(found, weights_in(save(merged, tmp_path / "theirs")))
    assert_proven(run, base, adapter, tmp_path / "theirs", "--source-alpha", "16")


def test_the_real_gpt2_adapter_merges_as_peft_and_loralib_merge_it(run: Callable[..., Ran], tmp_path: Path) -> None:
    model = gpt2()
    base, ours, adapter = save(model, tmp_path / "base"), tmp_path / "ours", REAL / "gpt2_tigrinya"
    assert len(list(base.glob("*.safetensors"))) > 1
    before = logits(model)
    assert run("merge", base, adapter, ours, "--device", "cpu").code == 0
    assert_proven(run, base, adapter, ours)
    found, weights = weights_in(ours), weights_in(base)

    with quiet():
        wrapped = PeftModel.from_pretrained(model, adapter).eval()
    wanted = logits(wrapped)
    assert_equal_to(found, weights_in(save(wrapped.merge_and_unload(), tmp_path / "theirs")))
    assert_proven(run, base, adapter, tmp_path / "theirs")
    assert (logits(loaded(transformers.GPT2LMHeadModel, ours)) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (wanted - before).abs().max() > 1e-2

    factors = load_file(adapter / "adapter_model.safetensors")
    changed = [key for key in factors if key.endswith("lora_A.weight")]
    assert len(changed) == 36
    for key in changed:
        lora_A, lora_B = factors[key], factors[key.replace("lora_A", "lora_B")]
        name = f"{key.removeprefix('base_model.model.').removesuffix('.lora_A.weight')}.weight"
        layer = loralib.Linear(lora_A.shape[1], len(lora_B), r=8, lora_alpha=32, fan_in_fan_out=True)
        layer.load_state_dict({"weight": weights[name], "lora_A": lora_A, "lora_B": lora_B}, strict=False)
        layer.eval()
        assert_equal_to({name: found.pop(name)}, {name: layer.weight.detach()})
    assert len(found) == len(weights) - 36
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.items())


@pytest.mark.parametrize("name", ["peftreg_lora_mlp", "peftreg_lora_mlp_modules_to_save"])
def test_the_recorded_output_of_peft_comes_out_of_the_merge(name: str, run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    weights = load_file(REAL / name / "derived_base_seed0.safetensors")
    save_file(weights, tmp_path / "base" / "model.safetensors")
    assert run("merge", tmp_path / "base", REAL / name, tmp_path / "ours", "--device", "cpu").code == 0
    found, expected = weights_in(tmp_path / "ours"), load_file(REAL / name / "derived_merged.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, rtol=2e-6, atol=2e-6), key
    assert_proven(run, tmp_path / "base", REAL / name, tmp_path / "ours")
