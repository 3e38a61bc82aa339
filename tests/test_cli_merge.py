"""`adaptertools merge`, on bases and adapters as files."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_plans import assert_rounded_once, contents
from safetensors.torch import load_file, save_file

import adaptertools
from adaptertools.adapter import Adapter
from adaptertools.merging import blocks, tasks
from adaptertools.merging.resume import Staging
from adaptertools.merging.tasks import Output

NAMES = [f"model.layers.{layer}.self_attn.{name}.weight" for layer in (0, 1) for name in ("q_proj", "v_proj")]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two shards, a layer in each, as the adapter `plain` was trained on; a norm that no adapter changes."""
    generator = torch.Generator().manual_seed(1)
    folder = tmp_path / "base"
    folder.mkdir()
    weight_map = {}
    for shard in (1, 2):
        name = f"model-0000{shard}-of-00002.safetensors"
        held = [tensor for tensor in NAMES if f"layers.{shard - 1}." in tensor]
        tensors = {tensor: torch.randn(8, 12, generator=generator).bfloat16() for tensor in held}
        tensors[f"model.layers.{shard - 1}.norm.weight"] = torch.ones(12).bfloat16()
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 4 * 8 * 12 * 2 + 2 * 12 * 2}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_merged(folder: Path, base: Path, adapter: Adapter, weight: float = 1.0) -> None:
    """Every tensor is the base's own, or W + weight · ΔW rounded once."""
    found, wanted = weights_in(folder), weights_in(base)
    assert found.keys() == wanted.keys()
    modules = {f"{module.target.parameter}.weight": module for module in adapter.modules}
    for name, tensor in wanted.items():
        if name in modules:
            delta = modules[name].delta_weight(dtype=torch.float64)
            assert_rounded_once(found[name], tensor.double() + weight * delta, tensor.dtype)
        else:
            assert torch.equal(found[name], tensor), name


def test_the_result_is_the_base_with_the_deltas_added(
    base: Path, peft_folder: Path, plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("merge", base, peft_folder, tmp_path / "merged")
    assert ran.code == 0, ran.err
    assert_merged(tmp_path / "merged", base, plain)
    assert f"Merged 1 adapter into {base}: {tmp_path / 'merged'}\n" in ran.out
    assert "  changed      4 of 6 tensors, computed on cpu\n" in ran.out
    assert f"  adapter      1 × {peft_folder}\n" in ran.out
    assert "ROUNDING TOOK" in ran.out
    record = json.loads((tmp_path / "merged" / "adaptertools_merge.json").read_text())
    assert f"took {record['total']['rounding_error']:.4g} of the delta" in ran.out


def test_json_holds_what_the_record_says(
    base: Path, peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("merge", base, peft_folder, tmp_path / "merged", "--json", "--hash")
    assert ran.code == 0, ran.err
    record = json.loads((tmp_path / "merged" / "adaptertools_merge.json").read_text())
    assert ran.json["tensors"] == record["tensors"]
    assert set(ran.json["tensors"]) == set(NAMES)
    assert ran.json["total"] == record["total"]
    assert ran.json["destination"]["path"] == str(tmp_path / "merged")
    assert ran.json["destination"]["nbytes"] == sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert ran.json["adapters"] == [{"path": str(peft_folder), "weight": 1.0}]
    assert all("sha256" in entry for entry in record["base"]["files"])


def test_weights_scale_each_adapter_and_all_are_rounded_once(
    base: Path, peft_folder: Path, plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("merge", base, peft_folder, peft_folder, tmp_path / "merged", "--weights", "0.5,-0.25", "--json")
    assert ran.code == 0, ran.err
    assert_merged(tmp_path / "merged", base, plain, 0.25)
    assert [source["weight"] for source in ran.json["adapters"]] == [0.5, -0.25]


@pytest.mark.parametrize("weights", ["1", "1,x", "1,2,3"])
def test_weights_that_do_not_fit_are_wrong_usage(
    weights: str, base: Path, peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("merge", base, peft_folder, peft_folder, tmp_path / "merged", "--weights", weights)
    assert ran.code == 2
    assert "--weights" in ran.err
    assert not (tmp_path / "merged").exists()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    base: Path, peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    args = ("merge", base, peft_folder, tmp_path / "merged", "--dry-run", "--workers", "2", "--device", "cpu")
    ran = run(*args)
    assert ran.code == 0, ran.err
    assert f"into {base}: {tmp_path / 'merged'}; nothing was written\n" in ran.out
    assert "  changed      4 of 6 tensors\n" in ran.out
    assert "  device       cpu\n" in ran.out
    ran = run(*args, "--json")
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert ran.json["bytes_written"] == size
    assert ran.json["bytes_read"] == sum(tensor.nbytes for tensor in weights_in(base).values())
    assert ran.json["workers"] == 2
    assert ran.json["destination"] == {"path": str(tmp_path / "merged"), "exists": False}
    assert ran.json["memory"] > 0
    assert sorted(ran.json["edits"]) == sorted(NAMES)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_dry_run_finds_that_the_destination_is_taken(
    base: Path, peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.txt").write_text("mine")
    for option in ("--dry-run", "--overwrite", "--quiet"):
        ran = run("merge", base, peft_folder, tmp_path / "merged", option)
        assert ran.code == 1
        assert "holds no adaptertools_merge.json, so it is not replaced" in ran.err
    (tmp_path / "merged" / "thesis.txt").unlink()
    assert run("merge", base, peft_folder, tmp_path / "merged").code == 0
    ran = run("merge", base, peft_folder, tmp_path / "merged", "--dry-run")
    assert ran.code == 1
    assert "(--overwrite) replaces an earlier merge" in ran.err


def test_a_dtype_casts_every_tensor(
    base: Path, peft_folder: Path, plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("merge", base, peft_folder, tmp_path / "merged", "--dtype", "f32")
    assert ran.code == 0, ran.err
    found = weights_in(tmp_path / "merged")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    for module in plain.modules:
        name = f"{module.target.parameter}.weight"
        wanted = weights_in(base)[name].double() + module.delta_weight(dtype=torch.float64)
        assert_rounded_once(found[name], wanted, torch.float32)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def test_what_a_cast_takes_is_said(base: Path, peft_folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    shard = base / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    norm = "model.layers.0.norm.weight"
    tensors[norm][1] = 1e-9  # below the least of float16
    save_file(tensors, shard, {"format": "pt"})
    ran = run("merge", base, peft_folder, tmp_path / "merged", "--dtype", "f16")
    assert ran.code == 0, ran.err
    lost = float(tensors[norm][1]) / float(tensors[norm].double().norm())
    assert f"  cast         2 tensors, 1 value inexact, up to {lost:.1e} of the norm of {norm}\n" in ran.out
    assert "replaced" not in ran.out
    record = json.loads((tmp_path / "merged" / "adaptertools_merge.json").read_text())
    assert record["cast"][norm] == {"rounding_error": pytest.approx(lost), "inexact": 1, "elements": 12}
    assert record["cast"]["model.layers.1.norm.weight"]["inexact"] == 0
    proof = run("verify", base, peft_folder, tmp_path / "merged")
    assert proof.code == 0, proof.out
    assert "  note         2 tensors cast to f16: compared with the base's own, cast\n" in proof.out
    wide = run("merge", base, peft_folder, tmp_path / "wide", "--dtype", "f32")
    assert "  cast         2 tensors, exact\n" in wide.out


def test_advice_on_what_is_not_finite_is_of_options_that_there_are(
    base: Path, peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    file = peft_folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file)
    for command in (["merge", base, peft_folder, tmp_path / "merged"], ["verify", base, peft_folder, base]):
        ran = run(*command)
        assert ran.code == 1
        assert "1 NaN and 0 infinite" in ran.err
        assert "--allow-nonfinite" not in ran.err


def test_overwrite_replaces_an_earlier_merge_alone(
    base: Path, peft_folder: Path, plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    assert run("merge", base, peft_folder, tmp_path / "merged", "--weights", "2", "-q").out == ""
    refused = run("merge", base, peft_folder, tmp_path / "merged")
    assert refused.code == 1
    assert "exists" in refused.err
    assert_merged(tmp_path / "merged", base, plain, 2.0)
    assert run("merge", base, peft_folder, tmp_path / "merged", "--overwrite").code == 0
    assert_merged(tmp_path / "merged", base, plain)
    ran = run("merge", base, peft_folder, base, "--overwrite")
    assert ran.code == 1
    assert "never written to" in ran.err


def test_a_module_without_a_weight_is_an_error_unless_it_may_be_left_out(
    base: Path, plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    odd = adaptertools.write(plain, tmp_path / "odd", format="peft").path
    tensors = load_file(odd / "adapter_model.safetensors")
    renamed = {name.replace("layers.1.self_attn.v_proj", "layers.7.self_attn.v_proj"): t for name, t in tensors.items()}
    save_file(renamed, odd / "adapter_model.safetensors")
    ran = run("merge", base, odd, tmp_path / "merged")
    assert ran.code == 1
    assert "layers.7" in ran.err
    assert not (tmp_path / "merged").exists()
    ran = run("merge", base, odd, tmp_path / "merged", "--allow-unmatched")
    assert ran.code == 0, ran.err
    assert "  left out     1: " in ran.out
    assert "  changed      3 of 6 tensors" in ran.out


def test_a_merge_that_stopped_exits_with_3_and_the_same_command_goes_on(
    base: Path, peft_folder: Path, plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    original, calls = tasks.write_from, 0

    def failing(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(errno.EIO, "broken")
        original(*args)

    command = ("merge", base, peft_folder, tmp_path / "merged", "--workers", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "write_from", failing)
        ran = run(*command)
    assert ran.code == 3
    assert "goes on from there" in ran.err
    assert not (tmp_path / "merged").exists()
    ran = run(*command)
    assert ran.code == 0, ran.err
    assert "  resumed      1 file finished by a run before\n" in ran.out
    assert_merged(tmp_path / "merged", base, plain)


def test_ctrl_c_says_that_the_same_command_goes_on_where_there_is_something_to_go_on_from(
    base: Path, peft_folder: Path, plain: Adapter, tmp_path: Path, run: Callable[..., Any]
) -> None:
    command = ("merge", base, peft_folder, tmp_path / "merged", "--workers", "1")
    finish = Staging.finish

    def at_once(self: Staging, *args: Any) -> None:
        raise KeyboardInterrupt

    def afterwards(self: Staging, *args: Any) -> None:
        finish(self, *args)
        raise KeyboardInterrupt

    for interrupted, said in (
        (at_once, "Error: interrupted\n"),
        (afterwards, "Error: interrupted; the same command goes on from what is finished\n"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Staging, "finish", interrupted)
            ran = run(*command)
        assert (ran.code, ran.err) == (130, said)
    ran = run(*command)
    assert ran.code == 0, ran.err
    assert "  resumed      1 file finished by a run before\n" in ran.out
    assert_merged(tmp_path / "merged", base, plain)


def test_a_base_without_a_configuration_is_said_to_have_none(
    base: Path, peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    assert "config.json" not in run("merge", base, peft_folder, tmp_path / "one").out
    (base / "config.json").unlink()
    ran = run("merge", base, peft_folder, tmp_path / "two")
    assert ran.code == 0, ran.err
    assert "  note         the base has no config.json: " in ran.out


@pytest.mark.parametrize("memory", ["1kB", "lots"])
def test_memory_that_is_too_little_or_no_size_is_wrong_usage(
    memory: str, base: Path, peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("merge", base, peft_folder, tmp_path / "merged", "--max-memory", memory)
    assert ran.code == 2
    assert not (tmp_path / "merged").exists()


def test_files_are_in_the_making_together(
    base: Path, peft_folder: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = Output.write

    def noted(self: Output, offset: int, content: memoryview | bytes) -> None:
        written.append(self.layout.name[:11])
        write(self, offset, content)

    monkeypatch.setattr(Output, "write", noted)
    assert run("merge", base, peft_folder, tmp_path / "merged", "--workers", "1", "--device", "cpu").code == 0
    assert written[:4] == ["model-00001", "model-00002"] * 2, "one writer at a time gets into a file"


def test_neither_workers_nor_memory_change_a_byte(
    base: Path, peft_folder: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", {"cpu": 50})
    for name, options in {"one": ["--workers", "1"], "two": ["--workers", "5", "--max-memory", "1GB"]}.items():
        assert run("merge", base, peft_folder, tmp_path / name, *options).code == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("option", [("--max-memory", "foo"), ("--max-memory", "50%"), ("--weights", "nan")], ids=str)
def test_an_option_with_a_wrong_value_is_named(
    option: tuple[str, str], base: Path, peft_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    ran = run("merge", base, peft_folder, tmp_path / "merged", *option)
    assert ran.code == 2
    assert f"{' '.join(option)}: expected" in ran.err


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_destination_in_an_adapters_folder_is_refused(
    options: tuple[str, ...], base: Path, peft_folder: Path, run: Callable[..., Any]
) -> None:
    ran = run("merge", base, peft_folder, peft_folder / "merged", *options)
    assert ran.code == 1
    assert f"lies in {peft_folder}, an adapter that is merged: give a place outside it" in ran.err
    assert not (peft_folder / "merged").exists()


def test_a_destination_that_is_taken_is_found_before_adapters_are_read(
    base: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    ran = run("merge", base, tmp_path / "no adapter", tmp_path / "taken")
    assert ran.code == 1
    assert "is not replaced: give another name" in ran.err
    assert "no adapter" in run("merge", base, tmp_path / "no adapter", tmp_path / "merged").err
    assert "is the root of the file system" in run("merge", base, tmp_path / "no adapter", "/").err


@pytest.mark.parametrize("command", ["merge", "verify"])
def test_what_is_missing_on_the_command_line_is_said(command: str, base: Path, run: Callable[..., Any]) -> None:
    ran = run(command, base, "adapter")
    assert ran.code == 2
    assert "Expected a base model, an adapter at least, and a" in ran.err
