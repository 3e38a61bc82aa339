"""`adaptertools inspect`."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptertools
from adaptertools.adapter import Adapter, FullWeight


def test_it_prints_what_the_adapter_is(peft_folder: Path, run: Callable[..., Any]) -> None:
    ran = run("inspect", peft_folder)
    assert ran.code == 0
    assert ran.err == ""
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert lines[0] == f"{peft_folder}: peft, safetensors"
    assert "base model tiny/llama" in lines
    assert "modules 4 (q_proj (2), v_proj (2))" in lines
    assert "rank 4" in lines
    assert "alpha 16" in lines
    assert "scaling 4 by alpha/r" in lines
    assert "dtype f32" in lines
    assert "parameters 320; the full-rank update has 384 (83.33%)" in lines


def test_unusual_scaling_is_remarked_on(plain: Adapter, tmp_path: Path, run: Callable[..., Any]) -> None:
    for alpha, word in ((1.0, "below 0.5"), (20.0, "above 4")):
        strange = plain.map_modules(lambda module, alpha=alpha: replace(module, alpha=alpha))  # type: ignore[misc]
        adaptertools.write(strange, tmp_path / "strange", format="peft", overwrite=True)
        assert word in run("inspect", tmp_path / "strange").out


def test_nan_and_all_zero_factors_are_remarked_on(plain: Adapter, tmp_path: Path, run: Callable[..., Any]) -> None:
    first, second, *rest = plain.modules
    nan = replace(first, lora_B=torch.full_like(first.lora_B, float("nan")))
    untrained = replace(second, lora_B=torch.zeros_like(second.lora_B))
    odd = replace(plain, modules=(nan, untrained, *rest))
    adaptertools.write(odd, tmp_path / "odd", format="peft", allow_nonfinite=True)
    ran = run("inspect", tmp_path / "odd")
    assert ran.code == 0
    assert f"NaN or infinity in {first.target}" in ran.out
    assert f"all zero, so that nothing changes, in 1 module: {second.target}" in ran.out


def test_modules_gives_a_line_each_with_the_norm_of_its_delta_weight(
    peft_folder: Path, run: Callable[..., Any]
) -> None:
    rows = run("inspect", peft_folder, "--modules", "--json").json["rows"]
    modules = adaptertools.read(peft_folder).modules
    assert [row["target"] for row in rows] == [str(module.target) for module in modules]
    for row, module in zip(rows, modules, strict=True):
        assert row["delta_norm"] == pytest.approx(float(module.delta_weight(dtype=torch.float64).norm()), rel=1e-12)
    shown = run("inspect", peft_folder, "--modules").out
    assert all(str(module.target) in shown for module in modules)
    assert "NORM" in shown


def test_json_holds_the_summary_and_nothing_else(peft_folder: Path, run: Callable[..., Any]) -> None:
    document = run("inspect", peft_folder, "--json").json
    assert document["format"] == "peft"
    assert document["modules"] == 4
    assert document["ranks"] == {"4": 4}
    assert document["rows"] == []


def test_json_has_null_where_json_has_no_number(plain: Adapter, tmp_path: Path, run: Callable[..., Any]) -> None:
    broken = plain.map_modules(lambda module: replace(module, lora_B=torch.full_like(module.lora_B, float("inf"))))
    adaptertools.write(broken, tmp_path / "broken", format="peft", allow_nonfinite=True)
    out = run("inspect", tmp_path / "broken", "--modules", "--json").out
    document = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert {row["delta_norm"] for row in document["rows"]} == {None}


def test_full_weights_and_history_are_listed(plain: Adapter, tmp_path: Path, run: Callable[..., Any]) -> None:
    head = replace(plain, full_weights={"score.weight": FullWeight(weight=torch.ones(3, 12))})
    adaptertools.write(head, tmp_path / "head", format="peft")
    assert run("rescale", tmp_path / "head", tmp_path / "new", "--alpha", "32", "-q").code == 0
    shown = [" ".join(line.split()) for line in run("inspect", tmp_path / "new").out.splitlines()]
    assert "full weight score.weight 3x12" in shown
    assert any(line.startswith("history rescale: ") and "alpha 32" in line for line in shown)


def test_alpha_may_be_given_for_a_file_without_one(plain: Adapter, tmp_path: Path, run: Callable[..., Any]) -> None:
    adaptertools.write(plain, tmp_path / "lora.pt", format="loralib")
    for sidecar in tmp_path.glob("lora.pt?*"):
        sidecar.unlink()
    assert run("inspect", tmp_path / "lora.pt").code == 1
    assert run("inspect", tmp_path / "lora.pt", "--source-alpha", "8", "--json").json["alphas"] == {"8": 4}


def test_a_large_adapter_is_looked_at_by_its_headers_alone(
    peft_folder: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = peft_folder / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4:] = torch.tensor([float("nan")]).numpy().tobytes()
    weights.write_bytes(data)
    assert any("NaN" in oddity for oddity in run("inspect", peft_folder, "--json").json["oddities"])
    monkeypatch.setattr("adaptertools.operations.sizes.READ_AT_ONCE", 100)
    assert run("inspect", peft_folder, "--json").json["oddities"] == []
    assert any("NaN" in oddity for oddity in run("inspect", peft_folder, "--modules", "--json").json["oddities"])


def test_quiet_prints_nothing_and_still_fails_for_a_bad_file(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    assert run("inspect", peft_folder, "-q").out == ""
    (tmp_path / "bad.safetensors").write_bytes(b"")
    ran = run("inspect", tmp_path / "bad.safetensors", "-q")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("Error: ")


def test_weights_that_stand_there_twice_are_compared(
    plain: Adapter, peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    def odd() -> str:
        return " ".join(run("inspect", peft_folder, "--json").json["oddities"])

    assert "adapter_model.bin" not in odd()
    adaptertools.write(plain, tmp_path / "same", format="peft", container="torch")
    (tmp_path / "same" / "adapter_model.bin").rename(peft_folder / "adapter_model.bin")
    assert "adapter_model.safetensors and adapter_model.bin hold the same tensors, bit by bit" in odd()
    doubled = plain.map_modules(lambda module: replace(module, lora_B=module.lora_B * 2))
    adaptertools.write(doubled, tmp_path / "other", format="peft", container="torch")
    (tmp_path / "other" / "adapter_model.bin").rename(peft_folder / "adapter_model.bin")
    assert "adapter_model.safetensors and adapter_model.bin differ in 4 tensors" in odd()
    (peft_folder / "adapter_model.bin").write_bytes(b"PK but no zip file")
    assert "cannot be compared" in odd()
