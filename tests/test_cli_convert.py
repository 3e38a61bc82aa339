"""`adaptertools convert`."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptertools
from adaptertools.adapter import Adapter, FullWeight


def deltas(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    return {m.target.parameter: m.delta_weight() for m in adaptertools.read(path, **options).modules}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name]) for name in one)


def test_the_result_reads_back_as_the_same_adapter(peft_folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    ran = run("convert", peft_folder, tmp_path / "lora.pt", "--to", "loralib")
    assert ran.code == 0
    assert ran.out.startswith(f"Converted {peft_folder} (peft) to {tmp_path / 'lora.pt'} (loralib)\n")
    assert "modules      4" in ran.out
    assert ran.err == ""
    assert same(deltas(tmp_path / "lora.pt"), deltas(peft_folder))


def test_the_report_says_with_which_alpha_to_build_the_loralib_model(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    assert "lora_alpha=16" in run("convert", peft_folder, tmp_path / "lora.pt", "--to", "loralib").out


def test_folding_a_power_of_two_is_reported_as_exact(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("convert", peft_folder, tmp_path / "lora_flax", "--to", "flax")
    assert "scaling folded into 4 tensors; exact, checked bit by bit" in ran.out
    assert same(deltas(tmp_path / "lora_flax"), deltas(peft_folder))


def test_an_inexact_fold_reports_its_error(plain: Adapter, tmp_path: Path, run: Callable[..., Any]) -> None:
    thirds = plain.map_modules(lambda module: replace(module, alpha=4 / 3))
    adaptertools.write(thirds, tmp_path / "thirds", format="peft")
    ran = run("convert", tmp_path / "thirds", tmp_path / "lora_flax", "--to", "flax", "--json")
    assert ran.json["exact"] is False
    assert 0 < ran.json["max_relative_error"] < 1e-7


def test_values_that_a_dtype_is_too_coarse_for_are_said_to_become_zero(
    plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    tiny = plain.map_modules(lambda module: replace(module, lora_B=module.lora_B.clone().fill_(1e-9)))
    adaptertools.write(tiny, tmp_path / "tiny", format="peft")
    ran = run("convert", tmp_path / "tiny", tmp_path / "half", "--to", "peft", "--dtype", "f16")
    assert "largest relative error 1.0e+00 (some values too small for the dtype became 0)" in ran.out


def test_json_holds_the_report_and_nothing_else(peft_folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    dst = tmp_path / "lora_flax"
    ran = run("convert", peft_folder, dst, "--to", "flax", "--json")
    assert ran.json["source"] == {"path": str(peft_folder), "format": "peft"}
    assert ran.json["destination"]["path"] == str(dst)
    assert ran.json["destination"]["format"] == "flax"
    assert ran.json["destination"]["container"] == "msgpack"
    assert ran.json["modules"] == 4
    assert ran.json["exact"] is True
    assert {"losses", "left_out", "dropped", "notes", "max_relative_error"} <= ran.json.keys()
    assert ran.err == ""


def test_quiet_prints_nothing(peft_folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    ran = run("convert", peft_folder, tmp_path / "lora.pt", "--to", "loralib", "-q")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert (tmp_path / "lora.pt").is_file()


def test_alpha_is_asked_for_where_the_file_has_none(peft_folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    run("convert", peft_folder, tmp_path / "lora.pt", "--to", "loralib")
    for sidecar in tmp_path.glob("lora.pt?*"):
        sidecar.unlink()
    ran = run("convert", tmp_path / "lora.pt", tmp_path / "back", "--to", "peft")
    assert ran.code == 1
    assert ran.err.startswith("Error: ")
    assert ran.err.count("\n") == 1
    assert "--alpha" in ran.err
    assert not (tmp_path / "back").exists()
    for flag in ("--alpha", "--source-alpha"):
        ran = run("convert", tmp_path / "lora.pt", tmp_path / "back", "--to", "peft", flag, "16", "--overwrite")
        assert ran.code == 0, ran.err
        assert same(deltas(tmp_path / "back"), deltas(peft_folder))


def test_dst_is_replaced_only_when_asked_for(peft_folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    dst = tmp_path / "lora.pt"
    assert run("convert", peft_folder, dst, "--to", "loralib").code == 0
    before = dst.read_bytes()
    ran = run("convert", peft_folder, dst, "--to", "loralib", "--dtype", "bf16")
    assert ran.code == 1
    assert "--overwrite" in ran.err
    assert dst.read_bytes() == before
    assert run("convert", peft_folder, dst, "--to", "loralib", "--dtype", "bf16", "--overwrite").code == 0
    assert dst.read_bytes() != before


def test_overwrite_replaces_no_other_file(peft_folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    dst = tmp_path / "thesis.txt"
    dst.write_text("years of work")
    ran = run("convert", peft_folder, dst, "--to", "loralib", "--overwrite")
    assert ran.code == 1
    assert dst.read_text() == "years of work"


@pytest.mark.parametrize(("name", "dtype"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_dtype_casts_every_tensor(
    name: str, dtype: torch.dtype, peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    assert run("convert", peft_folder, tmp_path / "cast", "--to", "peft", "--dtype", name).code == 0
    assert {m.lora_A.dtype for m in adaptertools.read(tmp_path / "cast").modules} == {dtype}


def test_container_chooses_the_kind_of_file(peft_folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    ran = run("convert", peft_folder, tmp_path / "lora_flax", "--to", "flax", "--container", "npz", "--json")
    assert ran.json["destination"]["container"] == "npz"
    assert (tmp_path / "lora_flax" / "flax_adapter.npz").read_bytes()[:2] == b"PK"
    ran = run("convert", peft_folder, tmp_path / "other", "--to", "peft", "--container", "npz")
    assert ran.code == 2
    assert "npz" in ran.err
    assert not (tmp_path / "other").exists()


def test_what_the_format_cannot_carry_is_refused_by_name_unless_dropped(
    plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    dora = plain.map_modules(lambda module: replace(module, magnitude=torch.ones(module.out_features)))
    adaptertools.write(dora, tmp_path / "dora", format="peft")
    ran = run("convert", tmp_path / "dora", tmp_path / "lora_flax", "--to", "flax")
    assert ran.code == 1
    assert "dora" in ran.err
    assert "--drop dora" in ran.err
    assert not (tmp_path / "lora_flax").exists()
    ran = run("convert", tmp_path / "dora", tmp_path / "lora_flax", "--to", "flax", "--drop", "dora")
    assert ran.code == 0, ran.err
    assert "dropped      dora of 4: " in ran.out
    entry = adaptertools.read(tmp_path / "lora_flax").history[-1]
    assert entry.details["dropped"] == ["dora"]


def test_an_unknown_kind_to_drop_is_a_usage_error(peft_folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    ran = run("convert", peft_folder, tmp_path / "x", "--to", "peft", "--drop", "everything")
    assert ran.code == 2
    assert "dora" in ran.err


def test_only_exclude_and_rename_select_modules(plain: Adapter, tmp_path: Path, run: Callable[..., Any]) -> None:
    head = replace(plain, full_weights={"lm_head.weight": FullWeight(weight=torch.ones(3, 12))})
    adaptertools.write(head, tmp_path / "adapter", format="peft")
    ran = run(
        *("convert", tmp_path / "adapter", tmp_path / "part", "--to", "peft"),
        *("--only", "model.layers.*", "--exclude", "v_proj", "--rename", r"^model\.=model.language_model."),
    )
    assert ran.code == 0, ran.err
    assert "left out     3: " in ran.out
    part = adaptertools.read(tmp_path / "part")
    assert [m.target.parameter for m in part.modules] == [
        f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)
    ]
    assert not part.full_weights


def test_a_pattern_that_fits_nothing_is_an_error(peft_folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    ran = run("convert", peft_folder, tmp_path / "part", "--to", "peft", "--only", "nothing_like_it")
    assert ran.code == 2
    assert "nothing_like_it" in ran.err
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize("flag", ["--in", "--out"])
def test_an_unknown_format_option_lists_the_known_ones(
    flag: str, peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("convert", peft_folder, tmp_path / "x", "--to", "loralib", flag, "nonsense=1")
    assert ran.code == 2
    assert "nonsense" in ran.err
    assert not (tmp_path / "x").exists()


def test_a_source_that_is_not_there_exits_1(tmp_path: Path, run: Callable[..., Any]) -> None:
    ran = run("convert", tmp_path / "nothing", tmp_path / "x", "--to", "peft")
    assert ran.code == 1
    assert ran.err.count("\n") == 1
    assert str(tmp_path / "nothing") in ran.err


def test_nan_is_refused_unless_allowed(plain: Adapter, tmp_path: Path, run: Callable[..., Any]) -> None:
    broken = plain.map_modules(lambda module: replace(module, lora_B=module.lora_B.clone().fill_(float("nan"))))
    adaptertools.write(broken, tmp_path / "broken", format="peft", allow_nonfinite=True)
    ran = run("convert", tmp_path / "broken", tmp_path / "lora.pt", "--to", "loralib")
    assert ran.code == 1
    assert "NaN" in ran.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["broken"]
    ran = run("convert", tmp_path / "broken", tmp_path / "lora.pt", "--to", "loralib", "--allow-nonfinite", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["modules"] == 4


def test_the_history_names_source_and_operation(peft_folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    run("convert", peft_folder, tmp_path / "lora.pt", "--to", "loralib")
    entry = adaptertools.read(tmp_path / "lora.pt").history[-1]
    assert entry.operation == "convert"
    assert entry.source == peft_folder.name
    assert entry.details["from"] == "peft"
    assert entry.details["to"] == "loralib"


def test_a_folder_may_be_converted_onto_itself(peft_folder: Path, run: Callable[..., Any]) -> None:
    before = deltas(peft_folder)
    ran = run("convert", peft_folder, peft_folder, "--to", "peft", "--dtype", "f32", "--overwrite")
    assert ran.code == 0, ran.err
    assert same(deltas(peft_folder), before)


@pytest.mark.parametrize("to", ["peft", "mlx", "kohya"])
def test_what_stands_beside_the_adapter_is_named_whatever_the_format_becomes(
    to: str, peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    (peft_folder / "README.md").write_text("a card")
    (peft_folder / "checkpoint-5").mkdir()
    ran = run("convert", peft_folder, tmp_path / "x.safetensors", "--to", to, "--json")
    assert f"not carried along from {peft_folder}: README.md, checkpoint-5/" in ran.json["notes"]


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_folder_without_an_adapter_is_refused_at_once_and_overwrite_not_advised(
    flags: tuple[str, ...], peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"a")
    ran = run("convert", peft_folder, tmp_path / "photos", "--to", "mlx", *flags)
    assert ran.code == 1
    assert "photos holds no file of an adapter, so it is not replaced: give another name" in ran.err
    assert "--overwrite" not in ran.err


def test_a_folder_is_no_name_for_a_format_that_is_one_file(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("convert", peft_folder, f"{tmp_path}/new/", "--to", "kohya")
    assert f"new/ names a folder, and this format is written as a file: give {tmp_path}/new/adapter.safeten" in ran.err
    (tmp_path / "old").mkdir()
    ran = run("convert", peft_folder, tmp_path / "old", "--to", "kohya")
    assert f"give another name, or {tmp_path}/old/adapter.safetensors" in ran.err
    assert run("convert", peft_folder, f"{tmp_path}/new/", "--to", "mlx").code == 0


def test_a_file_without_a_suffix_is_noted(peft_folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    note = "lora has no suffix, and programs look for one: lora.safetensors"
    assert note in run("convert", peft_folder, tmp_path / "lora", "--to", "kohya", "--json").json["notes"]
    named = run("convert", peft_folder, tmp_path / "v.pt", "--to", "loralib", "--json").json["notes"]
    assert not any("suffix" in said for said in named)


def test_a_dtype_that_overflows_is_not_called_damage(plain: Adapter, tmp_path: Path, run: Callable[..., Any]) -> None:
    large = replace(plain, modules=tuple(replace(m, lora_B=m.lora_B + 1e6) for m in plain.modules))
    adaptertools.write(large, tmp_path / "src", format="peft")
    ran = run("convert", tmp_path / "src", tmp_path / "dst", "--to", "peft", "--dtype", "f16")
    assert ran.code == 1
    assert ran.err.endswith("values too large for f16: choose another --dtype\n")
