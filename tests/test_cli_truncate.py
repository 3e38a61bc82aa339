"""`adaptertools truncate`."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_container_sizes import on_disk

import adaptertools
from adaptertools.adapter import Adapter, Base
from adaptertools.cli import _report
from adaptertools.cli._report import relative
from adaptertools.module import ScaleRule


def deltas(path: Path) -> torch.Tensor:
    return torch.stack([module.delta_weight(dtype=torch.float64) for module in adaptertools.read(path).modules])


def distance(one: Path, other: Path) -> float:
    return float((deltas(one) - deltas(other)).norm() / deltas(other).norm())


def test_the_figures_in_the_report_are_those_of_the_files(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("truncate", peft_folder, tmp_path / "new", "--rank", "2", "--json")
    assert ran.code == 0, ran.err
    found = distance(tmp_path / "new", peft_folder)
    done = ran.json["truncate"]
    assert done["relative_error"] == pytest.approx(found, rel=1e-6)
    assert done["energy"] == pytest.approx(1 - found**2, rel=1e-6)
    assert done["choice"] == "rank 2"
    for row, new, old in zip(done["modules"], deltas(tmp_path / "new"), deltas(peft_folder), strict=True):
        assert row["relative_error"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-6)
        assert (row["rank_before"], row["rank_after"]) == (4, 2)
    assert ran.json["source"] == {
        "path": str(peft_folder),
        "format": "peft",
        "nbytes": 4 * 4 * 20 * 4,
        "nbytes_on_disk": on_disk(peft_folder),
    }
    assert ran.json["destination"]["nbytes"] == 4 * 2 * 20 * 4
    assert ran.json["destination"]["nbytes_on_disk"] == on_disk(tmp_path / "new")
    assert (ran.json["exact"], ran.json["relative_error"]) == (False, done["relative_error"])
    assert ran.json["writing"] == {"exact": True, "max_relative_error": 0.0}
    assert "max_relative_error" not in ran.json, "of what elements lost in truncation nothing is known"
    assert {(m.rank, m.alpha, m.scaling) for m in adaptertools.read(tmp_path / "new").modules} == {(2, 8.0, 4.0)}


def test_the_report_has_a_line_for_every_module_and_totals(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("truncate", peft_folder, tmp_path / "new", "--rank", "2")
    assert ran.code == 0, ran.err
    found = distance(tmp_path / "new", peft_folder)
    assert f"Truncated {peft_folder} to {tmp_path / 'new'} (peft): rank 2\n" in ran.out
    assert "  rank         4 -> 2\n" in ran.out
    assert "  alpha        16 -> 8\n" in ran.out
    assert "  scaling      4\n" in ran.out
    assert f"  error        {found:.4g} of the norm of the delta weight, exact\n" in ran.out
    before, after = (_report.size(on_disk(path)) for path in (peft_folder, tmp_path / "new"))
    assert f"  size         {before} -> {after} on disk\n" in ran.out
    assert "  stored       640 B of tensors in safetensors, as computed\n" in ran.out
    rows = [line.split() for line in ran.out.splitlines() if line.startswith("model.layers")]
    assert [row[0] for row in rows] == [str(m.target) for m in adaptertools.read(peft_folder).modules]
    assert all(row[1:4] == ["4", "->", "2"] for row in rows)


def test_a_rank_that_all_have_already_changes_no_bit(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("truncate", peft_folder, tmp_path / "new", "--rank", "16", "--json")
    assert ran.json["truncate"]["relative_error"] == 0
    assert ran.json["truncate"]["rounding_error"] == 0
    assert ran.json["exact"] is True
    said = run("truncate", peft_folder, tmp_path / "again", "--rank", "16").out
    assert "  stored       1.3 kB of tensors in safetensors, bit for bit\n" in said
    for new, old in zip(
        adaptertools.read(tmp_path / "new").modules, adaptertools.read(peft_folder).modules, strict=True
    ):
        assert torch.equal(new.lora_A, old.lora_A)
        assert torch.equal(new.lora_B, old.lora_B)
        assert new.alpha == old.alpha


@pytest.mark.parametrize(
    "rule", [("--energy", "0.9"), ("--error", "0.2"), ("--size", "95%"), ("--energy", "1", "--max-rank", "3")]
)
def test_every_rule_writes_what_it_reports(
    rule: tuple[str, ...], peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("truncate", peft_folder, tmp_path / "new", *rule, "--json")
    assert ran.code == 0, ran.err
    done = ran.json["truncate"]
    assert distance(tmp_path / "new", peft_folder) == pytest.approx(done["relative_error"], rel=1e-5)
    assert 0 < done["relative_error"] < 0.6
    if rule[0] == "--error":
        assert done["relative_error"] <= 0.2
    if rule == ("--energy", "0.9"):
        assert all(row["energy"] >= 0.9 for row in done["modules"])


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_dtype_is_reached_in_one_rounding(
    dtype: str, peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("truncate", peft_folder, tmp_path / "new", "--rank", "2", "--dtype", dtype, "--json")
    assert ran.code == 0, ran.err
    exact = adaptertools.truncate(adaptertools.read(peft_folder), rank=2, dtype="f64").adapter
    wanted = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for new, wide in zip(adaptertools.read(tmp_path / "new").modules, exact.modules, strict=True):
        assert torch.equal(new.lora_A, wide.lora_A.to(wanted))
        assert torch.equal(new.lora_B, wide.lora_B.to(wanted))
    assert ran.json["losses"] == []
    stored = torch.stack([m.delta_weight(dtype=torch.float64) for m in exact.modules])
    found = float((deltas(tmp_path / "new") - stored).norm() / deltas(peft_folder).norm())
    assert ran.json["truncate"]["rounding_error"] == pytest.approx(found, rel=1e-6)
    shown = run("truncate", peft_folder, tmp_path / "shown", "--rank", "2", "--dtype", dtype).out
    assert f"  rounding     {relative(found)}, beside that error\n" in shown


def test_a_dry_run_shows_ranks_side_by_side_and_writes_nothing(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    ran = run("truncate", peft_folder, "--dry-run")
    assert ran.code == 0, ran.err
    assert f"{peft_folder}: nothing was written\n" in ran.out
    assert [line.split()[:3] for line in ran.out.splitlines()[3:]] == [["rank", n, n] for n in ("1", "2", "4")]
    ran = run("truncate", peft_folder, tmp_path / "new", "--dry-run", "--energy", "0.9", "--json")
    choices = ran.json["choices"]
    assert [choice["choice"] for choice in choices] == ["rank 1", "rank 2", "rank 4", "energy 0.9"]
    for choice in choices[:3]:
        rank = int(choice["choice"].split()[1])
        done = adaptertools.truncate(adaptertools.read(peft_folder), rank=rank)
        assert choice["relative_error"] == done.relative_error
        assert choice["energy"] == done.energy
        assert choice["ranks"] == [rank] * 4
    for choice in choices:
        option = choice["choice"].split()
        ran = run("truncate", peft_folder, tmp_path / "new", f"--{option[0]}", option[1], "--overwrite")
        assert on_disk(tmp_path / "new") <= choice["nbytes_on_disk"] <= on_disk(tmp_path / "new") + 40
    shutil.rmtree(tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--max-rank", "4"),
        ("--rank", "0"),
        ("--rank", "2.5"),
        ("--rank", "many"),
        ("--rank", "2", "--energy", "0.9"),
        ("--rank", "2", "--max-rank", "0"),
        ("--energy", "0"),
        ("--energy", "1.5"),
        ("--energy", "nan"),
        ("--error", "0"),
        ("--error", "2"),
        ("--error", "nan"),
        ("--size", "abc"),
        ("--size", "0"),
        ("--size", "100"),
        ("--rank", "2", "--device", "tpu"),
        ("--rank", "2", "--device", "cuda:99"),
        ("--rank", "2", "--dtype", "int8"),
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense_exit_with_2_and_write_nothing(
    options: tuple[str, ...], peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("truncate", peft_folder, tmp_path / "new", *options, "--json")
    assert ran.code == 2, ran.err
    assert ran.json["error"]["exit_code"] == 2
    assert not (tmp_path / "new").exists()


def test_dst_may_be_left_out_for_a_dry_run_alone(peft_folder: Path, run: Callable[..., Any]) -> None:
    ran = run("truncate", peft_folder, "--rank", "2")
    assert ran.code == 2
    assert "DST" in ran.err


def test_a_changed_base_is_refused(plain: Adapter, tmp_path: Path, run: Callable[..., Any]) -> None:
    changed = replace(plain, bases={"": Base(id="tiny/llama", change="pissa")})
    adaptertools.write(changed, tmp_path / "pissa", format="peft")
    ran = run("truncate", tmp_path / "pissa", tmp_path / "new", "--rank", "2")
    assert ran.code == 1
    assert "trained with pissa initialisation" in ran.err
    assert "tiny/llama" not in ran.err
    assert not (tmp_path / "new").exists()


def test_values_that_are_not_finite_are_refused(plain: Adapter, tmp_path: Path, run: Callable[..., Any]) -> None:
    bad = plain.map_modules(lambda m: replace(m, lora_A=torch.full_like(m.lora_A, math.inf)))
    adaptertools.write(bad, tmp_path / "bad", format="peft", allow_nonfinite=True)
    for more in ((), ("--allow-nonfinite",)):
        ran = run("truncate", tmp_path / "bad", tmp_path / "new", "--rank", "2", *more)
        assert ran.code == 1
        assert "q_proj.lora_A holds NaN or infinity, so that it has no nearest delta weight of rank 2" in ran.err
        assert "--allow-nonfinite" not in ran.err
        assert not (tmp_path / "new").exists()


def test_values_that_are_not_finite_are_carried_along_where_the_rank_may_stay(
    plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    first = replace(plain.modules[0], lora_A=torch.full((2, 12), math.nan), lora_B=torch.ones(8, 2), alpha=8.0)
    bad = replace(plain, modules=(first, *plain.modules[1:]))
    adaptertools.write(bad, tmp_path / "bad", format="peft", allow_nonfinite=True)
    ran = run("truncate", tmp_path / "bad", tmp_path / "new", "--rank", "2")
    assert ran.code == 1
    assert "--allow-nonfinite" in ran.err
    ran = run("truncate", tmp_path / "bad", tmp_path / "new", "--rank", "2", "--allow-nonfinite", "--json")
    assert ran.code == 0, ran.err
    assert any("kept bit for bit" in note for note in ran.json["notes"])
    kept, *others = adaptertools.read(tmp_path / "new").modules
    assert kept.lora_A.isnan().all()
    assert torch.equal(kept.lora_B, first.lora_B)
    assert {module.rank for module in others} == {2}
    assert all(torch.isfinite(module.lora_A).all() for module in others)
    ran = run("truncate", tmp_path / "bad", "--dry-run", "--allow-nonfinite")
    assert [line.split()[:2] for line in ran.out.splitlines()[3:]] == [["rank", "2"], ["rank", "4"]]


def test_what_is_dropped_is_dropped_before(plain: Adapter, tmp_path: Path, run: Callable[..., Any]) -> None:
    dora = plain.map_modules(lambda m: replace(m, magnitude=torch.ones(8)))
    adaptertools.write(dora, tmp_path / "dora", format="peft")
    ran = run("truncate", tmp_path / "dora", tmp_path / "new", "--rank", "2", "--drop", "dora", "--drop", "bias")
    assert ran.code == 0, ran.err
    assert "  dropped      dora of 4: " in ran.out
    assert "magnitude" not in ran.out
    assert "nothing to drop: the adapter holds no bias" in ran.out
    after = adaptertools.read(tmp_path / "new")
    assert not after.features
    assert [entry.operation for entry in after.history] == ["drop", "truncate"]
    assert after.history[0].details == {"dropped": ["dora"]}
    kept = run("truncate", tmp_path / "dora", tmp_path / "kept", "--rank", "2").out
    assert "magnitude kept" in kept
    assert "  dropped  " not in kept


def test_a_changed_base_may_be_given_up(plain: Adapter, tmp_path: Path, run: Callable[..., Any]) -> None:
    changed = replace(plain, bases={"": Base(id="tiny/llama", change="pissa")})
    adaptertools.write(changed, tmp_path / "pissa", format="peft")
    ran = run("truncate", tmp_path / "pissa", tmp_path / "new", "--rank", "2", "--drop", "changed-base")
    assert ran.code == 0, ran.err
    assert not adaptertools.read(tmp_path / "new").features


def test_a_rank_and_a_size_together_point_to_the_cap(peft_folder: Path, run: Callable[..., Any]) -> None:
    ran = run("truncate", peft_folder, "new", "--rank", "4", "--size", "30kB")
    assert ran.code == 2
    assert "--max-rank" in ran.err


def test_rounding_beyond_the_error_asked_for_is_said(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    options = ("--error", "0.001", "--dtype", "bf16")
    ran = run("truncate", peft_folder, tmp_path / "new", *options, "--json")
    found = distance(tmp_path / "new", peft_folder)
    assert found > 0.001
    (note,) = ran.json["notes"]
    assert "with the rounding to bf16 at most" in note
    assert found <= ran.json["relative_error"] + ran.json["rounding_error"]
    assert ran.json["exact"] is False
    assert "above the 0.001 that was asked for" in run("truncate", peft_folder, tmp_path / "text", *options).out


def test_where_the_files_of_the_source_are_not_known_tensors_are_compared(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("truncate", peft_folder / "adapter_model.safetensors", tmp_path / "new", "--rank", "2")
    assert ran.code == 0, ran.err
    assert f"  size         1.3 kB -> 640 B of tensors; {_report.size(on_disk(tmp_path / 'new'))} on disk\n" in ran.out


def test_dst_is_replaced_only_when_asked_for(peft_folder: Path, run: Callable[..., Any]) -> None:
    assert run("truncate", peft_folder, peft_folder, "--rank", "2").code == 1
    assert {m.rank for m in adaptertools.read(peft_folder).modules} == {4}
    assert run("truncate", peft_folder, peft_folder, "--rank", "2", "--overwrite", "-q").out == ""
    assert {m.rank for m in adaptertools.read(peft_folder).modules} == {2}


def test_what_is_written_can_be_truncated_and_converted_on(
    plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    rslora = plain.map_modules(lambda m: replace(m, scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK))
    adaptertools.write(rslora, tmp_path / "a", format="peft")
    assert run("truncate", tmp_path / "a", tmp_path / "b", "--rank", "3").code == 0
    assert run("convert", tmp_path / "b", tmp_path / "c", "--to", "flax-qwix").code == 0
    assert run("truncate", tmp_path / "c", tmp_path / "d", "--rank", "2").code == 0
    directly = adaptertools.truncate(rslora, rank=2).adapter
    wanted = torch.stack([m.delta_weight(dtype=torch.float64) for m in directly.modules])
    assert torch.allclose(deltas(tmp_path / "d"), wanted, atol=1e-5 * float(wanted.abs().max()))
    after = adaptertools.read(tmp_path / "d")
    assert [entry.operation for entry in after.history] == ["truncate", "convert", "truncate"]
    assert {m.scaling for m in after.modules} == {8.0}


def test_the_history_and_the_notes_are_written_and_shown(
    peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("truncate", peft_folder, tmp_path / "new", "--error", "0.01", "--max-rank", "2", "--json")
    error = ran.json["truncate"]["relative_error"]
    assert ran.json["notes"] == [
        f"at most rank 2 keeps the relative error at {error:.4g}, above the 0.01 that was asked for"
    ]
    entry = adaptertools.read(tmp_path / "new").history[-1]
    assert (entry.operation, entry.source) == ("truncate", peft_folder.name)
    assert entry.details["choice"] == "error 0.01, at most rank 2"
    assert entry.details["relative_error"] == error
    shown = run("inspect", tmp_path / "new").out
    assert "truncate: choice error 0.01, at most rank 2" in shown


@pytest.mark.parametrize("format", ["peft", "loralib", "flax", "flax-qwix"])
def test_the_layout_that_was_read_is_written(
    format: str, plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    options = {"flax-qwix": {"scan_axis": 1, "naming": "maxtext"}}.get(format, {})
    adaptertools.write(plain, tmp_path / "a", format=format, **options)
    for size in (("--rank", "2"), ("--size", "95%")):
        ran = run("truncate", tmp_path / "a", tmp_path / "b", *size, "--overwrite", "--json")
        assert ran.code == 0, ran.err
        assert ran.json["destination"]["format"] == format
        one, other = (adaptertools.read(tmp_path / name).origin for name in "ab")
        assert one is not None
        assert other is not None
        assert one.options == other.options
        assert distance(tmp_path / "b", tmp_path / "a") == pytest.approx(
            ran.json["truncate"]["relative_error"], rel=1e-5
        )
