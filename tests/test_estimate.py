"""The size of an adapter by its base model's headers, held against the trainable parameters of real PEFT."""

import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from peft_cases import quiet
from safetensors.torch import load_file, save_file
from torch import nn

import adaptertools
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.errors import DamagedFileError, OptionError, SourceNotFoundError, UnsupportedFeatureError
from adaptertools.operations.estimate import Estimate

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
"""No two of hidden, intermediate and vocabulary size are alike."""

TOKENS = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def model(config: type, architecture: type, **fields: Any) -> Callable[[], nn.Module]:
    return lambda: architecture(config(**{**SMALL, **fields}))


def vision() -> nn.Module:
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, **TOKENS}
    return hf.CLIPModel(
        hf.CLIPConfig(text_config=text, vision_config={**tower, "image_size": 8, "patch_size": 4}, projection_dim=8)
    )


ENCODER_DECODER = {
    "d_model": 16,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_start_token_id": 1,
    **TOKENS,
}

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **TOKENS}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": model(hf.LlamaConfig, hf.LlamaForCausalLM, num_key_value_heads=1),
    "llama, tied": model(hf.LlamaConfig, hf.LlamaForCausalLM, tie_word_embeddings=True),
    "mistral": model(hf.MistralConfig, hf.MistralForCausalLM, num_key_value_heads=1, head_dim=8),
    "qwen2": model(hf.Qwen2Config, hf.Qwen2ForCausalLM, num_key_value_heads=1),
    "qwen3": model(hf.Qwen3Config, hf.Qwen3ForCausalLM, num_key_value_heads=1, head_dim=8),
    "gemma2": model(hf.Gemma2Config, hf.Gemma2ForCausalLM, num_key_value_heads=1, head_dim=8),
    "phi3": model(hf.Phi3Config, hf.Phi3ForCausalLM, num_key_value_heads=1),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt2, without head": lambda: hf.GPT2Model(hf.GPT2Config(**GPT2)),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**GPT2, rotary_dim=4)),
    "gpt_neox": model(hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM),
    "opt": model(hf.OPTConfig, hf.OPTForCausalLM, ffn_dim=24, word_embed_proj_dim=8),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, **TOKENS)),
    "falcon": model(hf.FalconConfig, hf.FalconForCausalLM),
    "bert": model(hf.BertConfig, hf.BertForMaskedLM),
    "bert, without head": model(hf.BertConfig, hf.BertModel),
    "roberta": model(hf.RobertaConfig, hf.RobertaForMaskedLM),
    "albert": model(hf.AlbertConfig, hf.AlbertForMaskedLM, embedding_size=8),
    "electra": model(hf.ElectraConfig, hf.ElectraForMaskedLM, embedding_size=8),
    "deberta-v2": model(
        hf.DebertaV2Config,
        hf.DebertaV2ForMaskedLM,
        relative_attention=True,
        position_buckets=4,
        max_relative_positions=8,
        pos_att_type=["p2c", "c2p"],
    ),
    "distilbert": lambda: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=32, **TOKENS)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=1, **TOKENS)
    ),
    "t5 v1.1": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=1,
            **TOKENS,
        )
    ),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**ENCODER_DECODER)),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**ENCODER_DECODER, max_source_positions=8, max_target_positions=8, num_mel_bins=4)
    ),
    "vit, with classes": model(hf.ViTConfig, hf.ViTForImageClassification, image_size=8, patch_size=4),
    "clip": vision,
    "gpt_oss": model(hf.GptOssConfig, hf.GptOssForCausalLM, num_local_experts=4, head_dim=8, num_key_value_heads=1),
    "granitemoe": model(hf.GraniteMoeConfig, hf.GraniteMoeForCausalLM, num_local_experts=4),
    "jetmoe": model(hf.JetMoeConfig, hf.JetMoeForCausalLM, kv_channels=8, num_key_value_heads=2, num_local_experts=4),
    "llama4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **SMALL,
            intermediate_size_mlp=20,
            num_key_value_heads=1,
            head_dim=8,
            num_local_experts=4,
            interleave_moe_layer_step=1,
        )
    ),
}

FUSED_BY_TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": model(hf.MixtralConfig, hf.MixtralForCausalLM, num_local_experts=4, num_key_value_heads=1),
    "qwen3_moe": model(hf.Qwen3MoeConfig, hf.Qwen3MoeForCausalLM, num_experts=4, moe_intermediate_size=12, head_dim=8),
    "qwen2_moe": model(
        hf.Qwen2MoeConfig,
        hf.Qwen2MoeForCausalLM,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
    ),
}
"""Models whose file has one weight per expert, and which transformers 5 holds as stacks of them."""


def saved(made: nn.Module, folder: Path) -> Path:
    made.save_pretrained(folder)
    return folder


def adapted(made: nn.Module, **config: Any) -> nn.Module:
    """The model with LoRA of rank 4 by PEFT."""
    with quiet():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return get_peft_model(made, LoraConfig(r=4, **config))


def lora_parameters(made: nn.Module, **config: Any) -> int:
    """The trainable parameters that PEFT gives the model: those of LoRA, without heads that it trains whole."""
    named = adapted(made, **config).named_parameters()
    return sum(p.numel() for name, p in named if p.requires_grad and "lora_" in name)


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_is_what_peft_trains(name: str, tmp_path: Path) -> None:
    made = MODELS[name]()
    found = adaptertools.estimate(saved(made, tmp_path), ranks=4)
    assert found.model_parameters == made.num_parameters()
    assert found.parameters(4) == lora_parameters(made, target_modules="all-linear")


TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "qwen2": ["model.layers.0.self_attn.k_proj", "mlp.down_proj"],
    "llama, tied": ["embed_tokens", "o_proj"],
    "t5": ["q", "v"],
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "bert": ["query", "value", "word_embeddings"],
    "distilbert": ["q_lin"],
    "vit, with classes": ["projection", "classifier"],
    "whisper": ["conv1", "conv2", "k_proj"],
    "llama4": ["router", "down_proj"],
}


@pytest.mark.parametrize("name", TARGETS)
def test_named_targets_are_what_peft_trains(name: str, tmp_path: Path) -> None:
    made = MODELS[name]()
    found = adaptertools.estimate(saved(made, tmp_path), ranks=[4, 8], targets=TARGETS[name])
    assert found.parameters(4) == lora_parameters(made, target_modules=TARGETS[name])
    assert found.parameters(8) == 2 * found.parameters(4)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gpt_oss", ["experts.gate_up_proj"]),
        ("gpt_oss", ["experts.down_proj", "mlp.router.weight", "experts.gate_up_proj_bias"]),
        ("llama4", ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]),
    ],
)
def test_bare_parameters_count_as_target_parameters_of_peft(name: str, targets: list[str], tmp_path: Path) -> None:
    made = MODELS[name]()
    found = adaptertools.estimate(saved(made, tmp_path), ranks=4, targets=targets)
    assert {row.kind for row in found.rows} == {"parameter"}
    assert found.parameters(4) == lora_parameters(made, target_modules=[], target_parameters=targets)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("name", FUSED_BY_TRANSFORMERS)
def test_experts_count_as_they_are_stored_and_the_note_says_what_peft_makes_of_them(name: str, tmp_path: Path) -> None:
    made = FUSED_BY_TRANSFORMERS[name]()
    found = adaptertools.estimate(saved(made, tmp_path), ranks=4)
    assert found.model_parameters == made.num_parameters()
    assert any("experts and their router count as they are stored" in note for note in found.notes)
    stored = Checkpoint.open(tmp_path).shapes
    per_expert = [shape for name, shape in stored.items() if ".experts." in name]
    assert {len(shape) for shape in per_expert} == {2}
    experts = 4 * sum(map(sum, per_expert))
    router = 2 * 4 * (4 + 16)
    trained = lora_parameters(made, target_modules="all-linear")
    if name == "qwen2_moe":
        assert trained == found.parameters(4) - experts - router
    else:
        intermediate = {"mixtral": 24, "qwen3_moe": 12}[name]
        assert trained == found.parameters(4) + 2 * 4 * (2 * 4 * intermediate)


@pytest.mark.parametrize("architecture", [hf.LlamaForSequenceClassification, hf.RobertaForSequenceClassification])
def test_the_head_of_a_sequence_classifier_is_left_out_as_in_peft(architecture: type, tmp_path: Path) -> None:
    made = architecture(architecture.config_class(**SMALL))
    found = adaptertools.estimate(saved(made, tmp_path), ranks=4)
    classifier = adapted(made, target_modules="all-linear", task_type="SEQ_CLS")
    trained = {name: p.numel() for name, p in classifier.named_parameters() if p.requires_grad}
    assert found.parameters(4) == sum(size for name, size in trained.items() if "lora_" in name)
    head = sum(size for name, size in trained.items() if "lora_" not in name)
    assert head > 0
    assert any(f"whole: {head:,} parameters" in note for note in found.notes)


def test_the_bytes_are_those_of_the_tensors_that_peft_saves(tmp_path: Path) -> None:
    made = MODELS["mistral"]()
    found = adaptertools.estimate(saved(made, tmp_path / "base"), ranks=4)
    adapted(made, target_modules="all-linear").save_pretrained(tmp_path / "adapter")
    adapter = adaptertools.read(tmp_path / "adapter")
    nbytes = found.to_json()["total"]["ranks"][0]["nbytes"]
    assert nbytes["f32"] == sum(tensor.nbytes for tensor in adapter.named_tensors.values())
    assert nbytes["f16"] == nbytes["bf16"] == nbytes["f32"] // 2


@pytest.mark.parametrize("name", ["llama, tied", "gemma2", "gpt2", "t5", "opt", "bart"])
def test_a_head_that_is_tied_and_not_in_the_file_counts_as_peft_adapts_it(name: str, tmp_path: Path) -> None:
    made = MODELS[name]()
    base = Checkpoint.open(saved(made, tmp_path / "base"))
    assert not any("lm_head.weight" in stored for stored in base.shapes)
    found = adaptertools.estimate(base, ranks=4, targets=["lm_head"])
    (row,) = found.rows
    assert (row.name, row.kind, row.modules) == ("lm_head", "head", 1)
    assert found.notes[0] == "lm_head is tied to the embedding and not in the file; it counts as PEFT adapts it"
    assert found.model_parameters == made.num_parameters()
    attention = "q" if name == "t5" else "c_attn" if name == "gpt2" else "q_proj"
    both = adaptertools.estimate(base, ranks=4, targets=["lm_head", attention, "lm_head"])
    assert [note for note in both.notes if "is tied" in note] == [found.notes[0]]
    assert found.parameters(4) == lora_parameters(made, target_modules=["lm_head"])
    assert both.parameters(4) == lora_parameters(MODELS[name](), target_modules=["lm_head", attention])
    with quiet():
        adapted(MODELS[name](), target_modules=["lm_head"]).save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("beside the factors" in note for note in found.notes) == any("base_layer" in key for key in stored)


@pytest.mark.parametrize("name", ["gpt2, without head", "bert, without head", "clip", "llama"])
def test_a_model_without_a_tied_head_has_none(name: str, tmp_path: Path) -> None:
    base = Checkpoint.open(saved(MODELS[name](), tmp_path))
    shapes = {key: shape for key, shape in base.shapes.items() if not key.startswith("lm_head")}
    with pytest.raises(OptionError, match="'lm_head' matches no weight"):
        adaptertools.estimate(checkpoint(shapes, config=dict(base.config)), ranks=4, targets=["lm_head"])


HIDDEN, KEYS, MLP, VOCABULARY, LAYERS = 4096, 1024, 14336, 128256, 32
LLAMA_8B = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCABULARY, HIDDEN),
} | {
    f"model.layers.{layer}.{name}.weight": shape
    for layer in range(LAYERS)
    for name, shape in {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEYS, HIDDEN),
        "self_attn.v_proj": (KEYS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (MLP, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }.items()
}
"""Llama-3.1-8B: the names and shapes of its weights."""


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file in bf16 with a true header, and a hole where the weights would be."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_llama_8b_at_rank_16_on_its_attention_takes_13_631_488_parameters(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_sparse(path, LLAMA_8B)
    found = adaptertools.estimate(tmp_path, ranks=(16, 64), targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    assert found.model_parameters == 8_030_261_248
    assert path.stat().st_blocks * 512 < path.stat().st_size / 1000, "the weights are there"
    assert found.parameters(16) == 13_631_488
    assert found.parameters(64) == 54_525_952
    assert found.dtypes == ("bf16",)
    assert {row.name: (row.modules, row.parameters(16)) for row in found.rows} == {
        "q_proj": (32, 4_194_304),
        "k_proj": (32, 2_621_440),
        "v_proj": (32, 2_621_440),
        "o_proj": (32, 4_194_304),
    }
    assert found.share(found.parameters(16)) == 13_631_488 / 8_030_261_248
    assert found.to_json()["total"]["ranks"][0]["nbytes"] == {"f32": 54_525_952, "f16": 27_262_976, "bf16": 27_262_976}
    assert adaptertools.estimate(tmp_path, ranks=16).parameters(16) == 41_943_040


def checkpoint(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Checkpoint:
    return Checkpoint(shapes=shapes, dtypes=dict.fromkeys(shapes, dtype), label="base", **fields)


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MODELS["llama"]()
    saved(made, tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a weight was computed with")

    with monkeypatch.context() as patch:
        for name in ("to", "float", "numpy", "tolist", "sum", "clone", "contiguous"):
            patch.setattr(torch.Tensor, name, refuse)
        found = adaptertools.estimate(tmp_path, ranks=4)
    assert found.parameters(4) == lora_parameters(made, target_modules="all-linear")


def test_the_base_may_be_stored_in_any_way(tmp_path: Path) -> None:
    made = MODELS["llama"]()
    reference = adaptertools.estimate(saved(made, tmp_path / "one"), ranks=4)
    made.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "torch").mkdir()
    torch.save(made.state_dict(), tmp_path / "torch" / "pytorch_model.bin")
    for base in (
        tmp_path / "shards",
        tmp_path / "shards" / "model.safetensors.index.json",
        tmp_path / "one" / "model.safetensors",
        str(tmp_path / "torch"),
        Checkpoint.open(tmp_path / "one"),
    ):
        found = adaptertools.estimate(base, ranks=4)
        assert {row.name: row for row in found.rows} == {row.name: row for row in reference.rows}
        assert found.model_parameters == reference.model_parameters


def test_tied_weights_count_once_however_they_are_stored(tmp_path: Path) -> None:
    made = MODELS["llama, tied"]()
    expected = made.num_parameters()
    torch.save(made.state_dict(), tmp_path / "model.bin")
    shapes = Checkpoint.open(tmp_path / "model.bin").shapes
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= shapes.keys()
    assert adaptertools.estimate(tmp_path / "model.bin", ranks=4).model_parameters == expected
    stated = checkpoint(dict(shapes), config={"tie_word_embeddings": True})
    assert adaptertools.estimate(stated, ranks=4).model_parameters == expected
    untied = checkpoint(dict(shapes), config={"tie_word_embeddings": False})
    assert adaptertools.estimate(untied, ranks=4).model_parameters == expected + 40 * 16


def test_the_embeddings_of_t5_that_a_torch_file_repeats_count_once(tmp_path: Path) -> None:
    made = MODELS["t5"]()
    torch.save(made.state_dict(), tmp_path / "model.bin")
    assert "encoder.embed_tokens.weight" in Checkpoint.open(tmp_path / "model.bin").shapes
    assert adaptertools.estimate(tmp_path / "model.bin", ranks=4).model_parameters == made.num_parameters()


def test_buffers_of_older_files_are_no_parameters() -> None:
    shapes = {
        "h.0.attn.c_attn.weight": (16, 48),
        "h.0.attn.bias": (1, 1, 32, 32),
        "h.0.attn.masked_bias": (),
        "rotary_emb.inv_freq": (8,),
    }
    assert adaptertools.estimate(checkpoint(shapes), ranks=1).model_parameters == 16 * 48


LAYER = {"model.layers.0.mlp.up_proj.weight": (24, 16), "model.layers.0.mlp.down_proj.weight": (16, 24)}


@pytest.mark.parametrize("rank", [0, -1, 4.5, True, "8", None])
def test_a_rank_that_is_none_is_an_error(rank: Any) -> None:
    for ranks in (rank, [rank], [8, rank]):
        with pytest.raises(OptionError, match=r"^rank is .*, expected a whole number from 1 on"):
            adaptertools.estimate(checkpoint(LAYER), ranks=ranks)


def test_no_rank_and_no_target_are_errors() -> None:
    with pytest.raises(OptionError, match="no rank is given"):
        adaptertools.estimate(checkpoint(LAYER), ranks=[])
    with pytest.raises(OptionError, match="no target is given"):
        adaptertools.estimate(checkpoint(LAYER), ranks=8, targets=[])


def test_a_rank_beyond_the_weights_is_allowed_as_in_peft_and_said() -> None:
    found = adaptertools.estimate(checkpoint(LAYER), ranks=[16, 17, 16])
    assert found.ranks == (16, 17)
    assert found.parameters(17) == 17 * 2 * 40
    (note,) = found.notes
    assert note.startswith("rank 17 is beyond the full rank of down_proj, up_proj (from 16 on)")


def test_a_target_that_matches_nothing_is_an_error_with_near_names() -> None:
    with pytest.raises(OptionError, match=r"^base: the target 'up_prj' matches no weight.*nearest are up_proj"):
        adaptertools.estimate(checkpoint(LAYER), ranks=8, targets=["down_proj", "up_prj"])
    with pytest.raises(OptionError, match=r"'zzz' matches no weight.*there are down_proj, up_proj"):
        adaptertools.estimate(checkpoint(LAYER), ranks=8, targets="zzz")
    with pytest.raises(OptionError, match="all-linear finds no linear layer"):
        adaptertools.estimate(checkpoint({"model.norm.weight": (16,)}), ranks=8)


def test_a_target_is_a_whole_part_of_a_name_or_a_glob() -> None:
    for targets, names in {
        ("proj",): None,
        ("*_proj",): {"up_proj", "down_proj"},
        ("mlp.up_proj",): {"up_proj"},
        ("model.layers.0.mlp.up_proj", "up_proj"): {"up_proj"},
        ("ALL-LINEAR",): {"up_proj", "down_proj"},
    }.items():
        if names is None:
            with pytest.raises(OptionError):
                adaptertools.estimate(checkpoint(LAYER), ranks=8, targets=targets)
        else:
            found = adaptertools.estimate(checkpoint(LAYER), ranks=8, targets=targets)
            assert {row.name for row in found.rows} == names
            assert found.modules == len(names)


def test_a_name_that_modules_and_bare_parameters_share_means_the_modules_and_says_so() -> None:
    shapes = {**LAYER, "model.layers.1.mlp.experts.down_proj": (4, 16, 24)}
    found = adaptertools.estimate(checkpoint(shapes), ranks=2, targets=["down_proj"])
    assert found.parameters(2) == 2 * 40
    assert any("1 bare parameter," in note and "name experts.down_proj" in note for note in found.notes)
    found = adaptertools.estimate(checkpoint(shapes), ranks=2, targets=["experts.down_proj"])
    assert found.parameters(2) == 4 * 2 * 40


def test_weights_for_predicting_several_tokens_do_not_count() -> None:
    shapes = {
        **LAYER,
        "model.layers.1.mlp.up_proj.weight": (24, 16),
        "mtp.layers.0.mlp.up_proj.weight": (24, 16),
    }
    config = {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}
    found = adaptertools.estimate(checkpoint(shapes, config=config), ranks=2)
    assert (found.modules, found.model_parameters) == (2, 2 * 24 * 16)
    assert any(note.startswith("2 weights for predicting several tokens") for note in found.notes)
    kept = adaptertools.estimate(checkpoint(shapes), ranks=2)
    assert kept.modules == 3


def test_convolutions_and_saved_embeddings_are_counted_with_a_word_of_caution() -> None:
    shapes = {"model.conv1.weight": (8, 4, 3, 3), "model.embed_tokens.weight": (40, 16)}
    found = adaptertools.estimate(checkpoint(shapes), ranks=2, targets=["conv1", "embed_tokens"])
    assert [(row.kind, row.parameters(2)) for row in found.rows] == [("conv", 2 * (8 + 36)), ("embedding", 2 * 56)]
    assert any("ungrouped" in note for note in found.notes)
    assert any("saves the base weight of embed_tokens" in note for note in found.notes)


def quantized(method: dict[str, Any]) -> dict[str, Any]:
    return {"quantization_config": method}


FLOAT8 = torch.float8_e4m3fn
PACKED = {
    "bitsandbytes in 4 bits": checkpoint(
        {"x.q_proj.weight": (128, 1)},
        torch.uint8,
        config=quantized({"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ),
    "gptq": checkpoint({"x.q_proj.qweight": (2, 16)}, torch.int32, config=quantized({"quant_method": "gptq"})),
    "awq": checkpoint(
        {"x.q_proj.qweight": (16, 2)}, torch.int32, config={"text_config": quantized({"quant_method": "awq"})}
    ),
    "x.q_proj.qweight": checkpoint({"x.norm.weight": (4,), "x.q_proj.qweight": (2, 16)}, torch.int32),
    "x.q_proj.weight is uint8": checkpoint({"x.q_proj.weight": (128, 1)}, torch.uint8),
    "compressed-tensors": checkpoint(
        {"x.q_proj.weight_packed": (16, 2)}, torch.int32, config=quantized({"quant_method": "compressed-tensors"})
    ),
}


@pytest.mark.parametrize("said", PACKED)
def test_packed_weights_are_refused_by_name(said: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=rf"packed \(.*{said}.*\).*the model that was quantised"):
        adaptertools.estimate(PACKED[said], ranks=8)


@pytest.mark.parametrize(
    ("method", "dtype", "beside"),
    [
        ({"quant_method": "fp8"}, FLOAT8, {"x.q_proj.weight_scale_inv": (1, 1)}),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, torch.int8, {"x.q_proj.SCB": (24,)}),
        (None, FLOAT8, {}),
    ],
)
def test_weights_quantised_in_their_own_shape_are_counted(
    method: dict[str, Any] | None, dtype: torch.dtype, beside: dict[str, tuple[int, ...]]
) -> None:
    shapes = {"x.q_proj.weight": (24, 16), **beside}
    found = adaptertools.estimate(checkpoint(shapes, dtype, config=quantized(method) if method else {}), ranks=2)
    assert (found.parameters(2), found.model_parameters) == (2 * 40, 24 * 16)


def test_experts_in_mxfp4_count_in_the_shape_that_they_unpack_to() -> None:
    shapes = {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": (4, 128, 2, 16),
        "model.layers.0.mlp.experts.gate_up_proj_scales": (4, 128, 2),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
    }
    base = checkpoint(shapes, config=quantized({"quant_method": "mxfp4"}))
    assert adaptertools.estimate(base, ranks=2).modules == 1
    found = adaptertools.estimate(base, ranks=2, targets="gate_up_proj")
    assert found.rows[0].shapes == ((4, 64, 128),)
    assert found.parameters(2) == 2 * 4 * (64 + 128)
    assert found.model_parameters == 4 * 64 * 128 + 64 * 64


def test_what_is_no_base_model_is_refused(peft_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"lora_A.*belongs to an adapter"):
        adaptertools.estimate(peft_folder, ranks=8)
    with pytest.raises(SourceNotFoundError):
        adaptertools.estimate(tmp_path / "missing", ranks=8)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(DamagedFileError):
        adaptertools.estimate(tmp_path, ranks=8)


def test_of_a_pipeline_one_model_is_to_be_named(tmp_path: Path) -> None:
    for name in ("unet", "text_encoder"):
        (tmp_path / name).mkdir()
        save_file({"q.weight": torch.zeros(4, 4)}, tmp_path / name / "model.safetensors")
    with pytest.raises(OptionError, match=r"several models \(unet, text_encoder\), .* such as .*/unet"):
        adaptertools.estimate(tmp_path, ranks=8)
    assert adaptertools.estimate(tmp_path / "unet", ranks=8).modules == 1


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": 3, "vocab_size": [1], "text_config": [], "num_hidden_layers": "x"},
        {"text_config": {"vocab_size": {}}, "quantization_config": 8, "num_nextn_predict_layers": 1},
    ],
)
def test_a_configuration_that_is_not_understood_does_no_harm(config: dict[str, Any], tmp_path: Path) -> None:
    save_file({name: torch.zeros(shape) for name, shape in LAYER.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = adaptertools.estimate(tmp_path, ranks=2)
    assert isinstance(found, Estimate)
    assert found.parameters(2) == 2 * 2 * 40
