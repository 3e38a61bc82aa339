"""PEFT -> Flax -> PEFT, real PEFT at both ends: bit for bit where the scale can be undone, else within the error."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax_oracle import Layers, inputs, output, peft_model, saved
from peft import PeftModel
from proof import assert_diff_proves
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import adaptertools
from adaptertools.errors import UnsupportedFeatureError

BOTH = ["up", "down"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": BOTH},
    "one scale not a power of two": {"r": 2, "lora_alpha": 5, "target_modules": BOTH},
    "rslora": {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": BOTH},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": BOTH,
        "rank_pattern": {"layers.0.down": 5},
        "alpha_pattern": {"layers.1.up": 8, "layers.0.down": 40},
    },
}
EXACT_IN_FLOAT32 = {"plain", "patterns"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("format", ["flax", "flax-qwix", "flax-gemma"])
@pytest.mark.parametrize("container", ["msgpack", "npz", "safetensors", "orbax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_peft_adapter_survives_the_way_through_flax(
    case: str, format: str, container: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = peft_model(Layers(), **CASES[case]).to(dtype)
    source = saved(model, tmp_path / "source")
    there = adaptertools.convert(source, tmp_path / "flax", to=format, container=container)
    back_again = adaptertools.convert(tmp_path / "flax", tmp_path / "back", to="peft")
    assert_diff_proves(adaptertools.read(source), adaptertools.read(tmp_path / "back"), there, back_again)
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    exact = format == "flax-qwix" or dtype is torch.bfloat16 or case in EXACT_IN_FLOAT32
    if exact:
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype
            assert torch.equal(tensor, after[name]), name
        adaptertools.convert(source, tmp_path / "direct", to="peft")
        direct, back = (
            json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("direct", "back")
        )
        assert direct == back
        assert (back["r"], back["lora_alpha"]) == (CASES[case]["r"], CASES[case]["lora_alpha"])
    else:
        assert not there.exact
        assert there.max_relative_error < 6e-8
    if dtype is torch.float32:
        x = inputs(5, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            again = PeftModel.from_pretrained(Layers(), tmp_path / "back").eval()
        np.testing.assert_allclose(output(again, x), output(model, x), atol=1e-5, rtol=1e-5)


def test_a_transposed_layer_stays_transposed(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = Conv1D(9, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.c_attn(x)
            return result

    model = peft_model(Model(), r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True)
    adaptertools.convert(saved(model, tmp_path / "source"), tmp_path / "flax", to="flax")
    adaptertools.convert(tmp_path / "flax", tmp_path / "back", to="peft")
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert adaptertools.diff(*(adaptertools.read(tmp_path / name) for name in ("source", "back")), tolerance=0).same


@pytest.mark.parametrize("format", ["flax", "flax-qwix", "flax-gemma"])
def test_what_flax_cannot_carry_is_refused_by_name_until_it_is_dropped(format: str, tmp_path: Path) -> None:
    model = peft_model(Layers(), r=2, lora_alpha=4, target_modules=["up"], use_dora=True, modules_to_save=["down"])
    source = saved(model, tmp_path / "source")
    with pytest.raises(UnsupportedFeatureError, match=r"dora.*full-weights"):
        adaptertools.convert(source, tmp_path / "flax", to=format)
    assert not (tmp_path / "flax").exists()
    report = adaptertools.convert(source, tmp_path / "flax", to=format, drop=["dora", "full-weights"])
    assert any(entry.startswith("dora: ") for entry in report.dropped)
    assert {module.target.parameter for module in adaptertools.read(tmp_path / "flax").modules} == {
        "layers.0.up",
        "layers.1.up",
    }
