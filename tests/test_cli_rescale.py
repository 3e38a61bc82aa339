"""`adaptertools rescale`."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptertools
from adaptertools.adapter import Adapter
from adaptertools.module import ScaleRule


def deltas(path: Path) -> list[torch.Tensor]:
    return [module.delta_weight(dtype=torch.float64) for module in adaptertools.read(path).modules]


def test_the_delta_weight_is_kept_by_default(peft_folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    ran = run("rescale", peft_folder, tmp_path / "new", "--alpha", "32")
    assert ran.code == 0, ran.err
    assert "alpha        16 -> 32" in ran.out
    assert "scaling      4 -> 8" in ran.out
    assert "delta weight kept exactly, checked bit by bit" in ran.out
    after = adaptertools.read(tmp_path / "new")
    assert {(m.alpha, m.rank) for m in after.modules} == {(32.0, 4)}
    assert all(map(torch.equal, deltas(tmp_path / "new"), deltas(peft_folder)))


def test_lost_bits_are_reported_with_their_error(peft_folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    ran = run("rescale", peft_folder, tmp_path / "new", "--alpha", "24", "--json")
    assert ran.json["rescale"]["exact"] is False
    assert 0 < ran.json["rescale"]["max_relative_error"] < 1e-7
    for after, before in zip(deltas(tmp_path / "new"), deltas(peft_folder), strict=True):
        assert torch.allclose(after, before, atol=1e-6)
    shown = run("rescale", peft_folder, tmp_path / "again", "--alpha", "24")
    assert "kept with a largest relative error of " in shown.out


def test_halving_loses_bits_in_f16_subnormals_and_says_so(
    plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    tiny = plain.map_modules(
        lambda m: replace(m, lora_A=m.lora_A.half(), lora_B=torch.full_like(m.lora_B, 3 * 2.0**-24, dtype=torch.half))
    )
    adaptertools.write(tiny, tmp_path / "tiny", format="peft")
    ran = run("rescale", tmp_path / "tiny", tmp_path / "new", "--alpha", "32", "--json")
    assert ran.json["rescale"]["exact"] is True
    assert ran.json["exact"] is True
    modules = adaptertools.read(tmp_path / "new").modules
    assert {m.lora_B.dtype for m in modules} == {torch.float32}
    assert ran.json["promoted"] == {f"{m.target}.lora_B": "f32" for m in modules}
    shown = run("rescale", tmp_path / "tiny", tmp_path / "shown", "--alpha", "32")
    assert "  promoted     4 tensors to f32\n" in shown.out
    ran = run("rescale", tmp_path / "tiny", tmp_path / "cast", "--alpha", "32", "--dtype", "f16", "--json")
    assert ran.json["exact"] is False
    assert ran.json["max_relative_error"] == pytest.approx(1 / 3)


def test_nothing_is_called_promoted_that_kept_its_dtype(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    assert run("rescale", peft_folder, tmp_path / "new", "--alpha", "32", "--json").json["promoted"] == {}
    assert "promoted" not in run("rescale", peft_folder, tmp_path / "shown", "--alpha", "32").out


def test_the_errors_of_rescaling_and_of_writing_add_up(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("rescale", peft_folder, tmp_path / "new", "--alpha", "24", "--dtype", "bf16", "--json")
    writing = max(loss["max_relative_error"] for loss in ran.json["losses"])
    rescaling = ran.json["rescale"]["max_relative_error"]
    assert writing > 0
    assert rescaling > 0
    assert ran.json["max_relative_error"] == rescaling + writing
    assert ran.json["exact"] is False


def test_bits_lost_in_writing_are_not_called_kept(peft_folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    ran = run("rescale", peft_folder, tmp_path / "new", "--alpha", "32", "--dtype", "bf16", "--json")
    assert ran.json["rescale"]["exact"] is True
    assert ran.json["exact"] is False
    shown = run("rescale", peft_folder, tmp_path / "shown", "--alpha", "32", "--dtype", "bf16").out
    assert "exactly" not in shown
    most = f"{ran.json['max_relative_error']:.1e}"
    assert f"  delta weight kept with a largest relative error of {most}\n" in shown


def test_bits_lost_in_rescaling_are_not_called_kept_by_an_exact_write(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("rescale", peft_folder, tmp_path / "new", "--alpha", "24", "--json")
    assert ran.json["losses"] == []
    assert ran.json["exact"] is False
    assert ran.json["max_relative_error"] == ran.json["rescale"]["max_relative_error"] > 0


def test_keeping_the_ratio_lets_the_rank_follow(peft_folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    ran = run("rescale", peft_folder, tmp_path / "new", "--alpha", "32", "--keep", "ratio")
    assert ran.code == 0, ran.err
    assert "rank         4 -> 8" in ran.out
    assert "scaling      4\n" in ran.out
    assert {(m.alpha, m.rank) for m in adaptertools.read(tmp_path / "new").modules} == {(32.0, 8)}
    assert all(map(torch.allclose, deltas(tmp_path / "new"), deltas(peft_folder)))


def test_for_rslora_the_rank_follows_the_square(plain: Adapter, tmp_path: Path, run: Callable[..., Any]) -> None:
    rslora = plain.map_modules(lambda module: replace(module, scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK))
    adaptertools.write(rslora, tmp_path / "rslora", format="peft")
    root_two_times_16 = "22.62741699797"
    ran = run("rescale", tmp_path / "rslora", tmp_path / "new", "--alpha", root_two_times_16, "--keep", "ratio")
    assert ran.code == 0, ran.err
    assert {m.rank for m in adaptertools.read(tmp_path / "new").modules} == {8}


@pytest.mark.parametrize(("alpha", "word"), [("8", "keep=delta"), ("18", "whole number")])
def test_a_ratio_that_no_rank_keeps_is_an_error(
    alpha: str, word: str, peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("rescale", peft_folder, tmp_path / "new", "--alpha", alpha, "--keep", "ratio")
    assert ran.code == 1
    assert word in ran.err
    assert not (tmp_path / "new").exists()


def test_keeping_the_weights_says_how_many_times_stronger_it_became(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("rescale", peft_folder, tmp_path / "new", "--alpha", "32", "--keep", "weights")
    assert ran.code == 0, ran.err
    assert "2 times as strong" in ran.out
    for after, before in zip(deltas(tmp_path / "new"), deltas(peft_folder), strict=True):
        assert torch.equal(after, 2 * before)


def test_dora_is_refused_for_weights_and_exact_for_delta(
    plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    dora = plain.map_modules(lambda module: replace(module, magnitude=torch.ones(module.out_features)))
    adaptertools.write(dora, tmp_path / "dora", format="peft")
    ran = run("rescale", tmp_path / "dora", tmp_path / "new", "--alpha", "32", "--keep", "weights")
    assert ran.code == 1
    assert "DoRA" in ran.err
    assert not (tmp_path / "new").exists()
    assert run("rescale", tmp_path / "dora", tmp_path / "new", "--alpha", "32", "--json").json["rescale"]["exact"]


@pytest.mark.parametrize(
    ("format", "container", "name"),
    [
        ("peft", "torch", "folder"),
        ("peft", "safetensors", "folder"),
        ("loralib", "torch", "lora.pt"),
        ("flax", "msgpack", "lora_flax"),
        ("flax", "npz", "lora_flax"),
        ("flax", "safetensors", "lora_flax"),
    ],
)
def test_it_writes_the_format_and_container_that_it_read(
    format: str, container: str, name: str, plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    (tmp_path / "old").mkdir()
    adaptertools.write(plain, tmp_path / "old" / name, format=format, container=container)
    ran = run("rescale", tmp_path / "old" / name, tmp_path / name, "--alpha", "32", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["destination"]["format"] == format
    assert ran.json["destination"]["container"] == container
    after = adaptertools.read(tmp_path / name)
    assert after.origin is not None
    assert (after.origin.format, after.origin.container) == (format, container)
    for new, old in zip(deltas(tmp_path / name), deltas(tmp_path / "old" / name), strict=True):
        assert torch.equal(new, old)


def test_the_history_holds_the_operation_and_its_error(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    run("rescale", peft_folder, tmp_path / "new", "--alpha", "24")
    entry = adaptertools.read(tmp_path / "new").history[-1]
    assert entry.operation == "rescale"
    assert entry.source == peft_folder.name
    assert entry.details["alpha"] == 24
    assert entry.details["keep"] == "delta"
    assert entry.details["exact"] is False


@pytest.mark.parametrize("alpha", ["0", "-1", "nan", "inf"])
def test_an_alpha_that_makes_no_sense_is_a_usage_error(
    alpha: str, peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("rescale", peft_folder, tmp_path / "new", "--alpha", alpha)
    assert ran.code == 2
    assert not (tmp_path / "new").exists()


def test_a_loralib_file_needs_its_old_alpha(plain: Adapter, tmp_path: Path, run: Callable[..., Any]) -> None:
    adaptertools.write(plain, tmp_path / "lora.pt", format="loralib")
    bare = tmp_path / "bare" / "lora.pt"
    bare.parent.mkdir()
    shutil.copy(tmp_path / "lora.pt", bare)
    ran = run("rescale", bare, tmp_path / "new.pt", "--alpha", "32")
    assert ran.code == 1
    assert "--source-alpha" in ran.err
    ran = run("rescale", bare, tmp_path / "new.pt", "--alpha", "32", "--source-alpha", "16")
    assert ran.code == 0, ran.err
    assert "lora_alpha=32" in ran.out


def test_dst_is_replaced_only_when_asked_for(peft_folder: Path, run: Callable[..., Any]) -> None:
    assert run("rescale", peft_folder, peft_folder, "--alpha", "32").code == 1
    assert {m.alpha for m in adaptertools.read(peft_folder).modules} == {16.0}
    assert run("rescale", peft_folder, peft_folder, "--alpha", "32", "--overwrite", "-q").out == ""
    assert {m.alpha for m in adaptertools.read(peft_folder).modules} == {32.0}
