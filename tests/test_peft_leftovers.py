"""What FSDP, DeepSpeed, torch.compile and trainers leave in PEFT folders: taken off, or refused with the way out."""

import json
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import save_file

import adaptertools
from adaptertools import formats
from adaptertools.adapter import WeightRole
from adaptertools.containers.source import Source
from adaptertools.errors import ConfigError, EmptyFactorError, SourceNotFoundError, UnsupportedFeatureError

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def pair(name: str = f"{PREFIX}{Q}", adapter: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.lora_A{adapter}.weight": torch.randn(2, 4, generator=generator),
        f"{name}.lora_B{adapter}.weight": torch.randn(3, 2, generator=generator),
    }


def folder(path: Path, tensors: dict[str, torch.Tensor] | None = None, config: dict[str, Any] | None = CONFIG) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if tensors is not None:
        save_file(tensors, path / "adapter_model.safetensors")
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("adapter", ["", ".default", ".my_adapter"])
@pytest.mark.parametrize(
    "name",
    [
        f"_fsdp_wrapped_module.{PREFIX}{Q}",
        f"module.{PREFIX}{Q}",
        f"module.module.{PREFIX}{Q}",
        f"_orig_mod.module.{PREFIX}{Q}",
        f"{PREFIX}_orig_mod.{Q}",
        f"{PREFIX}model.layers.0._fsdp_wrapped_module.self_attn.q_proj",
        f"{PREFIX}model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn.q_proj",
        f"{PREFIX}model.layers.0._checkpoint_wrapped_module._orig_mod.self_attn._fsdp_wrapped_module.q_proj",
        f"_fsdp_wrapped_module.base_model._fsdp_wrapped_module.model.{Q}",
        f"base_model._orig_mod.model.{Q}",
        f"{PREFIX}{Q}._fsdp_wrapped_module",
    ],
)
def test_wrappers_and_the_adapters_name_go_wherever_they_stand(name: str, adapter: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "x", pair(name, adapter))
    read = adaptertools.read(path)
    assert [str(module.target) for module in read.modules] == [Q]
    assert read.notes == ()
    save_file(pair(name, adapter), tmp_path / "alone.safetensors")  # without a configuration the keys alone tell
    assert formats.detect(Source(tmp_path / "alone.safetensors")) == "peft"


def test_a_whole_state_dict_of_fsdp_is_the_adapter_and_its_wrapped_heads(tmp_path: Path) -> None:
    wrapped = f"_fsdp_wrapped_module.{PREFIX}model.layers.0._fsdp_wrapped_module.self_attn.q_proj"
    head = f"_fsdp_wrapped_module.{PREFIX}score._fsdp_wrapped_module"
    tensors = pair(wrapped, ".default") | {
        f"{head}.modules_to_save.default.weight": torch.ones(2, 4),
        f"{head}.original_module.weight": torch.zeros(2, 4),
    }
    read = adaptertools.read(folder(tmp_path, tensors, {**CONFIG, "modules_to_save": ["score"]}))
    assert torch.equal(read.full_weights["score.weight"].weight, torch.ones(2, 4))
    assert list(read.full_weights) == ["score.weight"]


EMPTY = {
    "lora_A": {f"{PREFIX}{Q}.lora_A.weight": torch.ones(0)},
    "lora_B": {f"{PREFIX}{Q}.lora_B.weight": torch.ones(0)},
    "both": {f"{PREFIX}{Q}.lora_A.weight": torch.ones(0), f"{PREFIX}{Q}.lora_B.weight": torch.ones(0)},
    "embedding": {
        f"{PREFIX}embed.lora_embedding_A": torch.ones(0),
        f"{PREFIX}embed.lora_embedding_B": torch.ones(0),
    },
    "magnitude": {f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(0)},
    "bias": {f"{PREFIX}{Q}.lora_B.bias": torch.ones(0)},
    "head": {f"{PREFIX}score.weight": torch.ones(0)},
    "saved": {f"{PREFIX}score.modules_to_save.default.weight": torch.ones(0)},
    "tokens": {f"{PREFIX}embed.token_adapter.trainable_tokens_delta": torch.ones(0)},
}


@pytest.mark.parametrize("part", EMPTY)
def test_the_empty_tensors_of_zero_3_are_called_that_and_the_way_out_is_named(part: str, tmp_path: Path) -> None:
    config = {
        **CONFIG,
        "use_dora": part == "magnitude",
        "lora_bias": part == "bias",
        "trainable_token_indices": {"embed": [1]} if part == "tokens" else None,
    }
    with pytest.raises(EmptyFactorError, match=r"ZeRO-3.*zero_to_fp32\.py"):
        adaptertools.read(folder(tmp_path, pair() | EMPTY[part], config))


@pytest.fixture
def fsdp_checkpoint(tmp_path: Path) -> Path:
    """A checkpoint as Trainer leaves it with FSDP's sharded state dicts: real files of torch.distributed."""
    path = folder(tmp_path / "checkpoint-500")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch speaks of processes that this test does not have
        dcp.save({"model": pair(adapter=".default")}, checkpoint_id=path / "pytorch_model_fsdp_0", no_dist=True)
        dcp.save({"optimizer": {"step": torch.ones(1)}}, checkpoint_id=path / "optimizer_0", no_dist=True)
    torch.save({"last_epoch": 3}, path / "scheduler.pt")
    (path / "trainer_state.json").write_text("{}")
    return path


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("place", ["", "pytorch_model_fsdp_0"])
def test_a_sharded_checkpoint_of_fsdp_is_refused_with_the_command_that_puts_it_together(
    fsdp_checkpoint: Path, place: str, configured: bool
) -> None:
    if not configured:
        (fsdp_checkpoint / "adapter_config.json").unlink()
    with pytest.raises(UnsupportedFeatureError, match="pytorch_model_fsdp_0: a sharded checkpoint") as raised:
        adaptertools.read(fsdp_checkpoint / place)
    assert "dcp_to_torch" in str(raised.value)
    assert "optimizer_0" not in str(raised.value)


def test_the_command_that_is_named_makes_an_adapter_that_is_read(fsdp_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError) as raised:
        adaptertools.read(fsdp_checkpoint)
    command = re.search(r"python (-m \S+ dcp_to_torch \S+ \S+),", str(raised.value))
    assert command
    out = folder(tmp_path / "OUT")
    arguments = shlex.split(command[1].replace(" OUT/", f" {out}/"))
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    (module,) = adaptertools.read(out).modules
    assert str(module.target) == Q
    assert torch.equal(module.lora_A, pair()[f"{PREFIX}{Q}.lora_A.weight"])
    assert torch.equal(module.lora_B, pair()[f"{PREFIX}{Q}.lora_B.weight"])


@pytest.mark.parametrize("place", ["", "global_step500"])
@pytest.mark.parametrize(
    "name",
    [
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "mp_rank_00_model_states.pt",
    ],
)
def test_a_checkpoint_of_deepspeed_is_refused_with_the_script_that_gathers_it(
    name: str, place: str, tmp_path: Path
) -> None:
    path = folder(tmp_path / "checkpoint-500")
    (path / "global_step500").mkdir()
    torch.save({"module": {}, "ds_version": "0.17"}, path / "global_step500" / name)
    (path / "zero_to_fp32.py").write_text("")
    (path / "latest").write_text("global_step500")
    torch.save({"last_epoch": 3}, path / "scheduler.pt")
    with pytest.raises(UnsupportedFeatureError, match=r"global_step500: .*DeepSpeed.*python zero_to_fp32\.py \. OUT"):
        adaptertools.read(path / place)


def test_an_adapter_beside_shards_is_read(fsdp_checkpoint: Path) -> None:
    folder(fsdp_checkpoint, pair())
    assert [str(module.target) for module in adaptertools.read(fsdp_checkpoint).modules] == [Q]


def test_a_folder_with_nothing_of_the_sort_is_still_only_incomplete(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(SourceNotFoundError, match="no adapter_model"):
        adaptertools.read(tmp_path)


@pytest.mark.parametrize("leaf", ["_flat_param", "_fsdp_wrapped_module._flat_param", "flat_param_0"])
def test_flat_parameters_of_fsdp_are_refused_and_not_kept_as_weights(leaf: str, tmp_path: Path) -> None:
    tensors = pair() | {f"{PREFIX}model.layers.0.{leaf}": torch.ones(30)}
    with pytest.raises(UnsupportedFeatureError, match=r"_param.*FULL_STATE_DICT"):
        adaptertools.read(folder(tmp_path, tensors))


@pytest.mark.parametrize("peft_type", ["LORA", None])
@pytest.mark.parametrize(
    "name",
    ["model.unembed_tokens", "model.layers.3.mlp.experts.w1", "model.layers.3.mlp.experts.down_proj"],
)
def test_tinkers_own_tensors_are_refused_with_the_function_that_converts_them(
    name: str, peft_type: str | None, tmp_path: Path
) -> None:
    shape_a, shape_b = ((2, 4), (9, 2)) if "unembed" in name else ((1, 2, 4), (8, 3, 2))
    tensors = pair() | {
        f"{PREFIX}{name}.lora_A.weight": torch.ones(shape_a),
        f"{PREFIX}{name}.lora_B.weight": torch.ones(shape_b),
    }
    config = {"r": 2, "lora_alpha": 4} | ({"peft_type": peft_type} if peft_type else {})
    path = folder(tmp_path, tensors, config)
    assert formats.detect(Source(path)) == "peft"
    with pytest.raises(UnsupportedFeatureError, match=r"Tinker's.*build_lora_adapter"):
        adaptertools.read(path)


def test_a_configuration_without_a_type_is_asked_about(tmp_path: Path) -> None:
    path = folder(tmp_path, pair(), {"r": 2, "lora_alpha": 4})
    with pytest.raises(ConfigError, match=r"no peft_type.*build_lora_adapter"):
        adaptertools.read(path)


def test_the_adapter_that_llama_factory_converted_is_pointed_at(tmp_path: Path) -> None:
    folder(tmp_path, pair(), {**CONFIG, "init_lora_weights": "pissa_niter_16"})
    for name in ("pissa_init", "pissa_backup"):
        folder(tmp_path / name, pair(), {**CONFIG, "init_lora_weights": True})
    folder(tmp_path / "pissa_converted", pair(), {**CONFIG, "init_lora_weights": True})
    whole = adaptertools.read(tmp_path)
    assert whole.bases[""].change == "pissa_niter_16"
    assert any(note.startswith("pissa_converted in it") for note in whole.notes)
    converted = adaptertools.read(tmp_path / "pissa_converted")
    assert (converted.bases[""].change, converted.notes) == (None, ())


@pytest.mark.parametrize("name", ["pissa_init", "pissa_backup"])
def test_factors_that_llama_factory_saved_under_a_wrong_configuration_belong_to_the_changed_base(
    name: str, tmp_path: Path
) -> None:
    folder(tmp_path / name, pair(), {**CONFIG, "init_lora_weights": True})
    for read in (adaptertools.read(tmp_path / name), adaptertools.read(tmp_path / name / "adapter_model.safetensors")):
        assert read.bases[""].change == "pissa"
        assert any("pissa_converted" in note for note in read.notes)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*embedding layers.*:UserWarning")
def test_the_base_weight_that_peft_saves_with_an_adapted_output_layer_is_no_trained_one(tmp_path: Path) -> None:
    """Real PEFT saves lm_head.base_layer.weight by itself where lm_head is a target."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, **sizes))
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"])).save_pretrained(tmp_path)
    adapter = adaptertools.read(tmp_path)
    assert [str(module.target) for module in adapter.modules] == ["lm_head", Q]
    assert {name: weight.role for name, weight in adapter.full_weights.items()} == {"lm_head.weight": WeightRole.BASE}
    assert torch.equal(adapter.full_weights["lm_head.weight"].weight, model.lm_head.weight)
