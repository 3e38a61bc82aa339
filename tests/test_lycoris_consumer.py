"""LyCORIS's own modules as the judge: what their forward pass applies is what we read, and what we write they load."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris_modules import CASES, applied, built, saved
from safetensors.torch import load_file, save_file

import adaptertools
from adaptertools.adapter import Adapter

pytestmark = pytest.mark.consumers

RELATIVE = {torch.float32: 1e-6, torch.float64: 1e-12}


def read(tmp_path: Path, name: str, dtype: torch.dtype) -> tuple[Adapter, torch.Tensor, torch.Tensor]:
    """The adapter of a case, the weight of its layer, and what LyCORIS adds to that."""
    layer, module = built(name, dtype)
    save_file(saved(name, module), tmp_path / "adapter.safetensors")
    save_file({f"{name}.weight": layer.weight.detach()}, tmp_path / "base.safetensors")
    adapter = adaptertools.read(tmp_path / "adapter.safetensors", base=tmp_path / "base.safetensors")
    return adapter, layer.weight.detach(), applied(layer, module)


def ours(adapter: Adapter, weight: torch.Tensor) -> torch.Tensor:
    (module,) = adapter.modules
    return module.delta_weight(dtype=torch.float64, base_weight=weight.double())


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_what_we_read_is_what_the_forward_pass_applies(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter, weight, expected = read(tmp_path, name, dtype)
    (module,) = adapter.modules
    assert str(module.target) == f"unet:{name}"
    assert module.rank == CASES[name].rank
    assert module.weight_shape == weight.shape
    error = (ours(adapter, weight) - expected.double()).norm() / expected.double().norm()
    assert error < RELATIVE[dtype] * (10 if module.magnitude is not None else 1)  # LyCORIS adds an epsilon to norms


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.method != "locon"])
def test_what_we_read_is_its_get_weight(name: str, tmp_path: Path) -> None:
    layer, module = built(name, torch.float64)
    save_file(saved(name, module), tmp_path / "adapter.safetensors")
    save_file({f"{name}.weight": layer.weight.detach()}, tmp_path / "base.safetensors")
    (read,) = adaptertools.read(tmp_path / "adapter.safetensors", base=tmp_path / "base.safetensors").modules
    low_rank = (read.lora_B @ read.lora_A * read.scaling).reshape(layer.weight.shape)
    expected = module.get_weight(layer.weight.shape).detach()
    assert (low_rank - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("_in")])  # it loads norms of rows alone
def test_what_we_write_lycoris_loads_as_locon(name: str, tmp_path: Path) -> None:
    from lycoris.modules.locon import LoConModule

    adapter, _, expected = read(tmp_path, name, torch.float32)
    adaptertools.write(adapter, tmp_path / "written.safetensors", format="kohya")
    written = load_file(tmp_path / "written.safetensors")
    flat = "lora_unet_" + name.replace(".", "_")
    layer, _ = built(name)
    parts: list[Any] = LoConModule.extract_state_dict(written, flat)
    with torch.no_grad():
        module = LoConModule.make_module_from_state_dict(flat, layer, *parts).eval()
        found = applied(layer, module)
    assert (found - expected).norm() < 2e-6 * expected.norm()


def test_the_trap_that_get_diff_weight_scales_twice_is_still_there() -> None:
    layer, module = built("loha.linear", torch.float64)
    once, twice = module.get_weight(layer.weight.shape), module.get_diff_weight(shape=layer.weight.shape)[0]
    assert torch.allclose(twice, once * 0.5)
    assert torch.allclose(applied(layer, module), once)
