"""The format flax against real flax.nnx: what we write runs in nnx.LoRA as in PEFT, and what nnx saves is read."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx, serialization
from flax_oracle import (
    Layers,
    Mlp,
    adapter_of,
    assert_identical,
    base_weight,
    delta,
    inputs,
    modules_of,
    output,
    peft_model,
    write,
)

import adaptertools
from adaptertools.adapter import ScaleRule
from adaptertools.errors import UnclaimedTensorError

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["up", "down"]},
    "rslora": {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": ["up", "down"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["up", "down"],
        "rank_pattern": {"down": 5},
        "alpha_pattern": {"down": 7},
    },
}


class NnxMlp(nnx.Module):
    """The same model as `Mlp`, in nnx, with every linear layer wrapped in nnx.LoRA."""

    def __init__(self, model: Any, prefix: str, ranks: dict[str, int]) -> None:
        rngs = nnx.Rngs(0)
        for name in ("up", "down"):
            kernel = base_weight(model, prefix + name)
            linear = nnx.Linear(*kernel.shape, use_bias=False, rngs=rngs)
            linear.kernel[...] = jnp.asarray(kernel)
            rank = ranks[prefix + name]
            setattr(self, name, nnx.LoRA(kernel.shape[0], rank, kernel.shape[1], base_module=linear, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.relu(self.up(x)))


class NnxLayers(nnx.Module):
    def __init__(self, model: Any, ranks: dict[str, int]) -> None:
        self.layers = nnx.List([NnxMlp(model, f"layers.{index}.", ranks) for index in (0, 1)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = x + layer(x)
        return x


def load(model: nnx.Module, tree: Any) -> None:
    """Put a tree of factors into the nnx.LoRAParam variables of a model, and nothing else."""
    state = nnx.state(model, nnx.LoRAParam)
    before = len(jax.tree.leaves(state))
    nnx.replace_by_pure_dict(state, nnx.restore_int_paths(tree))
    assert len(jax.tree.leaves(state)) == before
    nnx.update(model, state)


@pytest.mark.parametrize("config", CONFIGS)
def test_what_we_write_makes_nnx_compute_what_peft_computes(config: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    peft = peft_model(Layers(), **CONFIGS[config])
    adapter = adapter_of(peft)
    folder = write(adapter, tmp_path / "flax")
    model = NnxLayers(peft, {name: module.rank for name, module in modules_of(adapter).items()})
    load(model, serialization.msgpack_restore((folder / "flax_adapter.msgpack").read_bytes()))
    x = inputs(5, 6)
    expected = output(peft, x)
    with peft.disable_adapter():
        assert np.abs(expected - output(peft, x)).max() > 0.01
    np.testing.assert_allclose(np.asarray(model(jnp.asarray(x))), expected, atol=1e-5, rtol=1e-5)


def test_flax_restores_our_file_into_a_state_of_its_own(tmp_path: Path) -> None:
    peft = peft_model(Layers(), **CONFIGS["plain"])
    adapter = adapter_of(peft)
    model = NnxLayers(peft, {name: module.rank for name, module in modules_of(adapter).items()})
    target = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    target = jax.tree.map(np.asarray, serialization.to_state_dict(target))
    data = (write(adapter, tmp_path / "flax") / "flax_adapter.msgpack").read_bytes()
    restored = serialization.from_bytes(target, data)
    assert jax.tree.structure(restored) == jax.tree.structure(target)
    assert serialization.to_bytes(restored) == data


@pytest.mark.parametrize("save", ["to_bytes", "msgpack_serialize"])
def test_factors_that_nnx_saved_are_read_with_scaling_one(save: str, tmp_path: Path) -> None:
    peft = peft_model(Layers(), **CONFIGS["plain"])
    model = NnxLayers(peft, dict.fromkeys(modules_of(adapter_of(peft)), 3))
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.LoRA):
            layer.lora_b[...] = jax.random.normal(jax.random.key(7), layer.lora_b.shape)
    tree = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)))
    (tmp_path / "lora.msgpack").write_bytes(getattr(serialization, save)(tree))
    adapter = adaptertools.read(tmp_path / "lora.msgpack")
    assert adapter.origin is not None
    assert adapter.origin.format == "flax"
    assert sorted(modules_of(adapter)) == [f"layers.{layer}.{name}" for layer in (0, 1) for name in ("down", "up")]
    assert any("nnx.LoRA, which has no scale" in note for note in adapter.notes)
    for index, layer in enumerate(model.layers):
        for name in ("up", "down"):
            lora = getattr(layer, name)
            product = np.asarray(lora.lora_a[...], np.float64) @ np.asarray(lora.lora_b[...], np.float64)
            np.testing.assert_allclose(delta(adapter, f"layers.{index}.{name}"), product, rtol=1e-12)


def test_the_factors_of_loralinear_belong_to_the_layer_above_them(tmp_path: Path) -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.fc = nnx.LoRALinear(5, 3, lora_rank=2, rngs=nnx.Rngs(0))

    model = Model()
    model.fc.lora.lora_b[...] = jnp.ones((2, 3))
    tree = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)))
    (tmp_path / "lora.msgpack").write_bytes(serialization.to_bytes(tree))
    adapter = adaptertools.read(tmp_path / "lora.msgpack")
    assert list(modules_of(adapter)) == ["fc"]
    assert adapter.notes == ()
    x = inputs(4, 5)
    by_nnx = np.asarray(model.fc.lora(jnp.asarray(x)))
    np.testing.assert_allclose(x @ delta(adapter, "fc"), by_nnx, atol=1e-5)


def test_a_whole_model_is_read_only_when_its_own_weights_may_be_left_aside(tmp_path: Path) -> None:
    peft = peft_model(Mlp(), **CONFIGS["plain"])
    model = NnxMlp(peft, "", dict.fromkeys(("up", "down"), 4))
    tree = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    (tmp_path / "model.msgpack").write_bytes(serialization.to_bytes(tree))
    with pytest.raises(UnclaimedTensorError, match=r"base_module/kernel.*ignore_other"):
        adaptertools.read(tmp_path / "model.msgpack")
    adapter = adaptertools.read(tmp_path / "model.msgpack", ignore_other=True)
    assert set(modules_of(adapter)) == {"up", "down"}
    assert "left aside: 2 tensors that are no LoRA factors" in adapter.notes


def test_scanned_nnx_layers_are_read_one_by_one(tmp_path: Path) -> None:
    @nnx.vmap(in_axes=0)
    def stack(key: jax.Array) -> nnx.LoRA:
        return nnx.LoRA(6, 2, 5, rngs=nnx.Rngs(key))

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.layers = stack(jax.random.split(jax.random.key(0), 3))

    model = Model()
    model.layers.lora_b[...] = jax.random.normal(jax.random.key(1), (3, 2, 5))
    tree = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)))
    (tmp_path / "lora.msgpack").write_bytes(serialization.to_bytes(tree))
    adapter = adaptertools.read(tmp_path / "lora.msgpack")
    assert list(modules_of(adapter)) == ["layers.0", "layers.1", "layers.2"]
    expected = np.einsum(
        "lir,lro->lio", *(np.asarray(tree["layers"][name], np.float64) for name in ("lora_a", "lora_b"))
    )
    for index in range(3):
        np.testing.assert_allclose(delta(adapter, f"layers.{index}"), expected[index], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fold_that_can_be_undone_is_undone(dtype: torch.dtype, tmp_path: Path) -> None:
    """Powers of two in every dtype; any scale at all in the narrow ones, whose fold is kept in float32."""
    for config in CONFIGS.values():
        if dtype is torch.float32 and config is not CONFIGS["plain"]:
            continue
        adapter = adapter_of(peft_model(Layers().to(dtype), **config).to(dtype))
        assert {module.lora_A.dtype for module in adapter.modules} == {dtype}
        assert_identical(adapter, adaptertools.read(write(adapter, tmp_path / "flax", overwrite=True)))


def test_a_fold_that_cannot_be_undone_leaves_the_delta_weight_within_the_reported_error(tmp_path: Path) -> None:
    adapter = adapter_of(peft_model(Mlp(64, 300, 64), **CONFIGS["rslora"]))
    report = adaptertools.write(adapter, tmp_path / "flax", format="flax")
    assert not report.exact
    assert 0 < report.max_relative_error < 6e-8
    back = adaptertools.read(tmp_path / "flax")
    assert any("folded" in note and "lora_alpha was 5" in note for note in back.notes)
    for name, module in modules_of(adapter).items():
        read = modules_of(back)[name]
        assert (read.alpha, read.scale_rule) == (1.0, ScaleRule.DIRECT)
        wanted = module.lora_B.double() * module.scaling
        error = ((read.lora_B.double() - wanted) / wanted).abs().max()
        assert float(error) <= report.max_relative_error
        assert torch.equal(read.lora_A, module.lora_A)
