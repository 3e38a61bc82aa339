"""Models for the qwix tests: in PyTorch, and the same in nnx as tunix builds them; a scanned one in Linen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx
from flax_oracle import base_weight
from torch import nn

D, N, K, H = 8, 4, 2, 6
"""Features, query heads, key and value heads, size of a head."""


class NnxMlp(nnx.Module):
    def __init__(self, model: Any, prefix: str) -> None:
        for name in ("up", "down"):
            kernel = base_weight(model, prefix + name)
            linear = nnx.Linear(*kernel.shape, use_bias=False, rngs=nnx.Rngs(0))
            linear.kernel[...] = jnp.asarray(kernel)
            setattr(self, name, linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.relu(self.up(x)))


class NnxLayers(nnx.Module):
    def __init__(self, model: Any) -> None:
        self.layers = nnx.List([NnxMlp(model, f"layers.{index}.") for index in (0, 1)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Einsum(nnx.Module):
    """As tunix has it: one weight `w` and its equation."""

    def __init__(self, equation: str, w: np.ndarray) -> None:
        self.equation = equation
        self.w = nnx.Param(jnp.asarray(w))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum(self.equation, x, self.w[...])


class Attention(nn.Module):
    """The projections of an attention layer without the attention: q, k and v summed, then o."""

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(D, N * H, bias=False)
        self.k_proj = nn.Linear(D, kv_heads * H, bias=False)
        self.v_proj = nn.Linear(D, kv_heads * H, bias=False)
        self.o_proj = nn.Linear(N * H, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, H)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        mixed = q * (k * 2 + v).repeat_interleave(q.shape[-2] // k.shape[-2], dim=-2)
        output: torch.Tensor = self.o_proj(mixed.flatten(-2))
        return output


class Block(nn.Module):
    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(kv_heads)


class Attentions(nn.Module):
    """Two attention layers under Hugging Face's names."""

    def __init__(self, kv_heads: int = K) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Block(kv_heads), Block(kv_heads)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.model.layers:
            x = x + layer.self_attn(x)
        return x


class NnxAttention(nnx.Module):
    """The same in tunix's three ways: separate einsums (Llama), k and v fused, or all three fused (Gemma)."""

    def __init__(self, model: Any, prefix: str, style: str) -> None:
        weights = {name: base_weight(model, f"{prefix}.{name}_proj") for name in "qkvo"}
        q, k, v = (weights[name].reshape(D, -1, H) for name in "qkv")
        self.style = style
        if style == "llama":
            self.q_proj = Einsum("BTD,DNH->BTNH", q)
            self.k_proj = Einsum("BSD,DKH->BSKH", k)
            self.v_proj = Einsum("BSD,DKH->BSKH", v)
            self.o_proj = Einsum("BTNH,NHD->BTD", weights["o"].reshape(N, H, D))
            return
        self.attn_vec_einsum = Einsum("BTNH,NHD->BTD", weights["o"].reshape(N, H, D))
        heads_first = [weight.transpose(1, 0, 2) for weight in (q, k, v)]
        if style == "gemma-kv":
            self.q_einsum = Einsum("BTD,NDH->BTNH", heads_first[0])
            self.kv_einsum = Einsum("BSD,CKDH->CBSKH", np.stack(heads_first[1:]))
        else:
            self.qkv_einsum = Einsum("BTD,SNDH->SBTNH", np.stack(heads_first))

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.style == "llama":
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        elif self.style == "gemma-kv":
            q, (k, v) = self.q_einsum(x), self.kv_einsum(x)
        else:
            q, k, v = self.qkv_einsum(x)
        mixed = q * jnp.repeat(k * 2 + v, q.shape[-2] // k.shape[-2], axis=-2)
        return self.o_proj(mixed) if self.style == "llama" else self.attn_vec_einsum(mixed)


class NnxBlock(nnx.Module):
    def __init__(self, model: Any, index: int, style: str) -> None:
        self.attn = NnxAttention(model, f"model.layers.{index}.self_attn", style)


class NnxAttentions(nnx.Module):
    def __init__(self, model: Any, style: str) -> None:
        self.layers = nnx.List([NnxBlock(model, index, style) for index in (0, 1)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = x + layer.attn(x)
        return x


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return x + linen.Dense(6, use_bias=False, name="fc")(x), None


class LinenModel(linen.Module):
    axis: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scanned = linen.scan(LinenBlock, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)
        output: jax.Array = scanned(name="layers")(x, None)[0]
        return output
