"""The format flax-gemma against the gemma library itself: a whole transformer block under gm.nn's LoRA wrappers."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import serialization
from flax_oracle import assert_identical, delta, modules_of, write
from jax_libraries import gemma_modules, require

import adaptertools
from adaptertools.adapter import Adapter, LoraModule, Target

pytestmark = pytest.mark.slow
require("gemma", "einops")

D, N, H, F, RANK = 8, 4, 6, 10, 2
"""Features, heads, size of a head, hidden features."""


def block(kv_heads: int, transposed: bool) -> Any:
    modules, _ = gemma_modules()
    return modules.Block(
        num_heads=N,
        num_kv_heads=kv_heads,
        embed_dim=D,
        head_dim=H,
        hidden_dim=F,
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        attn_type=modules.AttentionType.GLOBAL,
        query_pre_attn_scalar=H**-0.5,
        transpose_gating_einsum=transposed,
    )


def arguments() -> tuple[Any, ...]:
    x = np.random.default_rng(0).normal(size=(1, 5, D)).astype(np.float32)
    return jnp.asarray(x), jnp.arange(5)[None], None, jnp.tril(jnp.ones((1, 5, 5), bool))


def with_lora(model: Any) -> Any:
    """The model as gm.nn.LoRA runs it."""
    from gemma import peft

    _, lora = gemma_modules()
    replace = functools.partial(lora._replace_by_lora, rank=RANK, dtype=jnp.float32, verbose=False)
    return model, peft.ModuleInterceptor(replace)


def sizes(kv_heads: int) -> dict[str, tuple[int, int]]:
    return {
        "self_attn.q_proj": (D, N * H),
        "self_attn.k_proj": (D, kv_heads * H),
        "self_attn.v_proj": (D, kv_heads * H),
        "self_attn.o_proj": (N * H, D),
        "mlp.gate_proj": (D, F),
        "mlp.up_proj": (D, F),
        "mlp.down_proj": (F, D),
    }


def merged(params: Any, adapter: Adapter, kv_heads: int, transposed: bool) -> Any:
    """The base weights plus ΔW, put together from Hugging Face's modules by hand."""
    deltas = {name: delta(adapter, f"model.layers.0.{name}").astype(np.float32) for name in sizes(kv_heads)}
    q, k, v = (deltas[f"self_attn.{name}_proj"].reshape(D, -1, H).transpose(1, 0, 2) for name in "qkv")
    attn = dict(params["attn"])
    if kv_heads == N:
        attn["qkv_einsum"] = {"w": attn["qkv_einsum"]["w"] + np.stack([q, k, v])}
    else:
        attn["q_einsum"] = {"w": attn["q_einsum"]["w"] + q}
        attn["kv_einsum"] = {"w": attn["kv_einsum"]["w"] + np.stack([k, v])}
    attn["attn_vec_einsum"] = {"w": attn["attn_vec_einsum"]["w"] + deltas["self_attn.o_proj"].reshape(N, H, D)}
    gating = np.stack([deltas["mlp.gate_proj"], deltas["mlp.up_proj"]])
    mlp = {
        "gating_einsum": params["mlp"]["gating_einsum"] + (gating.transpose(0, 2, 1) if transposed else gating),
        "linear": params["mlp"]["linear"] + deltas["mlp.down_proj"],
    }
    return {**params, "attn": attn, "mlp": mlp}


def base_params(model: Any) -> Any:
    params = model.init(jax.random.key(0), *arguments())["params"]
    return jax.tree.map(lambda leaf: np.asarray(leaf) * (0.3 if leaf.ndim > 1 else 1), params)


@pytest.mark.parametrize("kv_heads", [1, 2, N])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_we_write_makes_gemma_compute_what_merged_weights_compute(
    kv_heads: int, transposed: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    modules: dict[str, LoraModule] = {}
    for name, (n_in, n_out) in sizes(kv_heads).items():
        shared = {"self_attn.v_proj": "self_attn.k_proj", "mlp.up_proj": "mlp.gate_proj"}.get(name)
        shared = "self_attn.q_proj" if kv_heads == N and name[:12] in ("self_attn.k_", "self_attn.v_") else shared
        lora_A = modules[shared].lora_A if shared else torch.randn(RANK, n_in)
        modules[name] = LoraModule(
            target=Target(parameter=f"model.layers.0.{name}"),
            lora_A=lora_A,
            lora_B=torch.randn(n_out, RANK) * 0.2,
            alpha=4,
        )
    adapter = Adapter(modules=tuple(modules.values()))
    folder = write(adapter, tmp_path / "flax", "flax-gemma", naming="gemma", head_dim=H)
    assert_identical(adapter, adaptertools.read(folder))
    ours = serialization.msgpack_restore((folder / "flax_adapter.msgpack").read_bytes())["layer_0"]

    from gemma import peft

    params = base_params(block(kv_heads, transposed))
    model, interceptor = with_lora(block(kv_heads, transposed))
    with interceptor:
        made = model.init(jax.random.key(1), *arguments())["params"]
    _, lora = peft.split_params(made)
    shapes = functools.partial(jax.tree.map, np.shape)
    assert shapes(ours) == shapes(lora)
    with interceptor:
        _, output = model.apply({"params": peft.merge_params(params, ours)}, *arguments())
    _, expected = block(kv_heads, transposed).apply(
        {"params": merged(params, adapter, kv_heads, transposed)}, *arguments()
    )
    _, untouched = block(kv_heads, transposed).apply({"params": params}, *arguments())
    assert np.abs(np.asarray(expected) - np.asarray(untouched)).max() > 0.05
    np.testing.assert_allclose(np.asarray(output), np.asarray(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [2, N])
def test_factors_that_gemma_made_are_read_under_hugging_face_names(kv_heads: int, tmp_path: Path) -> None:
    from gemma import peft

    model, interceptor = with_lora(block(kv_heads, False))
    with interceptor:
        _, lora = peft.split_params(model.init(jax.random.key(1), *arguments())["params"])
    leaves, structure = jax.tree.flatten(lora)
    drawn = [0.2 * jax.random.normal(jax.random.key(index), leaf.shape) for index, leaf in enumerate(leaves)]
    lora = jax.tree.unflatten(structure, drawn)
    (tmp_path / "lora.msgpack").write_bytes(serialization.to_bytes({"params": {"layer_0": lora}}))
    adapter = adaptertools.read(tmp_path / "lora.msgpack")
    assert adapter.origin is not None
    assert adapter.origin.format == "flax-gemma"
    assert set(modules_of(adapter)) == {f"model.layers.0.{name}" for name in sizes(kv_heads)}
    params = base_params(block(kv_heads, False))
    with interceptor:
        _, output = model.apply({"params": peft.merge_params(params, lora)}, *arguments())
    _, expected = block(kv_heads, False).apply({"params": merged(params, adapter, kv_heads, False)}, *arguments())
    np.testing.assert_allclose(np.asarray(output), np.asarray(expected), atol=1e-5, rtol=1e-5)
