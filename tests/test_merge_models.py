"""Merges into models whose names, experts and ties differ between memory and disk: the logits of the adapter model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_cases
import pytest
import torch
import transformers
from merge_dense import execute
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

import adaptertools
from adaptertools.errors import UnsupportedFeatureError
from adaptertools.merging.plan import plan_merge

SIZES = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 32, "max_position_embeddings": 32}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
Build = Callable[[], transformers.PreTrainedModel]


def build(name: str, **config: Any) -> Build:
    """A model by the name of its class, and of its configuration before `For`."""
    kind = getattr(transformers, name)
    return lambda: kind(kind.config_class(**config))


def llava() -> transformers.PreTrainedModel:
    text = transformers.LlamaConfig(**TEXT)
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=8, patch_size=4, projection_dim=16)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=31)
    return transformers.LlavaForConditionalGeneration(config)


BERT = build("BertForMaskedLM", **TEXT)
ROBERTA = build("RobertaForMaskedLM", **TEXT)
NEOX = build("GPTNeoXForCausalLM", **TEXT)
TIED_NEOX = build("GPTNeoXForCausalLM", **TEXT, tie_word_embeddings=True)
GPT2 = build("GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32)
DISTILBERT = build("DistilBertForMaskedLM", dim=16, hidden_dim=12, n_layers=2, n_heads=2, vocab_size=32)
T5 = build("T5ForConditionalGeneration", d_model=16, d_ff=12, d_kv=4, num_layers=2, num_heads=2, vocab_size=32)
BART = build(
    "BartForConditionalGeneration",
    **{"d_model": 16, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "encoder_layers": 2, "decoder_layers": 2},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 32},
)
MIXTRAL = build("MixtralForCausalLM", **TEXT, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)

CASES: dict[str, tuple[Build, dict[str, Any]]] = {
    "mixtral's experts, saved one by one": (MIXTRAL, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "the text of an image model": (llava, {"target_modules": r".*language_model.*q_proj"}),
    "a head of another name on disk": (NEOX, {"target_modules": ["lm_head", "dense"]}),
    "t5": (T5, {"target_modules": ["q", "v", "wi"]}),
    "bart": (BART, {"target_modules": ["q_proj", "fc1"]}),
}
UNTIED: dict[str, tuple[Build, dict[str, Any]]] = {
    "bert, the embedding": (BERT, {"target_modules": ["word_embeddings"]}),
    "bert, the head": (BERT, {"target_modules": ["decoder"]}),
    "roberta, the head": (ROBERTA, {"target_modules": ["lm_head.decoder"]}),
    "distilbert, the embedding": (DISTILBERT, {"target_modules": ["word_embeddings"]}),
    "neox, the embedding": (TIED_NEOX, {"target_modules": ["embed_in"]}),
    "gpt2, the embedding": (GPT2, {"target_modules": ["wte", "c_proj"]}),
    "gpt2, a trained embedding": (GPT2, {"target_modules": ["c_proj"], "modules_to_save": ["wte"]}),
}


def logits(model: Any) -> Tensor:
    tokens = torch.arange(10).reshape(2, 5)
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        result: Tensor = model(input_ids=tokens, **decoder).logits
    return result


def save(case: tuple[Build, dict[str, Any]], folder: Path) -> tuple[type, Tensor, Tensor]:
    """Base and adapter on disk; the model's class, and what base and adapter model give."""
    torch.manual_seed(0)
    model = case[0]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "base", max_shard_size="8KB")
    before = logits(model)
    with peft_cases.quiet():
        adapted = get_peft_model(model, LoraConfig(**case[1], r=2)).eval()
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(folder / "adapter")
    return type(model), before, logits(adapted)


@pytest.mark.parametrize("name", [*CASES, *UNTIED])
def test_the_merged_model_gives_the_logits_of_the_adapter_model(name: str, tmp_path: Path) -> None:
    kind, before, wanted = save((CASES | UNTIED)[name], tmp_path)
    adapter = adaptertools.read(tmp_path / "adapter", base=tmp_path / "base")
    if name in UNTIED:
        with pytest.raises(UnsupportedFeatureError, match="--untie"):
            plan_merge(tmp_path / "base", [adapter])
    plan = plan_merge(tmp_path / "base", [adapter], untie=name in UNTIED)
    assert not any("lacks" in note for note in plan.notes)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text(json.dumps({**plan.base.config, **plan.config}))
    tensors = {key: tensor.contiguous() for key, tensor in execute(plan).items()}
    save_file(tensors, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    merged, report = kind.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(logits(merged.eval()), wanted, rtol=0, atol=1e-5)
    assert (wanted - before).abs().max() > 1e-3


def test_a_head_that_scales_with_its_tie_is_not_untied(tmp_path: Path) -> None:
    save((T5, {"target_modules": ["lm_head"]}), tmp_path)
    with pytest.raises(UnsupportedFeatureError, match="cannot be untied"):
        plan_merge(tmp_path / "base", [adaptertools.read(tmp_path / "adapter")], untie=True)
