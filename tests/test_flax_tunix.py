"""The format flax-qwix against tunix itself: a Hugging Face model under PEFT and tunix's own model under qwix agree."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import torch
from flax import nnx, serialization
from flax_oracle import adapter_of, assert_identical, modules_of, peft_model
from jax_libraries import require, tunix_module
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import adaptertools

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the warnings are those of tunix and qwix
require("tunix", "jaxtyping", "einops")

HEAD_DIM, TOKENS = 8, 7
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama() -> tuple[PreTrainedModel, Any, Any]:
    """tunix applies a rope_theta of 1e6, whatever its configuration says."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=HEAD_DIM, rms_norm_eps=1e-5, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )  # fmt: skip
    config = tunix_module("models.llama3.model").ModelConfig(
        num_layers=2, vocab_size=32, embed_dim=16, hidden_dim=24, num_heads=4, head_dim=HEAD_DIM, num_kv_heads=2,
        rope_theta=1_000_000, norm_eps=1e-5,
    )  # fmt: skip
    return model, config, tunix_module("models.llama3.params")


def gemma(kv_heads: int) -> tuple[PreTrainedModel, Any, Any]:
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=kv_heads, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM, sliding_window=64,
        )
    )  # fmt: skip
    config = tunix_module("models.gemma3.model").ModelConfig(
        num_layers=6, num_embed=32, embed_dim=16, hidden_dim=24, num_heads=4, head_dim=HEAD_DIM, num_kv_heads=kv_heads,
        sliding_window_size=64, local_base_frequency=10_000, global_base_frequency=1_000_000, param_dtype=jnp.float32,
    )  # fmt: skip
    return model, config, tunix_module("models.gemma3.params_safetensors")


MODELS = {
    "llama": (llama, "tunix-llama"),
    "gemma3 with k and v fused": (lambda: gemma(2), "tunix-gemma"),
    "gemma3 with q, k and v fused": (lambda: gemma(4), "tunix-gemma"),
}


def tunix_logits(model: nnx.Module, tokens: np.ndarray) -> np.ndarray:
    positions = jnp.arange(TOKENS)[None]
    mask = jnp.tril(jnp.ones((1, TOKENS, TOKENS), bool))
    logits, _ = model(jnp.asarray(tokens), positions, None, mask)
    return np.asarray(logits, np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_tunix_under_qwix_gives_the_logits_of_hugging_face_under_peft(name: str, tmp_path: Path) -> None:
    build, naming = MODELS[name]
    torch.manual_seed(0)
    hugging_face, config, params = build()
    for parameter in hugging_face.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3)
    hugging_face.eval().save_pretrained(tmp_path / "base")
    tokens = np.random.default_rng(0).integers(3, 32, (1, TOKENS))
    with torch.no_grad():
        plain = hugging_face(torch.from_numpy(tokens)).logits.numpy()

    with jax.default_matmul_precision("highest"):
        base = params.create_model_from_safe_tensors(str(tmp_path / "base"), config, None, dtype=jnp.float32)
        np.testing.assert_allclose(tunix_logits(base, tokens), plain, atol=5e-5, rtol=1e-4)

        peft = peft_model(hugging_face, r=2, lora_alpha=6, target_modules=TARGETS)
        adapter = adapter_of(peft)
        with torch.no_grad():
            expected = peft(torch.from_numpy(tokens)).logits.numpy()
        assert np.abs(expected - plain).max() > 0.1
        folder = tmp_path / "flax"
        adaptertools.write(adapter, folder, format="flax-qwix", naming=naming, head_dim=HEAD_DIM)
        assert_identical(adapter, adaptertools.read(folder))

        tree = serialization.msgpack_restore((folder / "flax_adapter.msgpack").read_bytes())
        model = qwix.apply_lora_to_model(
            base, qwix.LoraProvider(rules(tree)), **base.get_model_input(), rngs=nnx.Rngs(0)
        )
        state = nnx.state(model, nnx.LoRAParam)
        nnx.replace_by_pure_dict(state, nnx.restore_int_paths(tree))
        nnx.update(model, state)
        np.testing.assert_allclose(tunix_logits(model, tokens), expected, atol=5e-5, rtol=1e-4)

    saved = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)))
    (tmp_path / "tunix.msgpack").write_bytes(serialization.to_bytes(saved))
    read = adaptertools.read(tmp_path / "tunix.msgpack", alpha=6)
    assert modules_of(read).keys() == modules_of(adapter).keys()
    assert read.origin is not None
    assert read.origin.options["naming"] == naming


def rules(tree: Any, path: str = "") -> list[qwix.LoraRule]:
    """One rule a leaf: fused weights have a rank of their own, and the scaling 3 of every module here."""
    found = []
    for key, child in tree.items():
        if isinstance(child, dict):
            found += rules(child, f"{path}/{key}" if path else key)
        elif key.endswith("_lora_a"):
            found.append(qwix.LoraRule(module_path=path, rank=child.shape[-1], alpha=3.0 * child.shape[-1]))
    return found
