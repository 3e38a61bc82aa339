"""The format flax-qwix against real qwix, in nnx and Linen: dot products, einsums, fused weights and scanned layers."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import torch
from flax import nnx, serialization
from flax_oracle import (
    Layers,
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
from qwix_models import Attentions, D, H, K, LinenModel, N, NnxAttentions, NnxLayers

import adaptertools
from adaptertools.adapter import Adapter, LoraModule, Target
from adaptertools.errors import MissingAlphaError, ShapeError

pytestmark = [  # qwix 0.1.8 calls what flax 0.12 has deprecated
    pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:'.value' (access|setter) is now deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The 'm.iter_modules\\(\\)' method is deprecated:DeprecationWarning"),
]


def with_lora(model: Any, x: jax.Array, rules: list[qwix.LoraRule]) -> Any:
    return qwix.apply_lora_to_model(model, qwix.LoraProvider(rules), x, rngs=nnx.Rngs(3))


def load(model: nnx.Module, folder: Path) -> None:
    """Put our file into the LoRA parameters that qwix made: same paths, same shapes, nothing left over."""
    tree = nnx.restore_int_paths(serialization.msgpack_restore((folder / "flax_adapter.msgpack").read_bytes()))
    state = nnx.state(model, nnx.LoRAParam)
    made = jax.tree.map(np.shape, nnx.to_pure_dict(state), is_leaf=lambda leaf: hasattr(leaf, "shape"))
    assert jax.tree.map(np.shape, tree, is_leaf=lambda leaf: hasattr(leaf, "shape")) == made
    nnx.replace_by_pure_dict(state, tree)
    nnx.update(model, state)


def close(ours: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-5, rtol=1e-5)


def tree_of(model: nnx.Module) -> Any:
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)))


def randomise(model: nnx.Module) -> None:
    """lora_b starts at zero; a trained one does not."""
    state = nnx.state(model, nnx.LoRAParam)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    drawn = [0.1 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    nnx.update(model, jax.tree.unflatten(structure, drawn))


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 2, "lora_alpha": 5, "use_rslora": True},
        {"r": 2, "lora_alpha": 3, "rank_pattern": {"down": 5}, "alpha_pattern": {"down": 7}},
    ],
)
def test_what_we_write_makes_qwix_compute_what_peft_computes(config: dict[str, Any], tmp_path: Path) -> None:
    peft = peft_model(Layers(), target_modules=["up", "down"], **config)
    adapter = adapter_of(peft)
    report = adaptertools.write(adapter, tmp_path / "flax", format="flax-qwix")
    assert report.exact
    rules = []
    for name, module in modules_of(adapter).items():
        path = name.replace(".", "/")
        rules.append(qwix.LoraRule(module_path=path, rank=module.rank, alpha=module.scaling * module.rank))
        said = " ".join(report.notes)
        assert f"rank={module.rank}, alpha={module.scaling * module.rank:.17g}" in said
    x = inputs(5, 6)
    model = with_lora(NnxLayers(peft), jnp.asarray(x), rules)
    load(model, tmp_path / "flax")
    close(model(jnp.asarray(x)), output(peft, x))
    assert_identical(adapter, adaptertools.read(tmp_path / "flax"))


def test_factors_that_qwix_made_are_read_and_give_the_same_delta(tmp_path: Path) -> None:
    peft = peft_model(Layers(), target_modules=["up", "down"], r=2)
    x = jnp.asarray(inputs(5, 6))
    model = with_lora(NnxLayers(peft), x, [qwix.LoraRule(module_path=".*", rank=3, alpha=7.0)])
    randomise(model)
    (tmp_path / "lora.msgpack").write_bytes(serialization.to_bytes(tree_of(model)))
    with pytest.raises(MissingAlphaError, match="source-alpha"):
        adaptertools.read(tmp_path / "lora.msgpack")
    adapter = adaptertools.read(tmp_path / "lora.msgpack", alpha=7)
    assert adapter.origin is not None
    assert adapter.origin.format == "flax-qwix"
    plain = NnxLayers(peft)
    for index, layer in enumerate(plain.layers):
        for name in ("up", "down"):
            getattr(layer, name).kernel[...] += jnp.asarray(delta(adapter, f"layers.{index}.{name}"), jnp.float32)
    close(model(x), np.asarray(plain(x)))


STYLES = [("llama", "tunix-llama", K), ("gemma-kv", "tunix-gemma", K), ("gemma-qkv", "tunix-gemma", N)]


@pytest.mark.parametrize(("style", "naming", "kv_heads"), STYLES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared lora_A", "own lora_A"])
def test_einsum_and_fused_weights_compute_what_peft_computes(
    style: str, naming: str, kv_heads: int, shared: bool, tmp_path: Path
) -> None:
    peft = peft_model(Attentions(kv_heads), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], r=2, lora_alpha=6)
    if shared:
        for layer in peft.base_model.model.model.layers:
            for name in ("k_proj", "v_proj"):
                getattr(layer.self_attn, name).lora_A["default"].weight.data.copy_(
                    layer.self_attn.q_proj.lora_A["default"].weight.data
                )
    adapter = adapter_of(peft)
    report = adaptertools.write(adapter, tmp_path / "flax", format="flax-qwix", naming=naming, head_dim=H)
    assert report.exact
    fused = {"gemma-kv": 2, "gemma-qkv": 3}.get(style, 1)
    rank = 2 if shared else 2 * fused
    rules = [qwix.LoraRule(module_path=".*/(kv_einsum|qkv_einsum)", rank=rank, alpha=3.0 * rank)] if fused > 1 else []
    rules.append(qwix.LoraRule(module_path=".*", rank=2, alpha=6.0))
    x = inputs(1, 5, D)
    model = with_lora(NnxAttentions(peft, style), jnp.asarray(x), rules)
    load(model, tmp_path / "flax")
    expected = output(peft, x)
    with peft.disable_adapter():
        assert np.abs(expected - output(peft, x)).max() > 0.01
    close(model(jnp.asarray(x)), expected)
    assert_identical(adapter, adaptertools.read(tmp_path / "flax"))


@pytest.mark.parametrize(("style", "naming", "kv_heads"), STYLES)
def test_einsum_factors_that_qwix_made_are_read_under_hugging_face_names(
    style: str, naming: str, kv_heads: int, tmp_path: Path
) -> None:
    peft = peft_model(Attentions(kv_heads), target_modules=["q_proj"], r=2)
    x = jnp.asarray(inputs(1, 5, D))
    model = with_lora(NnxAttentions(peft, style), x, [qwix.LoraRule(module_path=".*", rank=3, alpha=5.0)])
    randomise(model)
    (tmp_path / "lora.msgpack").write_bytes(serialization.to_bytes(tree_of(model)))
    adapter = adaptertools.read(tmp_path / "lora.msgpack", alpha=5)
    assert adapter.origin is not None
    assert adapter.origin.options["naming"] == naming
    assert adapter.origin.options["head_dim"] == H
    assert len(adapter.modules) == 8
    merged = Attentions(kv_heads)
    with torch.no_grad():
        for module in adapter.modules:
            target = merged.get_submodule(module.target.parameter)
            target.weight.copy_(torch.from_numpy(base_weight(peft, module.target.parameter).T) + module.delta_weight())
    close(model(x), output(merged, np.array(x)))


def test_general_linear_layers_have_flat_factors(tmp_path: Path) -> None:
    """qwix flattens the axes of a dot product, so that DenseGeneral needs no head_dim."""

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.q = nnx.LinearGeneral(D, (N, H), use_bias=False, rngs=nnx.Rngs(0))
            self.o = nnx.LinearGeneral((N, H), D, axis=(-2, -1), use_bias=False, rngs=nnx.Rngs(1))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.o(self.q(x))

    adapter = Adapter(
        modules=tuple(
            LoraModule(
                target=Target(parameter=name), lora_A=torch.randn(2, n_in), lora_B=torch.randn(n_out, 2), alpha=6
            )
            for name, n_in, n_out in (("q", D, N * H), ("o", N * H, D))
        )
    )
    x = jnp.asarray(inputs(3, D))
    model = with_lora(Model(), x, [qwix.LoraRule(module_path=".*", rank=2, alpha=6.0)])
    load(model, write(adapter, tmp_path / "flax", "flax-qwix"))
    plain = Model()
    plain.q.kernel[...] += jnp.asarray(delta(adapter, "q").reshape(D, N, H), jnp.float32)
    plain.o.kernel[...] += jnp.asarray(delta(adapter, "o").reshape(N, H, D), jnp.float32)
    np.testing.assert_allclose(np.asarray(model(x)), np.asarray(plain(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_scanned_linen_layers_compute_what_the_single_layers_would(axis: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapter = Adapter(
        modules=tuple(
            LoraModule(
                target=Target(parameter=f"layers.{layer}.fc"),
                lora_A=torch.randn(2, 6),
                lora_B=torch.randn(6, 2),
                alpha=6,
            )
            for layer in range(3)
        )
    )
    folder = write(adapter, tmp_path / "flax", "flax-qwix", scan_axis=axis)
    ours = serialization.msgpack_restore((folder / "flax_adapter.msgpack").read_bytes())
    x = jnp.asarray(inputs(4, 6))
    model = qwix.apply_lora_to_model(
        LinenModel(axis), qwix.LoraProvider([qwix.LoraRule(module_path=".*", rank=2, alpha=6.0)])
    )
    params = model.init(jax.random.key(0), x)["params"]
    made = params["layers"]["fc"]
    for name in ("kernel_lora_a", "kernel_lora_b"):
        assert ours["layers"]["fc"][name].shape == made[name].shape
    kernels = np.asarray(made["kernel"])
    loaded = {"layers": {"fc": {"kernel": kernels, **ours["layers"]["fc"]}}}
    expected = np.asarray(x)
    for layer in range(3):
        kernel = np.take(kernels, layer, axis=axis)
        expected = expected + expected @ (kernel + delta(adapter, f"layers.{layer}.fc").astype(np.float32))
    np.testing.assert_allclose(np.asarray(model.apply({"params": loaded}, x)), expected, rtol=1e-4, atol=1e-5)
    assert_identical(adapter, adaptertools.read(folder))

    (tmp_path / "trained.msgpack").write_bytes(serialization.to_bytes({"params": loaded}))
    read = adaptertools.read(tmp_path / "trained.msgpack", alpha=6, ignore_other=True)
    assert_identical(adapter, read)


def test_a_stack_whose_axis_shapes_do_not_tell_asks_for_it(tmp_path: Path) -> None:
    adapter = Adapter(
        modules=tuple(
            LoraModule(
                target=Target(parameter=f"layers.{i}.fc"), lora_A=torch.randn(2, 2), lora_B=torch.randn(3, 2), alpha=2
            )
            for i in range(2)
        )
    )
    folder = write(adapter, tmp_path / "flax", "flax-qwix", scan_axis=1)
    assert_identical(adapter, adaptertools.read(folder))
    bare = tmp_path / "bare.msgpack"
    bare.write_bytes((folder / "flax_adapter.msgpack").read_bytes())
    with pytest.raises(ShapeError, match="scan_axis"):
        adaptertools.read(bare, alpha=2)
    assert_identical(adapter, adaptertools.read(bare, alpha=2, scan_axis=1))
    with pytest.raises(ShapeError):
        adaptertools.read(bare, alpha=2, scan_at="blocks")


def test_modules_of_different_scaling_that_share_a_leaf_are_folded(tmp_path: Path) -> None:
    modules = tuple(
        LoraModule(
            target=Target(parameter=f"model.layers.0.self_attn.{name}_proj"),
            lora_A=torch.ones(2, D) * 3,
            lora_B=torch.randn(K * H, 2),
            alpha=alpha,
        )
        for name, alpha in (("k", 4), ("v", 8))
    )
    adapter = Adapter(modules=modules)
    report = adaptertools.write(
        adapter, tmp_path / "flax", format="flax-qwix", naming="tunix-gemma", head_dim=H, fuse_qkv=False
    )
    assert "rank=2, alpha=2)" in report.notes[0]
    assert_identical(adapter, adaptertools.read(tmp_path / "flax"))
    bare = tmp_path / "bare.msgpack"
    bare.write_bytes((tmp_path / "flax" / "flax_adapter.msgpack").read_bytes())
    for name, module in modules_of(adaptertools.read(bare, alpha=2)).items():
        assert torch.equal(module.delta_weight(), modules_of(adapter)[name].delta_weight())


def test_alpha_that_maxtext_saved_in_the_checkpoint_is_used_and_its_rank_checked(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    tree = {"decoder": {"layers": {"mlp": {"wi_0": {"kernel_lora_a": np.ones((6, 2, 3), np.float32)}}}}}
    tree["decoder"]["layers"]["mlp"]["wi_0"]["kernel_lora_b"] = np.ones((3, 2, 5), np.float32)
    for rank in (3, 4):
        with ocp.CheckpointManager(tmp_path / str(rank)) as manager:
            manager.save(
                0,
                args=ocp.args.Composite(items=ocp.args.StandardSave(tree)),
                custom_metadata={"lora": {"lora_rank": rank, "lora_alpha": 12.0}},
            )
    adapter = adaptertools.read(tmp_path / "3" / "0" / "items")
    assert {module.alpha for module in adapter.modules} == {12.0}
    assert sorted(modules_of(adapter)) == [f"model.layers.{i}.mlp.gate_proj" for i in (0, 1)]
    with pytest.raises(adaptertools.AdapterToolsError, match="rank 3"):
        adaptertools.read(tmp_path / "4" / "0" / "items")
    assert adaptertools.read(tmp_path / "4" / "0" / "items", alpha=9).modules[0].alpha == 9


def test_alpha_of_a_neighbouring_adapter_config_is_used(tmp_path: Path) -> None:
    """MaxText's adapters from before qwix: one dotted key a factor, layers along axis 1, heads as axes of their own."""
    rng = np.random.default_rng(0)
    attention = {
        "query": (rng.normal(size=(D, 2, 3)), rng.normal(size=(3, 2, N, H))),
        "out": (rng.normal(size=(N, 2, H, 3)), rng.normal(size=(3, 2, D))),
    }
    tree = {
        name: {"lora_a.kernel": a.astype(np.float32), "lora_b.kernel": b.astype(np.float32)}
        for name, (a, b) in attention.items()
    }
    data = serialization.to_bytes({"params": {"decoder": {"layers": {"self_attention": tree}}}})
    (tmp_path / "lora.msgpack").write_bytes(data)
    with pytest.raises(MissingAlphaError):
        adaptertools.read(tmp_path / "lora.msgpack")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "r": 3}))
    adapter = adaptertools.read(tmp_path / "lora.msgpack")
    for layer in range(2):
        q = 2 * np.einsum("dr,rnh->dnh", attention["query"][0][:, layer], attention["query"][1][:, layer])
        o = 2 * np.einsum("nhr,rd->nhd", attention["out"][0][:, layer], attention["out"][1][:, layer])
        got_q = delta(adapter, f"model.layers.{layer}.self_attn.q_proj")
        got_o = delta(adapter, f"model.layers.{layer}.self_attn.o_proj")
        np.testing.assert_allclose(got_q.reshape(D, N, H), q, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got_o.reshape(N, H, D), o, rtol=1e-5, atol=1e-5)
