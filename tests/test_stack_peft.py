"""Stacks beside what real PEFT makes of the same adapters with `add_weighted_adapter`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_cases import Net
from torch import Tensor

import adaptertools
from adaptertools.adapter import Adapter

CONFIGS = (
    {"target_modules": ["lin0", "lin1"], "r": 3, "lora_alpha": 5},
    {"target_modules": ["lin0", "lin1"], "r": 2, "lora_alpha": 8},
)
WEIGHTS = [0.7, 1.5]


def trained(folder: Path, **changes: Any) -> tuple[PeftModel, list[Adapter]]:
    """A PEFT model with two adapters, and the two as read from what it saves."""
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(**{**CONFIGS[0], **changes}), adapter_name="one")
    model.add_adapter("two", LoraConfig(**{**CONFIGS[1], **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model, [adaptertools.read(folder / name) for name in ("one", "two")]


def combined(model: PeftModel, kind: str, rank: int | None = None) -> dict[str, Tensor]:
    """The delta weights of what PEFT makes of both."""
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "both", combination_type=kind, svd_rank=rank)
    layers = {"lin0": model.base_model.model.lin0, "lin1": model.base_model.model.lin1}
    return {name: layer.get_delta_weight("both").detach().double() for name, layer in layers.items()}


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    return {m.target.parameter: m.delta_weight(dtype=torch.float64) for m in adapter.modules}


def wanted(adapters: list[Adapter]) -> dict[str, Tensor]:
    first, second = (deltas(adapter) for adapter in adapters)
    return {name: WEIGHTS[0] * first[name] + WEIGHTS[1] * second[name] for name in first}


def off(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert found.keys() == right.keys()
    return max(float((found[name] - delta).norm() / delta.norm()) for name, delta in right.items())


def test_the_sum_is_that_of_pefts_cat(tmp_path: Path) -> None:
    model, adapters = trained(tmp_path)
    done = adaptertools.stack(adapters, WEIGHTS)
    assert off(deltas(done.adapter), combined(model, "cat")) < 1e-6
    assert {m.rank for m in done.adapter.modules} == {5}


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_truncated_sum_is_that_of_pefts_svd(rank: int, tmp_path: Path) -> None:
    model, adapters = trained(tmp_path)
    done = adaptertools.stack(adapters, WEIGHTS, rank=rank)
    assert off(deltas(done.adapter), combined(model, "svd", rank)) < 1e-6
    assert {m.rank for m in done.adapter.modules} == {rank}


@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_where_peft_is_wrong_the_dense_sum_is_right(kind: str, tmp_path: Path) -> None:
    changes = {"r": 3} if kind == "linear" else {"use_rslora": True}
    model, adapters = trained(tmp_path, **changes)
    done = adaptertools.stack(adapters, WEIGHTS)
    assert off(deltas(done.adapter), wanted(adapters)) < 1e-6
    assert off(combined(model, kind), wanted(adapters)) > 0.1


def test_real_peft_loads_a_stack(tmp_path: Path) -> None:
    model, adapters = trained(tmp_path / "saved", use_rslora=True)
    base = model.get_base_model()
    before = {name: getattr(base, name).base_layer.weight.detach().clone() for name in ("lin0", "lin1")}
    done = adaptertools.stack(adapters, WEIGHTS, rank=4)
    adaptertools.write(done.adapter, tmp_path / "out", format="peft")
    torch.manual_seed(0)
    merged = PeftModel.from_pretrained(Net(), tmp_path / "out").merge_and_unload()
    right = wanted(adapters)
    assert done.truncation is not None
    total = sum(float(delta.norm()) ** 2 for delta in right.values()) ** 0.5
    found = {name: (getattr(merged, name).weight.detach() - before[name]).double() for name in before}
    distance = sum(float((found[name] - right[name]).norm()) ** 2 for name in right) ** 0.5 / total
    assert distance == pytest.approx(done.truncation.relative_error, abs=1e-6)
