"""A fixed adapter in real PEFT: the same logits as the one that it was made of."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import adaptertools

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

TOKENS = torch.tensor([[1, 7, 3, 30, 12, 5]])
SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 7}, "alpha_pattern": {"v_proj": 5}},
    "both": {"use_rslora": True, "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"k_proj": 1}},
    "one layer": {"layers_to_transform": [1]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj", "v_proj", "lm_head"]},
}
PASSES_EMBEDDINGS = ("vllm", "sglang")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    ).eval()


def trained(place: Path, **settings: Any) -> Tensor:
    """A PEFT adapter of random factors at this place, and the logits that it gives."""
    given: dict[str, Any] = {"r": 4, "lora_alpha": 11, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    model = get_peft_model(llama(), LoraConfig(**{**given, **settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the base model of the test has no name on the Hub
            model.save_pretrained(place, save_embedding_layers=False)
        logits: Tensor = model.eval()(TOKENS).logits
    return logits


def loaded(place: Path) -> Tensor:
    """The logits with the adapter at this place, of which every tensor has to be taken."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        model = PeftModel.from_pretrained(llama(), place)
    with torch.no_grad():
        logits: Tensor = model.eval()(TOKENS).logits
    return logits


CASES = [
    (consumer, name)
    for consumer in ("vllm", "sglang", "lorax", "tensorrt-llm")
    for name in SETTINGS
    if name != "embeddings" or consumer in PASSES_EMBEDDINGS
]


@pytest.mark.parametrize(("consumer", "name"), CASES)
def test_the_fixed_adapter_gives_the_same_logits_in_peft(consumer: str, name: str, tmp_path: Path) -> None:
    expected = trained(tmp_path / "trained", **SETTINGS[name])
    with torch.no_grad():
        untouched = llama()(TOKENS).logits
    fixed = adaptertools.fix(tmp_path / "trained", tmp_path / "fixed", consumer)
    assert float((expected - untouched).abs().max()) > 0.1
    assert torch.allclose(loaded(tmp_path / "fixed"), expected, rtol=0, atol=1e-5)
    assert fixed.relative_error < 1e-7
    assert adaptertools.check(tmp_path / "fixed", consumer).passes
