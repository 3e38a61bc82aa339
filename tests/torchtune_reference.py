"""torchtune's mathematics written out anew, as its source describes them: decoders, their weights, and raw adapters.

Rows are reordered by index, one by one, and the decoder runs in torchtune's own order of rows and under its own names,
so nothing here shares a formula with the reader. Read in pytorch/torchtune bd2a0fc: modules/peft/lora.py and dora.py,
modules/position_embeddings.py, models/qwen2/_positional_embeddings.py, models/convert_weights.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}
"""Hugging Face's name of a layer's module, and torchtune's."""


def paired(rows: Tensor, head_dim: int) -> Tensor:
    """Rows in Hugging Face's order as torchtune has them: i and i + head_dim / 2 of a head stand side by side."""
    out = torch.empty_like(rows)
    for head in range(rows.shape[0] // head_dim):
        for pair in range(head_dim // 2):
            for side in range(2):
                out[head * head_dim + 2 * pair + side] = rows[head * head_dim + side * (head_dim // 2) + pair]
    return out


def wrongly_exported(rows: Tensor, head_dim: int) -> Tensor:
    """The rows of lora_b as torchtune's export to PEFT orders them, whatever the family: `paired` undone."""
    out = torch.empty_like(rows)
    for head in range(rows.shape[0] // head_dim):
        for pair in range(head_dim // 2):
            for side in range(2):
                out[head * head_dim + side * (head_dim // 2) + pair] = rows[head * head_dim + 2 * pair + side]
    return out


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder of the kind of Llama or Qwen 2 with an adapter, in torchtune's order of rows.

    `pairs`: the rotary embedding turns neighbouring rows, as torchtune's Llama has it; else rows half a head apart.
    """

    weights: Mapping[str, Tensor]
    adapter: Mapping[str, Tensor]
    scaling: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    theta: float
    eps: float
    pairs: bool

    def logits(self, ids: Tensor) -> Tensor:
        hidden = self.weights["tok_embeddings.weight"][ids]
        for layer in range(self.layers):
            home = f"layers.{layer}"
            hidden = hidden + self._attention(f"{home}.attn", self._norm(f"{home}.sa_norm", hidden))
            x = self._norm(f"{home}.mlp_norm", hidden)
            gate = torch.nn.functional.silu(self._linear(f"{home}.mlp.w1", x))
            hidden = hidden + self._linear(f"{home}.mlp.w2", gate * self._linear(f"{home}.mlp.w3", x))
        return self._linear("output", self._norm("norm", hidden))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        out = x @ weight.T + (0 if bias is None else bias)
        if f"{name}.lora_a.weight" not in self.adapter:
            return out
        a, b = self.adapter[f"{name}.lora_a.weight"], self.adapter[f"{name}.lora_b.weight"]
        added = self.scaling * ((x @ a.T) @ b.T)
        magnitude = self.adapter.get(f"{name}.magnitude")
        if magnitude is None:
            return out + added
        strength = magnitude / torch.linalg.norm(weight + self.scaling * (b @ a), dim=1)
        return out + (strength - 1) * out + strength * added

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weights[f"{name}.scale"]

    def _attention(self, name: str, x: Tensor) -> Tensor:
        length = x.shape[0]
        q, k, v = (
            self._linear(f"{name}.{part}", x).view(length, -1, self.head_dim) for part in ("q_proj", "k_proj", "v_proj")
        )
        q, k = self._turn(q), self._turn(k)
        k, v = (each.repeat_interleave(self.heads // self.kv_heads, dim=1) for each in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / self.head_dim**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)
        return self._linear(f"{name}.output_proj", mixed.reshape(length, -1))

    def _turn(self, x: Tensor) -> Tensor:
        half = self.head_dim // 2
        angles = torch.outer(
            torch.arange(x.shape[0]).to(x), self.theta ** (-torch.arange(half).to(x) * 2 / self.head_dim)
        )[:, None]
        one, other = (x[..., 0::2], x[..., 1::2]) if self.pairs else (x[..., :half], x[..., half:])
        turned = (one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin())
        return torch.stack(turned, -1).flatten(-2) if self.pairs else torch.cat(turned, -1)


def weights_of(state: Mapping[str, Tensor], layers: int, head_dim: int, *, pairs: bool) -> dict[str, Tensor]:
    """Hugging Face's weights under torchtune's names and in its order of rows."""
    found = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.scale": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(layers):
        source, target = f"model.layers.{layer}", f"layers.{layer}"
        found[f"{target}.sa_norm.scale"] = state[f"{source}.input_layernorm.weight"]
        found[f"{target}.mlp_norm.scale"] = state[f"{source}.post_attention_layernorm.weight"]
        for theirs, ours in NAMES.items():
            for part in ("weight", "bias"):
                tensor = state.get(f"{source}.{theirs}.{part}")
                if tensor is not None:
                    turned = pairs and ours in ("attn.q_proj", "attn.k_proj")
                    found[f"{target}.{ours}.{part}"] = paired(tensor, head_dim) if turned else tensor
    return found


def adapter_for(
    weights: Mapping[str, Tensor], modules: tuple[str, ...], rank: int, scaling: float, *, dora: bool, seed: int = 0
) -> dict[str, Tensor]:
    """A raw adapter in torchtune's order, as after training."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for key, weight in weights.items():
        name = key.removesuffix(".weight")
        if name == key or not name.endswith(modules):
            continue
        a = torch.randn(rank, weight.shape[1], generator=generator) * 0.2
        b = torch.randn(weight.shape[0], rank, generator=generator) * 0.2
        made |= {f"{name}.lora_a.weight": a, f"{name}.lora_b.weight": b}
        if dora:
            norm = torch.linalg.norm(weight + scaling * (b @ a), dim=1)
            made[f"{name}.magnitude"] = norm * (1 + 0.3 * torch.randn(norm.shape, generator=generator))
    return made
