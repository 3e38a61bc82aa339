"""torchtune's raw adapters: rows, names and scaling, checked against a decoder written out in torchtune's own order."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torchtune_reference import Decoder, adapter_for, weights_of, wrongly_exported

import adaptertools
from adaptertools import formats
from adaptertools.adapter import Adapter
from adaptertools.containers.source import Source
from adaptertools.errors import (
    AmbiguousFormatError,
    ConfigError,
    MissingAlphaError,
    OptionError,
    ShapeError,
    UnknownFormatError,
    UnsupportedFeatureError,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = sorted(case.parent for case in (FIXTURES / "torchtune").glob("*/case.json"))
LLAMA = FIXTURES / "torchtune" / "llama" / "epoch_0"
MODEL = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
ADAPTER = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "peft_type": "LORA"}


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    """ΔW of the low-rank part, slices of one fused projection added up."""
    summed: dict[str, torch.Tensor] = {}
    for module in adapter.modules:
        plain = module.lora_B.double() @ module.lora_A.double() * module.scaling
        if module.target.rows:
            whole = plain.new_zeros(module.target.rows.total, module.in_features)
            whole[module.target.rows.start : module.target.rows.stop] = plain
            plain = whole
        name = module.target.parameter
        summed[name] = summed.get(name, torch.zeros((), dtype=torch.float64)) + plain
    return summed


def folder(
    path: Path,
    tensors: dict[str, torch.Tensor],
    model: dict[str, Any] | None = MODEL,
    adapter: dict[str, Any] | None = ADAPTER,
    file: str = "adapter_model.pt",
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path / file)
    for name, document in (("config.json", model), ("adapter_config.json", adapter)):
        if document is not None:
            (path / name).write_text(json.dumps(document))
    return path


def pair(name: str = "layers.0.attn.q_proj", n_out: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n_out)
    return {
        f"{name}.lora_a.weight": torch.randn(2, 8, generator=generator),
        f"{name}.lora_b.weight": torch.randn(n_out, 2, generator=generator),
    }


def test_there_are_fixtures_of_every_order_of_rows() -> None:
    names = {case.name for case in CASES}
    assert names >= {"llama", "llama_dora_exported", "gemma2", "qwen2_exported", "phi3", "mistral_before_0_5"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_raw_file_is_read_in_the_order_of_hugging_faces_rows(case: Path) -> None:
    said = json.loads((case / "case.json").read_text())
    path = case / said["file"]
    assert formats.detect(Source(path)) == said["detected"]
    adapter = adaptertools.read(path, format="torchtune", **said["read"])
    expected = load_file(case / "expected.safetensors")
    found = deltas(adapter)
    magnitudes = {f"{m.target}.magnitude": m.magnitude for m in adapter.modules if m.magnitude is not None}
    assert found.keys() | magnitudes.keys() == expected.keys()
    for name, delta in found.items():
        assert (delta - expected[name]).abs().max() <= 1e-6, name
    for name, magnitude in magnitudes.items():
        assert torch.equal(magnitude, expected[name]), name


SMALL = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
IDS = torch.tensor([3, 17, 4, 40, 9, 9, 31])


def base_model(family: str) -> Any:
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    torch.manual_seed(0)
    model = kinds[family][1](kinds[family][0](**SMALL)).double().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return model


def decoder(model: Any, adapter: dict[str, torch.Tensor], *, pairs: bool, scaling: float) -> Decoder:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config
    return Decoder(
        weights=weights_of(state, 2, 6, pairs=pairs),
        adapter={name: tensor.double() for name, tensor in adapter.items()},
        scaling=scaling,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=6,
        theta=float(config.rope_parameters["rope_theta"]),
        eps=1e-5,
        pairs=pairs,
    )


def logits_of_peft(model: Any, path: Path) -> torch.Tensor:
    loaded = peft.PeftModel.from_pretrained(model, path, autocast_adapter_dtype=False).double().eval()
    with torch.no_grad():
        return loaded(IDS[None]).logits[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("family", "pairs"), [("llama", True), ("qwen2", False)])
def test_peft_computes_what_torchtune_computed_in_its_own_order_of_rows(
    family: str, pairs: bool, dora: bool, tmp_path: Path
) -> None:
    """The proof: a decoder with torchtune's rotary embedding, and transformers with ours, give the same logits."""
    model = base_model(family)
    modules = (
        ("q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3") if family == "llama" else ("q_proj", "k_proj")
    )
    if dora and family == "qwen2":  # where torchtune scales the bias too, as no other library does
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.zero_()
    plain = decoder(model, {}, pairs=pairs, scaling=1.0)
    with torch.no_grad():
        base = model(IDS[None]).logits[0]
    assert (plain.logits(IDS) - base).abs().max() < 1e-6, "transformers has its angles in float32, no more"
    raw = adapter_for({k: w.float() for k, w in plain.weights.items()}, modules, 3, 7 / 3, dora=dora)
    expected = decoder(model, raw, pairs=pairs, scaling=7 / 3).logits(IDS)
    assert (expected - base).abs().max() > 0.1
    folder(tmp_path / "raw", raw, model.config.to_dict(), {**ADAPTER, "r": 3, "lora_alpha": 7})
    adapter = adaptertools.read(tmp_path / "raw")
    adaptertools.write(adapter, tmp_path / "peft", format="peft")
    assert (logits_of_peft(model, tmp_path / "peft") - expected).abs().max() < 1e-6


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_rows_that_were_left_as_they_are_would_give_other_logits(tmp_path: Path) -> None:
    """So the test above can fail."""
    model = base_model("llama")
    plain = decoder(model, {}, pairs=True, scaling=1.0)
    raw = adapter_for({k: w.float() for k, w in plain.weights.items()}, ("q_proj", "k_proj"), 3, 2.0, dora=False)
    expected = decoder(model, raw, pairs=True, scaling=2.0).logits(IDS)
    folder(
        tmp_path / "raw", raw, model.config.to_dict() | {"model_type": "qwen2"}, {**ADAPTER, "r": 3, "lora_alpha": 6}
    )
    adaptertools.convert(tmp_path / "raw", tmp_path / "peft", to="peft")
    assert (logits_of_peft(model, tmp_path / "peft") - expected).abs().max() > 0.01


def test_the_export_of_llama_is_the_same_adapter_and_the_note_says_so() -> None:
    home = FIXTURES / "torchtune" / "llama_exported" / "epoch_0"
    export, raw = adaptertools.read(home), adaptertools.read(home, format="torchtune")
    assert adaptertools.diff(export, raw, tolerance=0.0).same
    assert any("of the same adapter; --from torchtune reads the raw file" in note for note in export.notes)


@pytest.mark.parametrize(
    ("name", "reason"), [("qwen2_exported", "qwen2 has in the right order"), ("llama_dora_exported", "DoRA magnitudes")]
)
def test_an_export_that_is_wrong_is_read_as_peft_does_and_called_wrong(name: str, reason: str) -> None:
    home = FIXTURES / "torchtune" / name / "epoch_0"
    for path in (home, home / "adapter_model.safetensors"):
        export = adaptertools.read(path, dora="dora" in name or None)
        assert any("is not the adapter that was trained" in note and reason in note for note in export.notes), path
    raw = adaptertools.read(home, format="torchtune")
    found = adaptertools.diff(adaptertools.read(home, dora="dora" in name or None), raw)
    assert not found.same


def test_the_raw_file_named_by_its_path_is_torchtunes_and_not_pefts() -> None:
    for name in ("llama_exported", "qwen2_exported", "llama"):
        path = FIXTURES / "torchtune" / name / "epoch_0" / "adapter_model.pt"
        assert formats.detect(Source(path)) == "torchtune"
        assert adaptertools.read(path).modules
    assert (
        formats.detect(Source(LLAMA.parent.parent / "llama_exported" / "epoch_0" / "adapter_model.safetensors"))
        == "peft"
    )


def test_the_base_model_stands_in_for_the_config_beside_the_file(tmp_path: Path) -> None:
    path = folder(tmp_path / "run", pair("layers.0.attn.q_proj", 32) | pair("layers.0.attn.k_proj", 16), model=None)
    tensors = torch.load(path / "adapter_model.pt", weights_only=True)
    tensors = {k: torch.randn(2, 32) if k.endswith("a.weight") else v for k, v in tensors.items()}
    torch.save(tensors, path / "adapter_model.pt")
    with pytest.raises(ConfigError, match=r"rows of layers\.0\.attn\.q_proj depends on the base model.*--base"):
        adaptertools.read(path)
    adapter = adaptertools.read(path, base=FIXTURES / "base" / "llama_tiny")
    for module in adapter.modules:
        name = f"layers.0.attn.{module.target.parameter.rpartition('.')[2]}.lora_b.weight"
        assert torch.equal(module.lora_B, wrongly_exported(tensors[name], 8))  # which is right for Llama


def test_the_given_base_counts_before_the_config_beside_the_file(tmp_path: Path) -> None:
    path = folder(tmp_path / "run", pair(), model={**MODEL, "model_type": "qwen2"})
    unchanged = adaptertools.read(path).modules[0].lora_B
    assert torch.equal(unchanged, pair()["layers.0.attn.q_proj.lora_b.weight"])
    base = tmp_path / "base"
    base.mkdir()
    save_file({"model.norm.weight": torch.ones(8)}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(MODEL))
    assert not torch.equal(adaptertools.read(path, base=base).modules[0].lora_B, unchanged)


def test_modules_whose_rows_stay_need_no_base_model(tmp_path: Path) -> None:
    tensors = pair("layers.0.attn.v_proj") | pair("layers.11.mlp.w1") | pair("layers.2.mlp.w2") | pair("output", 5)
    adapter = adaptertools.read(folder(tmp_path / "stated", tensors, model=None))
    assert [module.target.parameter for module in adapter.modules] == [
        "lm_head",
        "model.layers.0.self_attn.v_proj",
        "model.layers.2.mlp.down_proj",
        "model.layers.11.mlp.gate_proj",
    ]
    assert adapter.notes == ()
    bare = adaptertools.read(folder(tmp_path / "bare", tensors, model=None, adapter=None), alpha=4)
    assert any("if it is of Phi" in note for note in bare.notes)


def test_alpha_is_that_of_the_configuration_or_asked_for(tmp_path: Path) -> None:
    path = folder(tmp_path / "stated", pair())
    assert adaptertools.read(path).modules[0].scaling == 2.0
    with pytest.raises(OptionError, match="states lora_alpha 4"):
        adaptertools.read(path, alpha=5)
    bare = folder(tmp_path / "bare", pair(), adapter=None)
    with pytest.raises(MissingAlphaError, match="--source-alpha"):
        adaptertools.read(bare)
    assert adaptertools.read(bare, alpha=6).modules[0].scaling == 3.0


def test_the_output_layer_of_a_model_for_rewards_is_its_score(tmp_path: Path) -> None:
    model = {**MODEL, "architectures": ["LlamaForSequenceClassification"]}
    adapter = adaptertools.read(folder(tmp_path / "run", pair("output", 1), model))
    assert str(adapter.modules[0].target) == "score"


def test_wrappers_are_taken_off(tmp_path: Path) -> None:
    tensors = {f"_orig_mod.{key.replace('attn', 'attn._checkpoint_wrapped_module')}": t for key, t in pair().items()}
    assert str(adaptertools.read(folder(tmp_path, {"model": tensors})).modules[0].target).endswith("q_proj")


@pytest.mark.parametrize("model_type", ["cohere", "mllama", "llama4", "gemma3", None])
def test_families_that_are_not_known_are_refused_by_name(model_type: str | None, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match=rf"model_type is {model_type!r}.*llama, mistral, gemma"):
        adaptertools.read(folder(tmp_path, pair(), {**MODEL, "model_type": model_type}))


@pytest.mark.parametrize("name", ["decoder.layers.0.attn.q_proj", "encoder.clip.layers.0.attn.q_proj"])
def test_models_with_vision_are_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="has vision"):
        adaptertools.read(folder(tmp_path, pair(name)))


def test_heads_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"q_proj\.lora_B has 8 rows; the base model has 2 heads of 8"):
        adaptertools.read(folder(tmp_path / "wider", pair(), {**MODEL, "head_dim": 8}))
    with pytest.raises(ShapeError, match="lora_b has 8 rows, the base model has 4"):
        adaptertools.read(folder(tmp_path / "phi", pair("layers.0.attn.v_proj"), {**MODEL, "model_type": "phi3"}))


def test_dora_on_a_projection_with_a_bias_is_noted(tmp_path: Path) -> None:
    tensors = pair("layers.0.attn.v_proj") | {"layers.0.attn.v_proj.magnitude": torch.ones(8)}
    qwen = adaptertools.read(folder(tmp_path / "qwen", tensors, {**MODEL, "model_type": "qwen2"}))
    assert any("has a bias in the base model" in note for note in qwen.notes)
    assert adaptertools.read(folder(tmp_path / "llama", tensors)).notes == ()


def test_files_of_several_epochs_have_to_be_named(tmp_path: Path) -> None:
    folder(tmp_path, pair(), file="adapter_0.pt")
    folder(tmp_path, pair(), file="adapter_1.pt")
    with pytest.raises(AmbiguousFormatError, match=r"adapter_0\.pt, adapter_1\.pt, one for each epoch"):
        adaptertools.read(tmp_path)
    assert adaptertools.read(tmp_path / "adapter_1.pt").modules


def test_a_raw_file_saved_as_safetensors_is_still_torchtunes(tmp_path: Path) -> None:
    folder(tmp_path, pair())
    save_file(pair(), tmp_path / "again.safetensors")
    assert formats.detect(Source(tmp_path / "again.safetensors")) == "torchtune"
    assert adaptertools.read(tmp_path / "again.safetensors").modules[0].scaling == 2.0


def test_mlx_and_flax_names_are_not_torchtunes(tmp_path: Path) -> None:
    for key in (
        "model.layers.0.self_attn.q_proj.lora_a",
        "layers.0.attn.q_proj.lora_a",
        "layers.0.attn.q.kernel_lora_a",
    ):
        path = tmp_path / f"{len(key)}.safetensors"
        save_file({key: torch.ones(8, 2), key[:-1] + "b": torch.ones(2, 8)}, path)
        assert not formats.get("torchtune").detect(Source(path))


def test_it_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="torchtune can be read, not written"):
        adaptertools.convert(LLAMA, tmp_path / "out", to="torchtune")
    assert not (tmp_path / "out").exists()


def test_tensors_in_memory_are_read_with_the_adapters_configuration() -> None:
    adapter = adaptertools.from_state_dict(pair("layers.0.attn.v_proj"), ADAPTER, format="torchtune")
    assert adapter.modules[0].scaling == 2.0


def test_a_folder_of_epochs_is_not_mistaken_for_one_adapter(tmp_path: Path) -> None:
    for epoch in (0, 1):
        shutil.copytree(FIXTURES / "torchtune" / "llama_exported" / "epoch_0", tmp_path / f"epoch_{epoch}")
    with pytest.raises(AmbiguousFormatError, match="epoch_0, epoch_1"):
        adaptertools.read(tmp_path)


def test_sizes_that_no_model_has_take_no_memory(tmp_path: Path) -> None:
    model = {"model_type": "phi3", "num_attention_heads": 1 << 40, "num_key_value_heads": 1, "head_dim": 8}
    with pytest.raises(ConfigError, match="more than any model has"):
        adaptertools.read(folder(tmp_path, pair("layers.0.attn.v_proj"), model))


@pytest.mark.parametrize("value", [0, -4, 2.0, "4", True, None, [4]])
def test_heads_that_are_no_number_are_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_attention_heads is"):
        adaptertools.read(folder(tmp_path, pair(), {**MODEL, "num_attention_heads": value}))


@pytest.mark.parametrize("chosen", [None, "torchtune"])
@pytest.mark.parametrize("case", ["llama", "phi3"])
def test_the_output_of_a_run_is_told_from_the_folder_of_an_epoch(case: str, chosen: str | None) -> None:
    run = FIXTURES / "torchtune" / case
    with pytest.raises(UnknownFormatError, match=rf"{case} holds epoch_0: give that, {run}/epoch_0$"):
        adaptertools.read(run, format=chosen)


def test_of_several_epochs_the_last_is_proposed(tmp_path: Path) -> None:
    for epoch in (2, 10):
        shutil.copytree(LLAMA, tmp_path / f"epoch_{epoch}")
    with pytest.raises(UnknownFormatError, match=f"give one of them, such as {tmp_path}/epoch_10$"):
        adaptertools.read(tmp_path)
