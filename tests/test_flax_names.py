"""Name maps and layouts of the Flax formats: tunix, gemma and MaxText, fused and stacked, and what they refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax import serialization
from flax_oracle import D, F, H, K, N, assert_identical, decoder, delta, leaves, module, modules_of, write

import adaptertools
from adaptertools.adapter import Adapter
from adaptertools.errors import (
    OptionError,
    ShapeError,
    UnclaimedTensorError,
    UnsupportedFeatureError,
)

LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("flax", {}),
    ("flax", {"naming": "tunix-llama"}),
    ("flax", {"scan_axis": 0}),
    ("flax-qwix", {"naming": "tunix-llama", "head_dim": H}),
    ("flax-qwix", {"naming": "tunix-gemma", "head_dim": H}),
    ("flax-qwix", {"naming": "maxtext"}),
    ("flax-qwix", {"naming": "maxtext", "scan_axis": 1, "num_layers": 5}),
    ("flax-qwix", {"naming": "maxtext", "scan_axis": 1, "arch": "llama3.1", "head_dim": H}),
    ("flax-qwix", {"naming": "maxtext", "arch": "llama3.1", "head_dim": H}),
    ("flax-gemma", {"naming": "gemma", "head_dim": H}),
    ("flax-gemma", {"naming": "gemma", "head_dim": H, "scan_axis": 0}),
]


@pytest.mark.parametrize(("format", "options"), LAYOUTS, ids=lambda value: str(value))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_layout_gives_the_adapter_back_bit_for_bit(
    format: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    adapter = decoder(dtype=dtype)
    if dtype is torch.float32 and options.get("arch"):
        return  # the query scale 1/sqrt(6) is folded with rounding, which has its own test
    back = adaptertools.read(write(adapter, tmp_path / "flax", format, **options))
    assert_identical(adapter, back)
    assert back.origin is not None
    for name, value in options.items():
        assert back.origin.options[name] == value


def test_tunix_llama_has_heads_of_its_own_axis(tmp_path: Path) -> None:
    adapter = decoder(1)
    found = leaves(write(adapter, tmp_path / "flax", "flax-qwix", naming="tunix-llama", head_dim=H))
    assert {name: leaf.shape for name, leaf in found.items() if name.endswith("_a") and "attn" in name} == {
        "layers/0/attn/q_proj/w_lora_a": (D, 2),
        "layers/0/attn/k_proj/w_lora_a": (D, 2),
        "layers/0/attn/v_proj/w_lora_a": (D, 2),
        "layers/0/attn/o_proj/w_lora_a": (N, H, 2),
    }
    assert found["layers/0/attn/q_proj/w_lora_b"].shape == (2, N, H)
    assert found["layers/0/attn/o_proj/w_lora_b"].shape == (2, D)
    assert found["layers/0/mlp/gate_proj/kernel_lora_b"].shape == (2, F)


def test_gemma_fuses_k_with_v_and_gate_with_up(tmp_path: Path) -> None:
    adapter = decoder(1)
    found = leaves(write(adapter, tmp_path / "flax", "flax-gemma", naming="gemma", head_dim=H))
    assert {name: leaf.shape for name, leaf in found.items()} == {
        "layer_0/attn/q_einsum/_LoRAEinsum_0/lora/a": (D, 2),
        "layer_0/attn/q_einsum/_LoRAEinsum_0/lora/b": (2, N, H),
        "layer_0/attn/kv_einsum/_LoRAEinsum_0/lora/a": (D, 4),
        "layer_0/attn/kv_einsum/_LoRAEinsum_0/lora/b": (4, 2, K, H),
        "layer_0/attn/attn_vec_einsum/_LoRAEinsum_0/lora/a": (N, H, 2),
        "layer_0/attn/attn_vec_einsum/_LoRAEinsum_0/lora/b": (2, D),
        "layer_0/mlp/_LoRAEinsum_gating_einsum/lora/a": (D, 4),
        "layer_0/mlp/_LoRAEinsum_gating_einsum/lora/b": (4, 2, F),
        "layer_0/mlp/_LoRAEinsum_linear/lora/a": (F, 2),
        "layer_0/mlp/_LoRAEinsum_linear/lora/b": (2, D),
    }
    a, b = (found[f"layer_0/attn/kv_einsum/_LoRAEinsum_0/lora/{name}"].astype(np.float64) for name in "ab")
    fused = np.einsum("dr,rckh->cdkh", a, b)
    for part, name in enumerate(("k_proj", "v_proj")):
        wanted = delta(adapter, f"model.layers.0.self_attn.{name}").reshape(D, K, H)
        np.testing.assert_allclose(fused[part], wanted, rtol=1e-12, atol=1e-12)


def test_a_fused_leaf_that_was_trained_further_is_read_at_its_full_rank(tmp_path: Path) -> None:
    """Once the zero blocks are filled, k and v can no longer be told apart by rank."""
    folder = write(decoder(1), tmp_path / "flax", "flax-gemma", naming="gemma", head_dim=H)
    tree = serialization.msgpack_restore((folder / "flax_adapter.msgpack").read_bytes())
    leaf = tree["layer_0"]["attn"]["kv_einsum"]["_LoRAEinsum_0"]["lora"]
    leaf["b"] = np.random.default_rng(0).normal(size=leaf["b"].shape).astype(np.float32)
    (folder / "flax_adapter.msgpack").write_bytes(serialization.to_bytes(tree))
    adapter = adaptertools.read(folder)
    fused = np.einsum("dr,rckh->cdkh", leaf["a"].astype(np.float64), leaf["b"].astype(np.float64))
    for part, name in enumerate(("k_proj", "v_proj")):
        read = modules_of(adapter)[f"model.layers.0.self_attn.{name}"]
        assert read.rank == 4
        got = delta(adapter, f"model.layers.0.self_attn.{name}").reshape(D, K, H)
        np.testing.assert_allclose(got, fused[part], rtol=1e-12, atol=1e-12)


def test_a_fused_leaf_whose_scale_cannot_be_undone_still_gives_each_part_its_own_rank(tmp_path: Path) -> None:
    modules = tuple(module(f"model.layers.0.mlp.{name}_proj", 300, 200, alpha=5, rank=3) for name in ("gate", "up"))
    modules = (modules[0], module("model.layers.0.mlp.up_proj", 300, 200, alpha=7, rank=2, seed=1))
    report = adaptertools.write(Adapter(modules=modules), tmp_path / "flax", format="flax-gemma", naming="gemma")
    back = modules_of(adaptertools.read(tmp_path / "flax"))
    for before in modules:
        after = back[str(before.target)]
        assert torch.equal(after.lora_A, before.lora_A)
        wanted = before.lora_B.double() * before.scaling
        error = ((after.lora_B.double() * after.scaling - wanted) / wanted).abs().max()
        assert float(error) <= report.max_relative_error < 6e-8


def test_names_that_prove_no_family_are_taken_as_they_stand_with_a_word(tmp_path: Path) -> None:
    mlp = [m for m in decoder(1).modules if "mlp" in m.target.parameter]
    folder = write(Adapter(modules=tuple(mlp)), tmp_path / "flax", "flax-qwix", naming="tunix-llama")
    bare = tmp_path / "bare.msgpack"
    bare.write_bytes((folder / "flax_adapter.msgpack").read_bytes())
    adapter = adaptertools.read(bare, alpha=4)
    assert "layers.0.mlp.up_proj" in modules_of(adapter)
    assert any("tunix-llama or tunix-gemma, give naming" in note for note in adapter.notes)
    assert "model.layers.0.mlp.up_proj" in modules_of(adaptertools.read(bare, alpha=4, naming="tunix-llama"))


def test_parts_and_layers_that_the_adapter_lacks_are_zero_and_do_not_come_back(tmp_path: Path) -> None:
    kept = [m for m in decoder(3).modules if ".1." not in m.target.parameter and "v_proj" not in m.target.parameter]
    adapter = Adapter(modules=tuple(kept))
    for options in ({"naming": "gemma", "head_dim": H}, {"naming": "gemma", "head_dim": H, "scan_axis": 0}):
        report = adaptertools.write(adapter, tmp_path / "flax", format="flax-gemma", overwrite=True, **options)
        assert any(note.startswith("filled with zeros: ") for note in report.notes)
        assert_identical(adapter, adaptertools.read(tmp_path / "flax"))
    stacked = leaves(tmp_path / "flax")["layer/attn/kv_einsum/_LoRAEinsum_0/lora/b"]
    assert stacked.shape == (3, 2, 2, K, H)
    assert not stacked[1].any()
    assert not stacked[:, :, 1].any()


def test_layers_of_different_rank_share_a_stack(tmp_path: Path) -> None:
    modules = tuple(module(f"layers.{i}.fc", 4, 3, rank=rank, alpha=2 * rank) for i, rank in enumerate((2, 5, 1)))
    adapter = Adapter(modules=modules)
    folder = write(adapter, tmp_path / "flax", "flax-qwix", scan_axis=1)
    assert {name: leaf.shape for name, leaf in leaves(folder).items()} == {
        "layers/fc/kernel_lora_a": (4, 3, 5),
        "layers/fc/kernel_lora_b": (5, 3, 3),
    }
    assert_identical(adapter, adaptertools.read(folder))


def permute_as_maxtext(kernel: np.ndarray) -> np.ndarray:
    """What MaxText's import does to the last axis of a query or key kernel (D, heads, head_dim)."""
    first, second = np.split(kernel, 2, axis=-1)
    turned = np.empty_like(kernel)
    turned[..., ::2], turned[..., 1::2] = first, second
    return turned


@pytest.mark.parametrize("scan_axis", [None, 1])
def test_llama_31_in_maxtext_has_its_rows_and_query_scale(scan_axis: int | None, tmp_path: Path) -> None:
    adapter = decoder(2)
    report = adaptertools.write(
        adapter,
        tmp_path / "flax",
        format="flax-qwix",
        naming="maxtext",
        scan_axis=scan_axis,
        arch="llama3.1",
        head_dim=H,
    )
    assert report.max_relative_error < 6e-8
    found = leaves(tmp_path / "flax")
    for layer in range(2):
        for name, path, scale in (("q", "query", H**-0.5), ("k", "key", 1.0), ("v", "value", 1.0)):
            wanted = delta(adapter, f"model.layers.{layer}.self_attn.{name}_proj").reshape(D, -1, H) * scale
            wanted = wanted if name == "v" else permute_as_maxtext(wanted)
            home = "decoder/layers" if scan_axis else f"decoder/layers_{layer}"
            a, b = (
                np.asarray(found[f"{home}/self_attention/{path}/kernel_lora_{which}"], np.float64) for which in "ab"
            )
            a, b = (a[:, layer], b[:, layer]) if scan_axis else (a, b)
            np.testing.assert_allclose(2 * (a @ b).reshape(wanted.shape), wanted, rtol=1e-6, atol=1e-6)
    for source in ("with its sidecar", "without"):
        path, options = tmp_path / "flax", {}
        if source == "without":
            path = tmp_path / "bare.msgpack"
            path.write_bytes((tmp_path / "flax" / "flax_adapter.msgpack").read_bytes())
            options = {"alpha": 4, "arch": "llama3.1", "head_dim": H}
        back = adaptertools.read(path, **options)
        for name in modules_of(adapter):
            np.testing.assert_allclose(delta(back, name), delta(adapter, name), rtol=1e-6, atol=1e-6)


def test_maxtext_is_read_with_a_word_about_llama_31(tmp_path: Path) -> None:
    write(decoder(1), tmp_path / "flax", "flax-qwix", naming="maxtext")
    (tmp_path / "bare.msgpack").write_bytes((tmp_path / "flax" / "flax_adapter.msgpack").read_bytes())
    assert any("arch=llama3.1" in note for note in adaptertools.read(tmp_path / "bare.msgpack", alpha=4).notes)
    assert not adaptertools.read(tmp_path / "flax").notes


def test_the_layer_prefix_is_found_when_writing_and_given_when_reading(tmp_path: Path) -> None:
    prefix = "model.language_model.layers"
    adapter = decoder(2, prefix)
    folder = write(adapter, tmp_path / "flax", "flax-qwix", naming="tunix-gemma", head_dim=H)
    assert_identical(adapter, adaptertools.read(folder))
    assert_identical(decoder(2), adaptertools.read(folder, layer_prefix="model.layers"))
    bare = tmp_path / "bare.msgpack"
    bare.write_bytes((folder / "flax_adapter.msgpack").read_bytes())
    assert set(modules_of(adaptertools.read(bare, alpha=4))) == set(modules_of(decoder(2)))
    assert set(modules_of(adaptertools.read(bare, alpha=4, layer_prefix=prefix))) == set(modules_of(adapter))


def test_two_towers_need_to_be_told_apart(tmp_path: Path) -> None:
    both = (*decoder(1, "model.language_model.layers").modules, *decoder(1, "model.vision.layers").modules)
    with pytest.raises(OptionError, match=r"language_model.*vision.*layer_prefix"):
        write(Adapter(modules=both), tmp_path / "flax", "flax-qwix", naming="tunix-llama", head_dim=H)


@pytest.mark.parametrize(
    ("adapter", "format", "options", "error", "message"),
    [
        (decoder(1), "flax-qwix", {"naming": "tunix-llama"}, OptionError, "give head_dim"),
        (decoder(1), "flax-qwix", {"naming": "tunix-llama", "head_dim": 7}, ShapeError, "heads of head_dim 7"),
        (decoder(1), "flax-qwix", {"naming": "tunix-llama", "head_dim": 0}, OptionError, "head_dim is 0"),
        (decoder(1), "flax-qwix", {"naming": "gemma"}, OptionError, "unknown naming 'gemma'"),
        (decoder(1), "flax-qwix", {"arch": "llama3.1"}, OptionError, "naming=maxtext"),
        (decoder(1), "flax-qwix", {"naming": "maxtext", "arch": "gemma"}, OptionError, "only llama3.1"),
        (decoder(1), "flax", {"scan_axis": 2}, OptionError, "expected 0 or 1"),
        (
            Adapter(modules=(module("score", 4, 3),)),
            "flax-gemma",
            {"naming": "gemma"},
            UnsupportedFeatureError,
            "no place",
        ),
        (Adapter(modules=(module("a/b", 4, 3),)), "flax", {}, UnsupportedFeatureError, "no path in a tree"),
        (Adapter(modules=(module("a..b", 4, 3),)), "flax", {}, UnsupportedFeatureError, "no path in a tree"),
        (
            Adapter(modules=(module("a", 4, 3, dtype=torch.float64),)),
            "flax",
            {},
            UnsupportedFeatureError,
            "f64.*--dtype",
        ),
        (
            Adapter(modules=(module("layers.0.fc", 4, 3), module("layers.1.fc", 5, 3))),
            "flax",
            {"scan_axis": 0},
            ShapeError,
            "input sizes differ",
        ),
        (
            Adapter(modules=(module("layers.0.a", 4, 3), module("layers.2.b", 4, 3))),
            "flax",
            {"scan_axis": 0},
            OptionError,
            "num_layers",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(
    adapter: Adapter, format: str, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        write(adapter, tmp_path / "flax", format, **options)
    assert not (tmp_path / "flax").exists()


def test_a_naming_that_has_no_such_path_says_so(tmp_path: Path) -> None:
    folder = write(decoder(1), tmp_path / "flax", "flax-qwix")
    with pytest.raises(UnclaimedTensorError, match="no path of the naming maxtext"):
        adaptertools.read(folder, naming="maxtext")
    with pytest.raises(OptionError, match="unknown naming"):
        adaptertools.read(folder, naming="gemma")
