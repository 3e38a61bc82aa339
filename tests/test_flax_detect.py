"""Which files are Flax adapters, of which dialect, and which only look like it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax import serialization
from flax_oracle import modules_of, write
from safetensors.numpy import save_file

import adaptertools
from adaptertools import formats
from adaptertools.adapter import Adapter, LoraModule, Target
from adaptertools.containers.source import Source
from adaptertools.errors import (
    DamagedFileError,
    DuplicateTargetError,
    MissingAlphaError,
    OptionError,
    UnclaimedTensorError,
    UnknownFormatError,
    UnsupportedFeatureError,
)

FLAX = ("flax", "flax-gemma", "flax-qwix")


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def stored(tree: dict[str, Any], path: Path) -> Path:
    path.write_bytes(serialization.to_bytes(tree))
    return path


def claims(path: Path) -> list[str]:
    return [name for name in FLAX if formats.get(name).detect(Source(path))]


PAIRS = {
    "flax": [
        ("fc/lora_a", "fc/lora_b"),
        ("fc/lora/lora_a", "fc/lora/lora_b"),
        ("params/fc/lora_A", "params/fc/lora_B"),
    ],
    "flax-qwix": [("fc/kernel_lora_a", "fc/kernel_lora_b"), ("q/lora_a.kernel", "q/lora_b.kernel")],
    "flax-gemma": [("lora/fc/lora/a", "lora/fc/lora/b"), ("params/fc/lora/a", "params/fc/lora/b")],
}


@pytest.mark.parametrize("suffix", ["msgpack", "npz", "safetensors"])
@pytest.mark.parametrize(("format", "names"), [(name, pair) for name, pairs in PAIRS.items() for pair in pairs])
def test_each_dialect_is_told_by_its_leaves(format: str, names: tuple[str, str], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"renamed.{suffix}.txt"
    flat = dict(zip(names, (ones(4, 2), ones(2, 3)), strict=True))
    if suffix == "msgpack":
        tree: dict[str, Any] = {}
        for name, array in flat.items():
            home = tree
            *folders, leaf = name.split("/")
            for folder in folders:
                home = home.setdefault(folder, {})
            home[leaf] = array
        stored(tree, path)
    elif suffix == "npz":
        with path.open("wb") as file:
            np.savez(file, **flat)
    else:
        save_file(flat, path)
    assert claims(path) == [format]
    assert formats.detect(Source(path)) == format
    (module,) = adaptertools.read(path, alpha=4).modules
    assert module.target.parameter in ("fc", "q")
    assert (module.lora_A.shape, module.lora_B.shape, module.scaling) == ((2, 4), (3, 2), 2.0)


@pytest.mark.parametrize(
    "key", ["layers/0/fc/{}/value", "['layers']/[0]/['fc']/['{}']/.value", "['layers'][0]['fc']['{}'].value"]
)
def test_npz_keys_may_be_paths_or_what_jax_prints_for_them(key: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "lora.npz", **{key.format("w_lora_a"): ones(4, 2), key.format("w_lora_b"): ones(2, 3)})
    adapter = adaptertools.read(tmp_path / "lora.npz", alpha=2)
    assert list(modules_of(adapter)) == ["layers.0.fc"]


def test_dotted_names_are_those_of_mlx_unless_the_header_says_flax(tmp_path: Path) -> None:
    flat = {"model.layers.0.q_proj.lora_a": ones(4, 2), "model.layers.0.q_proj.lora_b": ones(2, 3)}
    folder = tmp_path / "mlx"
    folder.mkdir()
    save_file(flat, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0}})
    )
    np.savez(tmp_path / "adapters.npz", **flat)
    for path in (folder, folder / "adapters.safetensors", tmp_path / "adapters.npz"):
        assert claims(path) == []
    save_file(flat, tmp_path / "flax.safetensors", {"format": "flax"})
    assert claims(tmp_path / "flax.safetensors") == ["flax"]
    stored(flat, tmp_path / "flax.msgpack")
    assert claims(tmp_path / "flax.msgpack") == ["flax"]
    np.savez(tmp_path / "lora.npz", **flat)
    asked = adaptertools.read(tmp_path / "lora.npz", format="flax")
    assert list(modules_of(asked)) == ["model.layers.0.q_proj"]


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("adapters.safetensors", None, "MLX's file name"),
        ("adapters.npz", None, "MLX's file name"),
        ("lora.safetensors", {"lora_parameters": {"rank": 8, "scale": 2.0}}, "has lora_parameters"),
        ("lora.npz", {"fine_tune_type": "lora", "adapter_path": "adapters"}, "has fine_tune_type, adapter_path"),
    ],
)
def test_an_adapter_of_mlx_is_refused_even_where_flax_was_asked_for(
    name: str, config: dict[str, Any] | None, reason: str, tmp_path: Path
) -> None:
    flat = {"layers.0.q_proj.lora_a": ones(4, 2), "layers.0.q_proj.lora_b": ones(2, 3)}
    save = save_file if name.endswith("safetensors") else lambda tensors, path: np.savez(path, **tensors)
    save(flat, tmp_path / name)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UnknownFormatError, match=f"an MLX adapter.*layers.0.q_proj.lora_a.*{reason}"):
            adaptertools.read(path, format="flax")


def test_names_with_slashes_or_a_header_of_flax_are_read_whatever_the_file_is_called(tmp_path: Path) -> None:
    save_file({"fc/lora_a": ones(4, 2), "fc/lora_b": ones(2, 3)}, tmp_path / "adapters.safetensors")
    assert list(modules_of(adaptertools.read(tmp_path / "adapters.safetensors", format="flax"))) == ["fc"]
    save_file({"fc.lora_a": ones(4, 2), "fc.lora_b": ones(2, 3)}, tmp_path / "adapters.safetensors", {"format": "flax"})
    assert list(modules_of(adaptertools.read(tmp_path / "adapters.safetensors", format="flax"))) == ["fc"]


@pytest.mark.parametrize(
    "names",
    [
        ("base_model.model.fc.lora_A.weight", "base_model.model.fc.lora_B.weight"),
        ("fc.lora_A", "fc.lora_B"),
        ("lora_unet_fc.lora_down.weight", "lora_unet_fc.lora_up.weight"),
        ("fc.kernel", "fc.bias"),
    ],
    ids=["peft", "loralib", "kohya", "no adapter"],
)
def test_other_formats_are_not_claimed(names: tuple[str, str], tmp_path: Path) -> None:
    save_file(dict(zip(names, (ones(2, 4), ones(3, 2)), strict=True)), tmp_path / "file.safetensors")
    assert claims(tmp_path / "file.safetensors") == []


def test_a_folder_is_searched_and_what_does_not_belong_is_passed_over(tmp_path: Path) -> None:
    stored({"fc": {"lora_a": ones(4, 2), "lora_b": ones(2, 3)}}, tmp_path / "trained.msgpack")
    (tmp_path / "README.md").write_text("# An adapter\n")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "damaged.msgpack").write_bytes(serialization.to_bytes({"fc": {"lora_a": ones(4, 2)}})[:-3])
    assert claims(tmp_path) == ["flax"]
    assert list(modules_of(adaptertools.read(tmp_path))) == ["fc"]
    with pytest.raises(DamagedFileError):
        adaptertools.read(tmp_path / "damaged.msgpack")


def test_the_optimizer_is_left_aside_and_said(tmp_path: Path) -> None:
    pair = {"fc": {"lora_a": ones(4, 2), "lora_b": ones(2, 3)}}
    path = stored({"params": pair, "opt_state": {"0": {"mu": pair, "nu": pair}}, "step": ones()}, tmp_path / "state")
    adapter = adaptertools.read(path)
    assert list(modules_of(adapter)) == ["fc"]
    assert "left aside: 5 tensors of the optimizer" in adapter.notes


def test_anything_else_that_is_no_factor_is_an_error(tmp_path: Path) -> None:
    pair = {"fc": {"lora_a": ones(4, 2), "lora_b": ones(2, 3)}}
    with pytest.raises(UnclaimedTensorError, match="rngs/count"):
        adaptertools.read(stored({**pair, "rngs": {"count": ones(1)}}, tmp_path / "state"))


@pytest.mark.parametrize(
    ("leaf", "reason"),
    [
        ("magnitude", "DoRA"),
        ("gating_einsum_lora_a_experts", "fork of openpi"),
        ("kernel_lora_einsum_str", "debugging string"),
    ],
)
def test_what_cannot_be_applied_is_refused_with_the_reason(leaf: str, reason: str, tmp_path: Path) -> None:
    tree = {"fc": {"kernel_lora_a": ones(4, 2), "kernel_lora_b": ones(2, 3), leaf: ones(2)}}
    with pytest.raises(UnsupportedFeatureError, match=reason):
        adaptertools.read(stored(tree, tmp_path / "lora"), alpha=1, ignore_other=True)


def test_a_debugging_string_of_qwix_is_refused_where_it_is_a_string(tmp_path: Path) -> None:
    tree = {"fc": {"w_lora_a": ones(4, 2), "w_lora_b": ones(2, 3), "w_lora_einsum_str": "BTD,Dr,rNH->BTNH"}}
    with pytest.raises(UnsupportedFeatureError, match="debugging string"):
        adaptertools.read(stored(tree, tmp_path / "lora"), alpha=1)


def test_a_dialect_read_as_another_format_says_which_it_is(tmp_path: Path) -> None:
    path = stored({"fc": {"kernel_lora_a": ones(4, 2), "kernel_lora_b": ones(2, 3)}}, tmp_path / "lora")
    with pytest.raises(UnknownFormatError, match="qwix dialect"):
        adaptertools.read(path, format="flax")
    with pytest.raises(UnknownFormatError, match="none of its 1 tensor is"):
        adaptertools.read(stored({"kernel": ones(2, 2)}, tmp_path / "base"), format="flax")


def test_upper_case_factors_need_an_alpha_and_lower_case_ones_take_it(tmp_path: Path) -> None:
    upper = stored({"fc": {"lora_A": ones(4, 2), "lora_B": ones(2, 3)}}, tmp_path / "upper")
    with pytest.raises(MissingAlphaError):
        adaptertools.read(upper)
    assert adaptertools.read(upper, alpha=6).modules[0].scaling == 3
    lower = stored({"fc": {"lora_a": ones(4, 2), "lora_b": ones(2, 3)}}, tmp_path / "lower")
    assert adaptertools.read(lower).modules[0].scaling == 1
    assert adaptertools.read(lower, alpha=6).modules[0].scaling == 3


def test_no_alpha_is_taken_beside_the_one_of_the_sidecar(tmp_path: Path, plain: Adapter) -> None:
    folder = write(plain, tmp_path / "flax")
    with pytest.raises(OptionError, match="sidecar"):
        adaptertools.read(folder, alpha=3)


def test_the_safetensors_header_stands_in_for_a_lost_sidecar(tmp_path: Path, plain: Adapter) -> None:
    folder = write(plain, tmp_path / "flax", container="safetensors")
    (folder / "flax_adapter.json").unlink()
    adapter = adaptertools.read(folder)
    assert {(module.alpha, module.scaling) for module in adapter.modules} == {(16.0, 4.0)}
    assert adapter.bases == plain.bases
    assert [entry.operation for entry in adapter.history] == ["write"]


def test_a_file_renamed_out_of_its_folder_is_read_without_its_sidecar(tmp_path: Path, plain: Adapter) -> None:
    folder = write(plain, tmp_path / "flax")
    (folder / "flax_adapter.msgpack").rename(folder / "other.msgpack")
    adapter = adaptertools.read(folder / "other.msgpack")
    assert {module.scaling for module in adapter.modules} == {1.0}
    for module in adapter.modules:
        expected = next(m for m in plain.modules if m.target == module.target).delta_weight()
        assert torch.equal(module.delta_weight(), expected)


def test_two_names_for_one_leaf_are_an_error(tmp_path: Path) -> None:
    pair = {"fc": {"lora_a": ones(4, 2), "lora_b": ones(2, 3)}}
    with pytest.raises(DuplicateTargetError):
        adaptertools.read(stored({"params": pair, "lora": pair}, tmp_path / "lora"))


def test_a_module_named_like_a_wrapper_keeps_its_name(tmp_path: Path) -> None:
    names = ("params.fc", "lora.fc", "fc.lora", "value", "layers.value", "step.fc", "opt_state.0")
    modules = tuple(
        LoraModule(target=Target(parameter=name), lora_A=torch.randn(2, 3), lora_B=torch.randn(3, 2), alpha=2)
        for name in names
    )
    for name in FLAX:
        folder = write(Adapter(modules=modules), tmp_path / name, name)
        assert set(modules_of(adaptertools.read(folder))) == set(names)
