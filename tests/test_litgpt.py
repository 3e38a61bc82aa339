"""LitGPT's adapters: what is read of them, checked by LitGPT's own merges and by products written out by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import adaptertools
from adaptertools import formats
from adaptertools.adapter import Adapter
from adaptertools.containers.source import Source
from adaptertools.errors import (
    AmbiguousFormatError,
    ConfigError,
    DamagedFileError,
    MissingAlphaError,
    OptionError,
    ShapeError,
    UnsafeFileError,
    UnsupportedFeatureError,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = sorted(case.parent for case in (FIXTURES / "litgpt").glob("*/case.json"))
LLAMA = FIXTURES / "litgpt" / "llama_query_value" / "final"
QKV = "transformer.h.0.attn.qkv"
MODEL = {"name": "Llama-2-7b-hf", "n_embd": 8, "n_head": 4, "n_query_groups": 2, "mlp_class_name": "LLaMAMLP"}


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    summed: dict[str, torch.Tensor] = {}
    for module in adapter.modules:
        name = module.target.parameter
        summed[name] = summed.get(name, torch.zeros(())) + module.delta_weight()
    return summed


def folder(path: Path, tensors: dict[str, torch.Tensor], model: dict[str, Any] | None = None, **run: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path / "lit_model.pth.lora")
    (path / "model_config.yaml").write_text(yaml.safe_dump(MODEL if model is None else model))
    if run:
        (path / "hyperparameters.yaml").write_text(yaml.safe_dump(run))
    return path


def qkv(count: int, rows: int, rank: int = 2, name: str = QKV) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return {
        f"{name}.lora_A": torch.randn(count * rank, 8, generator=generator),
        f"{name}.lora_B": torch.randn(rows, rank, generator=generator),
    }


def test_there_are_fixtures_of_every_way_to_store_attention() -> None:
    names = {case.name for case in CASES}
    assert names >= {"llama_query_value", "llama_all", "mixtral", "phi3", "pythia_query_value", "falcon_mqa"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_folder_of_litgpt_is_read_with_the_delta_weights_that_litgpt_merges(case: Path) -> None:
    said = json.loads((case / "case.json").read_text())
    path = case / said["file"]
    assert formats.detect(Source(path)) == "litgpt"
    found = deltas(adaptertools.read(path, **said["read"]))
    expected = load_file(case / "expected.safetensors")
    assert {f"{name}.weight" for name in found} == expected.keys()
    for name, delta in found.items():
        assert delta.abs().max() > 0.01
        assert (delta - expected[f"{name}.weight"]).abs().max() <= 1e-6, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_becomes_a_peft_adapter_of_the_same_delta_weights(case: Path, tmp_path: Path) -> None:
    adaptertools.convert(case / "final", tmp_path / "peft", to="peft")
    found, expected = deltas(adaptertools.read(tmp_path / "peft")), load_file(case / "expected.safetensors")
    assert {f"{name}.weight" for name in found} == expected.keys()
    for name, delta in found.items():
        assert (delta - expected[f"{name}.weight"]).abs().max() <= 1e-6, name


def test_each_slot_takes_its_own_rows_of_both_factors(tmp_path: Path) -> None:
    """q has 4 heads of 2, k and v have 2 groups of 2; q and v are adapted."""
    tensors = qkv(2, 12)
    path = folder(tmp_path, tensors, lora_alpha=6, lora_query=True, lora_key=False, lora_value=True)
    found = deltas(adaptertools.read(path))
    A, B = tensors[f"{QKV}.lora_A"], tensors[f"{QKV}.lora_B"]
    home = "model.layers.0.self_attn"
    assert found.keys() == {f"{home}.q_proj", f"{home}.v_proj"}
    assert torch.equal(found[f"{home}.q_proj"], 3 * (B[:8] @ A[:2]))
    assert torch.equal(found[f"{home}.v_proj"], 3 * (B[8:] @ A[2:]))


def test_reading_shares_the_factors_with_the_file(tmp_path: Path) -> None:
    path = folder(tmp_path, qkv(3, 16), lora_alpha=4, lora_query=True, lora_key=True, lora_value=True)
    storages = {module.lora_A.untyped_storage().data_ptr() for module in adaptertools.read(path).modules}
    assert len(storages) == 1


def test_interleaved_rows_are_those_of_each_group_in_turn(tmp_path: Path) -> None:
    model = {"name": "pythia-14m", "n_embd": 8, "n_head": 4, "mlp_class_name": "GptNeoxMLP"}
    tensors = qkv(2, 16)
    path = folder(tmp_path, tensors, model, lora_alpha=6, lora_query=True, lora_key=False, lora_value=True)
    adapter = adaptertools.read(path)
    (module,) = adapter.modules
    assert (str(module.target), module.rank, module.scaling) == ("gpt_neox.layers.0.attention.query_key_value", 4, 3.0)
    A, B = tensors[f"{QKV}.lora_A"], tensors[f"{QKV}.lora_B"]
    expected = torch.zeros(24, 8)
    for head in range(4):  # q, k and v of two rows each, head after head
        expected[6 * head : 6 * head + 2] = 3 * (B[2 * head : 2 * head + 2] @ A[:2])
        expected[6 * head + 4 : 6 * head + 6] = 3 * (B[8 + 2 * head : 8 + 2 * head + 2] @ A[2:])
    assert torch.allclose(module.delta_weight(), expected, atol=1e-6)


def test_without_hyperparameters_alpha_is_asked_for_and_slots_are_told_by_shape_where_they_can_be(
    tmp_path: Path,
) -> None:
    path = folder(tmp_path / "all", qkv(3, 16))
    with pytest.raises(MissingAlphaError, match=r"hyperparameters\.yaml"):
        adaptertools.read(path)
    assert len(adaptertools.read(path, alpha=4).modules) == 3
    assert [m.target.parameter[-6:] for m in adaptertools.read(folder(tmp_path / "q", qkv(1, 8)), alpha=4).modules] == [
        "q_proj"
    ]
    both = folder(tmp_path / "two", qkv(2, 12))
    with pytest.raises(ConfigError, match="may adapt q and k or q and v"):
        adaptertools.read(both, alpha=4)
    chosen = adaptertools.read(both, alpha=4, slots="TFT")
    assert [module.target.parameter[-6:] for module in chosen.modules] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("slots", ["TF", "TFTT", "FFF", "tft", "q"])
def test_slots_that_are_not_understood_are_refused(slots: str) -> None:
    with pytest.raises(OptionError, match="T or an F"):
        adaptertools.read(LLAMA, slots=slots)


def test_slots_that_the_shapes_deny_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, qkv(2, 12), lora_alpha=4, lora_query=False, lora_key=True, lora_value=True)
    with pytest.raises(ShapeError, match="no factors of k and v with 4 heads and 2 groups"):
        adaptertools.read(path)


def test_an_alpha_that_contradicts_the_run_is_refused() -> None:
    with pytest.raises(OptionError, match="lora_alpha 6; 5 was given"):
        adaptertools.read(LLAMA, alpha=5)
    assert adaptertools.read(LLAMA, alpha=6).modules


def test_the_file_alone_is_read_with_what_stands_beside_it(tmp_path: Path) -> None:
    whole, file = adaptertools.read(LLAMA), adaptertools.read(LLAMA / "lit_model.pth.lora")
    assert formats.detect(Source(LLAMA / "lit_model.pth.lora")) == "litgpt"
    assert {str(m.target) for m in whole.modules} == {str(m.target) for m in file.modules}
    moved = tmp_path / "elsewhere.bin"
    shutil.copy(LLAMA / "lit_model.pth.lora", moved)
    assert formats.detect(Source(moved)) == "litgpt"
    with pytest.raises(ConfigError, match=r"model_config\.yaml is not there"):
        adaptertools.read(moved, alpha=6)


def test_the_merged_model_beside_the_adapter_is_left_alone(tmp_path: Path) -> None:
    """As LitGPT leaves the folder `final`."""
    shutil.copytree(LLAMA, tmp_path / "final")
    torch.save({f"{QKV}.weight": torch.zeros(16, 8)}, tmp_path / "final" / "lit_model.pth")
    assert formats.detect(Source(tmp_path / "final")) == "litgpt"
    assert len(adaptertools.read(tmp_path / "final").modules) == 2


def test_tensors_in_memory_are_read_with_the_keys_of_both_files() -> None:
    run = {"lora_alpha": 6, "lora_query": True, "lora_key": False, "lora_value": True}
    adapter = adaptertools.from_state_dict(qkv(2, 12), {**MODEL, **run}, format="litgpt")
    assert [module.scaling for module in adapter.modules] == [3.0, 3.0]


def test_names_tell_litgpt_from_loralib_and_from_gpt2(tmp_path: Path) -> None:
    litgpt = ("attn.qkv", "attn.proj", "mlp.fc_1", "mlp.proj", "mlp.fc", "attn.attn", "mlp.experts.3.fc_1", "mlp.gate")
    for number, module in enumerate(litgpt):
        save_file(qkv(1, 8, name=f"transformer.h.0.{module}"), tmp_path / f"{number}.safetensors")
        assert formats.detect(Source(tmp_path / f"{number}.safetensors")) == "litgpt", module
    for number, module in enumerate(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "attn.q_proj")):
        save_file(qkv(1, 8, name=f"transformer.h.0.{module}"), tmp_path / f"hf_{number}.safetensors")
        assert formats.detect(Source(tmp_path / f"hf_{number}.safetensors")) == "loralib", module


def test_files_of_former_versions_are_refused_by_name() -> None:
    path = FIXTURES / "malformed" / "UnsupportedFeatureError" / "litgpt_interleaved_of_former_versions"
    with pytest.raises(UnsupportedFeatureError, match=r"attn\.attn is of LitGPT up to 0\.5\.4"):
        adaptertools.read(path)


def test_it_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="litgpt can be read, not written"):
        adaptertools.convert(LLAMA, tmp_path / "out", to="litgpt")
    assert not (tmp_path / "out").exists()


def test_a_yaml_file_that_would_build_objects_or_is_huge_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, qkv(1, 8), lora_alpha=4)
    (path / "hyperparameters.yaml").write_text("lora_alpha: !!python/object/apply:os.system ['exit 1']")
    with pytest.raises(DamagedFileError, match="not valid YAML"):
        adaptertools.read(path)
    (path / "hyperparameters.yaml").write_text("# " + "x" * 1_000_001)
    with pytest.raises(UnsafeFileError, match="more than any configuration"):
        adaptertools.read(path)
    (path / "hyperparameters.yaml").write_text("a: &a [1]\n" + "b: " + "[" * 5000)
    with pytest.raises(DamagedFileError, match="not valid YAML"):
        adaptertools.read(path)


def test_a_peft_adapter_beside_it_has_to_be_chosen(tmp_path: Path) -> None:
    shutil.copytree(LLAMA, tmp_path / "both")
    adaptertools.write(adaptertools.read(LLAMA), tmp_path / "peft", format="peft")
    for file in (tmp_path / "peft").iterdir():
        shutil.copy(file, tmp_path / "both")
    with pytest.raises(AmbiguousFormatError, match="litgpt or peft"):
        adaptertools.read(tmp_path / "both")
    assert adaptertools.read(tmp_path / "both", format="litgpt").modules


@pytest.mark.parametrize("alpha", [True, "16", 10**400, float("inf"), float("nan"), [16]])
def test_an_alpha_that_is_no_finite_number_is_refused(alpha: Any, tmp_path: Path) -> None:
    path = folder(tmp_path, qkv(1, 8), lora_alpha=alpha, lora_query=True, lora_key=False, lora_value=False)
    with pytest.raises(ConfigError, match="alpha is"):
        adaptertools.read(path)


def test_sizes_that_no_model_has_take_no_memory(tmp_path: Path) -> None:
    model = {"name": "pythia-14m", "n_embd": 8, "n_head": 1 << 40, "n_query_groups": 1, "head_size": 2}
    path = folder(tmp_path, qkv(1, 2), model, lora_alpha=4, lora_query=False, lora_key=True, lora_value=False)
    with pytest.raises(ConfigError, match="more than any model has"):
        adaptertools.read(path)
