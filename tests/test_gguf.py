"""GGUF adapters: names, rows, scaling, header, and what is refused. llama.cpp judges in test_gguf_consumer.py."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import Ran
from proof import assert_diff_proves
from safetensors.torch import load_file, save_file

import adaptertools
from adaptertools import formats
from adaptertools.adapter import Adapter, Base, Feature, HistoryEntry, Kind, LoraModule, ScaleRule, Target
from adaptertools.containers import gguf as gguf_container
from adaptertools.containers.history import HEADER_KEY
from adaptertools.containers.source import Source
from adaptertools.dialects.gguf.families import BY_ARCHITECTURE, FAMILIES
from adaptertools.dialects.gguf.names import template
from adaptertools.errors import (
    AmbiguousFormatError,
    ConfigError,
    MatchError,
    MissingExtraError,
    NonFiniteError,
    NotLoraError,
    OptionError,
    ShapeError,
    UnclaimedTensorError,
    UnknownFormatError,
    UnsupportedFeatureError,
)
from adaptertools.operations.select import select

FIXTURES = Path(__file__).parents[1] / "fixtures" / "gguf"
CASES = sorted(path.parent for path in FIXTURES.glob("*/case.json"))
Run = Callable[..., Ran]


def module(name: str, rank: int = 2, *, rows: int = 16, columns: int = 8, **fields: Any) -> LoraModule:
    generator = torch.Generator().manual_seed(rank + len(name))
    dtype = fields.pop("dtype", torch.float32)
    return LoraModule(
        target=fields.pop("target", None) or Target(parameter=name),
        lora_A=torch.randn(rank, columns, generator=generator).to(dtype),
        lora_B=torch.randn(rows, rank, generator=generator).to(dtype),
        alpha=fields.pop("alpha", 4.0),
        **fields,
    )


def layer(leaf: str, number: int = 0) -> str:
    return f"model.layers.{number}.{leaf}"


def make_base(folder: Path, model_type: str = "llama", **said: Any) -> Path:
    """A folder with a config.json alone."""
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **config, **said}))
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_base(tmp_path / "llama")


def written(adapter: Adapter | LoraModule, path: Path, **options: Any) -> adaptertools.WriteReport:
    adapter = Adapter(modules=(adapter,)) if isinstance(adapter, LoraModule) else adapter
    return adaptertools.write(adapter, path, format="gguf", **options)


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the gguf package reads: keys, and tensors innermost axis last."""
    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return keys, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


# What llama.cpp's converter wrote.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_files_of_llama_cpps_converter_mean_what_peft_says(case: Path) -> None:
    adapter = adaptertools.read(case / "adapter.gguf", base=case)
    expected = load_file(case / "expected.safetensors")
    found = {f"{m.target.parameter}.weight": m.delta_weight(dtype=torch.float64) for m in adapter.modules}
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert torch.allclose(found[name], delta.double(), rtol=1e-6, atol=1e-7), name
    tokens = json.loads((case / "case.json").read_text()).get("adapter", {}).get("alora_invocation_tokens")
    assert adapter.invocation_tokens == (tuple(tokens) if tokens else None)


@pytest.mark.parametrize("case", [case for case in CASES if "q8_0" not in case.name], ids=lambda case: case.name)
def test_files_of_llama_cpps_converter_are_written_again_byte_for_byte(case: Path, tmp_path: Path) -> None:
    adapter = adaptertools.read(case / "adapter.gguf", base=case)
    assert written(adapter, tmp_path / "a.gguf").exact
    (_, one), (_, other) = contents(case / "adapter.gguf"), contents(tmp_path / "a.gguf")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", [case for case in CASES if case.name.startswith("llama")], ids=lambda case: case.name)
def test_without_a_base_such_a_file_keeps_its_own_names_and_everything_but_turning_them_works(
    case: Path, tmp_path: Path, run: Run
) -> None:
    path = case / "adapter.gguf"
    adapter = adaptertools.read(path)
    assert all(m.target.opaque and m.target.parameter.startswith(("blk", "token", "out")) for m in adapter.modules)
    assert "give --base" in adapter.notes[-1]
    written(adapter, tmp_path / "again.gguf")
    (_, one), (_, other) = contents(path), contents(tmp_path / "again.gguf")
    assert one.keys() == other.keys()
    assert run("diff", path, tmp_path / "again.gguf").code == 0
    assert run("rescale", path, tmp_path / "r.gguf", "--alpha", "1").code == 0
    assert run("truncate", path, tmp_path / "t.gguf", "--rank", "1").code == 0
    assert run("stack", path, path, tmp_path / "s.gguf").code == 0
    assert run("inspect", path).code == 0
    ran = run("convert", path, tmp_path / "peft", "--to", "peft")
    assert (ran.code, "Read the adapter with --base" in ran.err) == (1, True)
    with pytest.raises(MatchError, match="in GGUF 'qwen2'"):
        adaptertools.read(path, base=make_base(tmp_path / "other", "qwen2"))


def test_what_a_header_says_and_is_not_carried_is_named(tmp_path: Path) -> None:
    adapter = adaptertools.read(FIXTURES / "qwen2_bf16" / "adapter.gguf")
    said = {**adapter.metadata["gguf"], "about": {"general.author": "me"}, "other": {"general.tags": '["x"]'}}
    adapter = replace(adapter, metadata={"gguf": said})
    again = written(adapter, tmp_path / "a.gguf")
    assert "metadata of gguf not carried: 1 entry (general.tags)" in again.notes
    for path, name in ((tmp_path / "peft", "peft"), (tmp_path / "flax.msgpack", "flax")):
        elsewhere = adaptertools.write(adapter, path, format=name)
        assert not [note for note in elsewhere.notes if "not carried" in note]
        assert adaptertools.read(path).metadata["gguf"]["other"] == said["other"]


@pytest.mark.parametrize("name", [name for name in formats.names() if formats.get(name).CONTAINERS and name != "gguf"])
def test_rows_in_the_order_of_llama_cpp_go_into_no_other_format(name: str, tmp_path: Path, run: Run) -> None:
    path, dst = FIXTURES / "llama_f32" / "adapter.gguf", tmp_path / "out"
    ran = run("convert", path, dst, "--to", name)
    assert (ran.code, "Read the adapter with --base" in ran.err, dst.exists()) == (1, True, False)
    renamed = select(adaptertools.read(path), rename=[r"^blk\.(\d+)\.=lora_unet_\1_"])
    assert all(module.target.opaque for module in renamed.modules)
    for adapter in (renamed, replace(renamed, origin=None), replace(renamed, metadata={})):
        kept = adapter.without(Feature.EMBEDDING)
        with pytest.raises(UnsupportedFeatureError, match="Read the adapter with --base"):
            adaptertools.write(kept, dst, format=name)


def test_where_no_row_was_moved_names_are_told_without_a_base(tmp_path: Path) -> None:
    adapter = adaptertools.read(FIXTURES / "qwen2_bf16" / "adapter.gguf")
    assert {m.target.parameter for m in adapter.modules} == {layer(path) for path in FAMILIES["qwen2"].block.values()}
    written(adapter, tmp_path / "a.gguf")
    assert adaptertools.diff(adapter, adaptertools.read(tmp_path / "a.gguf"), tolerance=0.0).same


# Names.


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_every_family_are_turned_both_ways(family: str, tmp_path: Path) -> None:
    said = FAMILIES[family]
    config = {"num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2}
    base = make_base(tmp_path / "base", family, **({"text_config": config} if family == "gemma3" else {}))
    names = {f"blk.1.{tensor}": f"{said.root}.layers.1.{path}" for tensor, path in said.block.items()}
    names |= {"output": "lm_head"} if said.head else {}
    written(Adapter(modules=tuple(module(name) for name in names.values())), tmp_path / "a.gguf", base=base)
    keys, tensors = contents(tmp_path / "a.gguf")
    assert keys["general.architecture"] == said.architecture
    assert {name.removesuffix(".weight.lora_a") for name in tensors if name.endswith("_a")} == names.keys()
    for again in (adaptertools.read(tmp_path / "a.gguf"), adaptertools.read(tmp_path / "a.gguf", base=base)):
        assert {m.target.parameter for m in again.modules} == set(names.values())
    assert template("blk.1.attn_output", said) in names.values()
    assert BY_ARCHITECTURE[said.architecture].permuted == said.permuted


def test_names_that_the_family_has_not_are_noted_and_given_back(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gemma3", text_config={})
    name = "language_model.model.layers.0.self_attn.q_proj"
    written(module(name), tmp_path / "a.gguf", base=base)
    assert [m.target.parameter for m in adaptertools.read(tmp_path / "a.gguf").modules] == [name]
    assert "blk.0.attn_q.weight.lora_b" in contents(tmp_path / "a.gguf")[1]


def test_names_are_those_of_the_base_where_its_weights_are_given(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gemma3", text_config={})
    stored = {
        "language_model.model.layers.0.self_attn.v_proj.weight": torch.zeros(16, 8),
        "vision_tower.vision_model.encoder.layers.0.self_attn.v_proj.weight": torch.zeros(4, 4),
    }
    save_file(stored, base / "model.safetensors")
    written(module("model.language_model.layers.0.self_attn.v_proj"), tmp_path / "a.gguf", base=base)
    again = adaptertools.read(tmp_path / "a.gguf", base=base)
    assert [m.target.parameter for m in again.modules] == ["model.language_model.layers.0.self_attn.v_proj"]
    with pytest.raises(MatchError, match="no such parameter"):
        written(module("model.language_model.layers.0.self_attn.q_proj"), tmp_path / "b.gguf", base=base)
    with pytest.raises(ShapeError, match=r"the base has it in shape \(16, 8\)"):
        written(module("model.language_model.layers.0.self_attn.v_proj", rows=18), tmp_path / "b.gguf", base=base)
    other = make_base(tmp_path / "other", "gemma3", text_config={})
    written(module("model.language_model.layers.0.self_attn.q_proj"), tmp_path / "c.gguf", base=other)
    with pytest.raises(MatchError, match=r"blk\.0\.attn_q"):
        adaptertools.read(tmp_path / "c.gguf", base=base)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (layer("mlp.experts.3.gate_proj"), "it has no name"),
        (layer("self_attn.sinks"), "of 2 layers"),
        (layer("block_sparse_moe.gate"), "not proven"),
        ("vision_tower.layers.0.self_attn.q_proj", "it has no name"),
        ("score", "it has no name"),
    ],
)
def test_parameters_without_a_place_are_refused_by_name(name: str, said: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match=said) as raised:
        written(module(name), tmp_path / "a.gguf", base=llama)
    assert name in str(raised.value)
    assert "convert_lora_to_gguf.py" in str(raised.value)
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("model_type", ["gpt_neox", "bloom", "falcon", "deepseek_v3", "qwen3_next", "gpt2"])
def test_families_outside_the_list_are_refused_by_name(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match=f"{model_type}.*convert_lora_to_gguf"):
        written(module(layer("self_attn.q_proj")), tmp_path / "a.gguf", base=make_base(tmp_path / "base", model_type))


def test_classes_that_are_stored_otherwise_are_refused_by_name(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", architectures=["LlamaBidirectionalModel"])
    with pytest.raises(UnsupportedFeatureError, match="LlamaBidirectionalModel"):
        written(module(layer("self_attn.q_proj")), tmp_path / "a.gguf", base=base)


def test_an_opaque_name_of_another_format_is_refused(llama: Path, tmp_path: Path) -> None:
    flat = Target(parameter="lora_te_text_model_encoder_layers_0_mlp_fc1", opaque=True)
    with pytest.raises(UnsupportedFeatureError, match="could not be turned back"):
        written(module("", target=flat), tmp_path / "a.gguf", base=llama)


def test_two_names_of_one_parameter_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gemma3", text_config={})
    names = ("model.language_model.layers.0.self_attn.q_proj", "language_model.model.layers.0.self_attn.q_proj")
    with pytest.raises(UnsupportedFeatureError, match=r"blk\.0\.attn_q"):
        written(Adapter(modules=tuple(map(module, names))), tmp_path / "a.gguf", base=base)


# Rows.


@pytest.mark.parametrize(("leaf", "heads"), [("q_proj", 4), ("k_proj", 2)])
def test_rows_of_q_and_k_are_interleaved_head_by_head(leaf: str, heads: int, llama: Path, tmp_path: Path) -> None:
    before = module(layer(f"self_attn.{leaf}"), rows=16)
    written(before, tmp_path / "a.gguf", base=llama)
    stored = contents(tmp_path / "a.gguf")[1][f"blk.0.attn_{leaf[0]}.weight.lora_b"]
    half = 16 // heads // 2
    for row in range(16):
        head, within = divmod(row, 2 * half)
        source = head * 2 * half + (within % 2) * half + within // 2
        assert np.array_equal(stored[row], before.lora_B[source].numpy()), row
    again = adaptertools.read(tmp_path / "a.gguf").modules[0]
    assert torch.equal(again.lora_B, before.lora_B)


@pytest.mark.parametrize("leaf", ["self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"])
def test_other_rows_stay_where_they_are(leaf: str, llama: Path, tmp_path: Path) -> None:
    before = module(layer(leaf))
    written(before, tmp_path / "a.gguf", base=llama)
    stored = next(tensor for name, tensor in contents(tmp_path / "a.gguf")[1].items() if name.endswith("lora_b"))
    assert np.array_equal(stored, before.lora_B.numpy())


def test_without_kv_heads_there_are_as_many_as_heads(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", num_key_value_heads=None)
    before = module(layer("self_attn.k_proj"))
    written(before, tmp_path / "a.gguf", base=base)
    again = adaptertools.read(tmp_path / "a.gguf", base=make_base(tmp_path / "same", num_key_value_heads=4))
    assert torch.equal(again.modules[0].lora_B, before.lora_B)


def test_rows_that_are_not_those_of_the_heads_are_an_error_both_ways(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"12 rows.*4 heads"):
        written(module(layer("self_attn.q_proj"), rows=12), tmp_path / "a.gguf", base=llama)
    written(module(layer("self_attn.q_proj")), tmp_path / "a.gguf", base=llama)
    with pytest.raises(ShapeError, match=r"16 rows.*6 heads"):
        adaptertools.read(foreign(tmp_path / "a.gguf"), base=make_base(tmp_path / "other", num_attention_heads=6))


# Embedding and head.


def embedding(**fields: Any) -> LoraModule:
    return module("model.embed_tokens", rows=8, columns=11, kind=Kind.EMBEDDING, transposed=True, **fields)


def test_the_embedding_is_stored_turned(llama: Path, tmp_path: Path) -> None:
    before = embedding()
    written(before, tmp_path / "a.gguf", base=llama)
    tensors = contents(tmp_path / "a.gguf")[1]
    assert np.array_equal(tensors["token_embd.weight.lora_a"], before.lora_A.T.numpy())
    assert np.array_equal(tensors["token_embd.weight.lora_b"], before.lora_B.numpy())
    again = adaptertools.read(tmp_path / "a.gguf").modules[0]
    assert (again.kind, again.weight_shape) == (Kind.EMBEDDING, (11, 8))
    assert torch.equal(again.delta_weight(), before.delta_weight())


@pytest.mark.parametrize(
    "said",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": None, "model_type": "gemma3_text"},
        {"model_type": "gemma"},
    ],
)
def test_ends_of_a_tied_base_are_refused(said: dict[str, Any], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", **said)
    with pytest.raises(UnsupportedFeatureError, match="lm_head"):
        written(module("lm_head"), tmp_path / "a.gguf", base=base)
    with pytest.raises(UnsupportedFeatureError, match=r"stops when an adapter changes both.*--exclude model.embed"):
        written(embedding(), tmp_path / "a.gguf", base=base)


def test_weights_tell_whether_a_base_is_tied_where_its_configuration_does_not(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2", tie_word_embeddings=None)
    save_file({"model.embed_tokens.weight": torch.zeros(11, 8)}, base / "model.safetensors")
    with pytest.raises(UnsupportedFeatureError, match="ties its head"):
        written(embedding(), tmp_path / "a.gguf", base=base)
    stored = {"model.embed_tokens.weight": torch.zeros(11, 8), "lm_head.weight": torch.zeros(11, 8)}
    save_file(stored, base / "model.safetensors")
    written(embedding(), tmp_path / "a.gguf", base=base)


# Scaling.


def scaled(*scalings: tuple[int, float], dtype: torch.dtype = torch.float32) -> Adapter:
    """A module for each rank and scaling."""
    leaves = ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    return Adapter(
        modules=tuple(
            module(layer(leaf), rank, alpha=scaling, scale_rule=ScaleRule.DIRECT, dtype=dtype)
            for leaf, (rank, scaling) in zip(leaves, scalings, strict=False)
        )
    )


@pytest.mark.parametrize(
    ("adapter", "alpha", "exact", "folded"),
    [
        (scaled((4, 2.0), (4, 2.0)), 8.0, True, False),
        (scaled((4, 2.0), (2, 4.0), (8, 1.0)), 8.0, True, False),
        (scaled((4, -0.5), (4, -0.5)), -2.0, True, False),
        (scaled((4, 2.0), (4, 4.0)), 4.0, True, True),
        (scaled((4, 2.0), (2, 2.0)), 0.0, True, True),
        (scaled((4, 1.0), (2, 1.0)), 0.0, True, False),
        (scaled((4, 0.0), (4, 0.0)), 4.0, True, True),
        (scaled((4, 0.0), (2, 0.0)), 0.0, True, True),
        (scaled((3, 0.1), (3, 0.1)), float(np.float32(3 * 0.1)), False, False),
        (scaled((3, 0.1), (2, 0.7)), 0.0, False, True),
        (scaled((4, 1e300), (4, 1e300), dtype=torch.float32), None, False, True),
    ],
)
def test_alpha_is_stated_where_one_fits_all_and_else_folded(
    adapter: Adapter, alpha: float | None, exact: bool, folded: bool, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", "qwen2")
    if alpha is None:
        with pytest.raises(NonFiniteError):
            written(adapter, tmp_path / "a.gguf", base=base)
        return
    report = written(adapter, tmp_path / "a.gguf", base=base)
    assert report.exact == exact
    assert report.max_relative_error < 6e-8
    keys, tensors = contents(tmp_path / "a.gguf")
    assert keys["adapter.lora.alpha"] == alpha
    for m in adapter.modules:
        name = {"v": "attn_v", "o": "attn_output", "u": "ffn_up", "d": "ffn_down"}[m.target.parameter.split(".")[-1][0]]
        lora_a, lora_b = (tensors[f"blk.0.{name}.weight.lora_{part}"].astype(np.float64) for part in "ab")
        scale = alpha / lora_b.shape[1] if alpha else 1.0  # as llama-adapter.h has it
        expected = m.delta_weight(dtype=torch.float64).numpy()
        assert np.allclose(scale * lora_b @ lora_a, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())
        assert np.array_equal(lora_b, m.lora_B.double().numpy()) == (not folded)
    assert_diff_proves(adapter, adaptertools.read(tmp_path / "a.gguf"), report)


def test_an_alpha_that_float32_rounds_leaves_the_factors_in_their_dtype(tmp_path: Path) -> None:
    adapter = scaled((3, 0.1), (3, 0.1), dtype=torch.bfloat16)
    report = written(adapter, tmp_path / "a.gguf", base=make_base(tmp_path / "base", "qwen2"))
    assert [loss.tensor for loss in report.losses] == ["adapter.lora.alpha"]
    assert {m.lora_B.dtype for m in adaptertools.read(tmp_path / "a.gguf").modules} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_every_dtype_is_written_as_asked_for(dtype: str, llama: Path, tmp_path: Path) -> None:
    report = written(module(layer("self_attn.q_proj")), tmp_path / "a.gguf", base=llama, dtype=dtype)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds == {dtype.upper()}
    assert report.exact == (dtype == "f32")


def test_float64_is_refused_unless_a_dtype_is_given(llama: Path, tmp_path: Path) -> None:
    wide = module(layer("self_attn.q_proj"), dtype=torch.float64)
    with pytest.raises(UnsupportedFeatureError, match=r"float64.*--dtype f32"):
        written(wide, tmp_path / "a.gguf", base=llama)
    written(wide, tmp_path / "a.gguf", base=llama, dtype="f32")


# The header.


def test_the_header_says_what_llama_cpp_asks_for_and_who_the_base_is(llama: Path, tmp_path: Path) -> None:
    adapter = Adapter(
        modules=(module(layer("self_attn.q_proj")),),
        bases={"": Base(id="org/Model-7B", revision="abc")},
        invocation_tokens=(3, 4),
    )
    written(adapter, tmp_path / "a.gguf", base=llama, operation=HistoryEntry(operation="test"))
    keys = contents(tmp_path / "a.gguf")[0]
    record = json.loads(keys.pop("adaptertools"))
    assert keys == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
        "adapter.alora.invocation_tokens": [3, 4],
        "general.base_model.count": 1,
        "general.base_model.0.name": "Model-7B",
        "general.base_model.0.organization": "org",
        "general.base_model.0.repo_url": "https://huggingface.co/org/Model-7B",
    }
    facts = {"model_type": "llama", "layers": 2, "heads": 4, "kv_heads": 2, "tied": False}
    history = [{"operation": "test", "format": "gguf"}]
    assert record == {"base": facts, "revision": "abc", "history": history}
    again = adaptertools.read(tmp_path / "a.gguf")
    assert again.bases[""] == Base(id="org/Model-7B", revision="abc")
    assert again.invocation_tokens == (3, 4)
    assert [entry.operation for entry in again.history] == ["test"]


def test_a_base_that_is_no_repository_keeps_its_name(llama: Path, tmp_path: Path) -> None:
    adapter = Adapter(modules=(module(layer("self_attn.q_proj")),), bases={"": Base(id="/models/mine")})
    written(adapter, tmp_path / "a.gguf", base=llama)
    assert "general.base_model.0.repo_url" not in contents(tmp_path / "a.gguf")[0]
    assert adaptertools.read(tmp_path / "a.gguf").bases[""].id == "/models/mine"


def their_file(path: Path, *, alpha: float | None = 2.0, extra: dict[str, np.ndarray] | None = None) -> Path:
    """An adapter as another program may write it."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_string("adapter.lora.task_name", "classify")
    writer.add_name("Mine")
    writer.add_quantization_version(2)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    tensors = {"blk.3.attn_v.weight.lora_a": np.ones((2, 8)), "blk.3.attn_v.weight.lora_b": np.ones((6, 2))}
    for name, tensor in {**tensors, **(extra or {})}.items():
        writer.add_tensor(name, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_others_say_of_an_adapter_is_written_again(tmp_path: Path) -> None:
    adapter = adaptertools.read(their_file(tmp_path / "a.gguf"))
    written(adapter, tmp_path / "b.gguf")
    keys = contents(tmp_path / "b.gguf")[0]
    assert (keys["general.name"], keys["adapter.lora.task_name"]) == ("Mine", "classify")


@pytest.mark.parametrize(("alpha", "scaling"), [(2.0, 1.0), (3.0, 1.5), (0.0, 1.0), (None, 1.0)])
def test_alpha_zero_or_none_scales_nothing(alpha: float | None, scaling: float, tmp_path: Path) -> None:
    adapter = adaptertools.read(their_file(tmp_path / "a.gguf", alpha=alpha))
    assert adapter.modules[0].scaling == scaling
    assert bool(adapter.notes) == (alpha is None)


def test_trained_norms_are_left_out_only_where_that_is_asked_for(tmp_path: Path) -> None:
    path = their_file(tmp_path / "a.gguf", extra={"blk.3.attn_norm.weight": np.ones(8)})
    with pytest.raises(UnclaimedTensorError, match="ignore_norms"):
        adaptertools.read(path)
    adapter = adaptertools.read(path, ignore_norms=True)
    assert len(adapter.modules) == 1
    assert "1 norm that" in adapter.notes[0]


def test_an_architecture_that_is_not_known_keeps_its_names(tmp_path: Path) -> None:
    data = their_file(tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(data.replace(b"qwen2", b"rwkv6"))
    adapter = adaptertools.read(tmp_path / "b.gguf")
    assert str(adapter.modules[0].target) == "blk.3.attn_v"
    assert "not known here" in adapter.notes[-1]
    written(adapter, tmp_path / "c.gguf")
    assert contents(tmp_path / "c.gguf")[0]["general.architecture"] == "rwkv6"


def test_our_record_of_another_architecture_is_an_error(llama: Path, tmp_path: Path) -> None:
    written(module(layer("self_attn.v_proj")), tmp_path / "a.gguf", base=llama)
    data = (tmp_path / "a.gguf").read_bytes()
    at = data.index(b"llama")
    (tmp_path / "a.gguf").write_bytes(data[:at] + b"qwen3" + data[at + 5 :])
    with pytest.raises(ConfigError, match="noted as 'llama'"):
        adaptertools.read(tmp_path / "a.gguf")


# The base, and where files stand.


def test_a_base_is_asked_for(tmp_path: Path, run: Run, plain: Adapter) -> None:
    with pytest.raises(OptionError, match=r"give base=DIR \(--base DIR\)"):
        written(plain, tmp_path / "a.gguf")
    adaptertools.write(plain, tmp_path / "peft", format="peft")
    ran = run("convert", tmp_path / "peft", tmp_path / "a.gguf", "--to", "gguf")
    assert (ran.code, "--base DIR" in ran.err) == (2, True)


@pytest.mark.parametrize("given", ["folder", "file", "weights"])
def test_a_base_may_be_a_folder_a_configuration_or_a_model(
    given: str, llama: Path, plain: Adapter, tmp_path: Path, run: Run
) -> None:
    if given == "weights":
        stored = {f"{m.target.parameter}.weight": torch.zeros(m.weight_shape) for m in plain.modules}
        save_file(stored, llama / "model.safetensors")
    adaptertools.write(plain, tmp_path / "peft", format="peft")
    base = llama / "config.json" if given == "file" else llama
    ran = run("convert", tmp_path / "peft", tmp_path / "a.gguf", "--to", "gguf", "--base", base, "--json")
    assert (ran.code, ran.json["notes"]) == (0, [])
    again = run("convert", tmp_path / "a.gguf", tmp_path / "again", "--to", "peft")
    assert again.code == 0, again.err
    assert run("diff", tmp_path / "peft", tmp_path / "again", "--tolerance", "0").code == 0


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num_attention_heads": "four"}, "num_attention_heads is 'four'"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ],
)
def test_a_configuration_that_does_not_say_enough_is_an_error(
    said: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        written(module(layer("mlp.up_proj")), tmp_path / "a.gguf", base=make_base(tmp_path / "base", **said))


def test_heads_are_asked_for_only_where_they_decide_something(tmp_path: Path) -> None:
    none = {"num_attention_heads": None, "num_key_value_heads": None}
    base = make_base(tmp_path / "gemma", "gemma3", num_hidden_layers=None, **none, text_config={"num_hidden_layers": 2})
    written(module("model.language_model.layers.1.self_attn.q_proj"), tmp_path / "a.gguf", base=base)
    record = json.loads(contents(tmp_path / "a.gguf")[0]["adaptertools"])
    assert record["base"] == {"model_type": "gemma3", "layers": 2, "tied": False}


def test_weights_without_a_configuration_do_not_suffice(tmp_path: Path) -> None:
    save_file({"x.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        written(module(layer("mlp.up_proj")), tmp_path / "a.gguf", base=tmp_path / "model.safetensors")


def test_in_memory_it_is_the_same(llama: Path) -> None:
    adapter = Adapter(modules=(module(layer("self_attn.q_proj")), embedding()))
    tensors, config = adapter.to_state_dict(format="gguf", base=llama)
    assert adaptertools.diff(adapter, adaptertools.from_state_dict(tensors, config, format="gguf"), tolerance=0.0).same


def test_a_folder_with_one_file_is_read_and_with_several_asks_which(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    written(module(layer("mlp.up_proj")), folder / "a.gguf", base=llama)
    (folder / "README.md").write_text("# mine")
    assert len(adaptertools.read(folder).modules) == 1
    written(module(layer("mlp.up_proj")), folder / "b.gguf", base=llama)
    with pytest.raises(AmbiguousFormatError, match=r"a\.gguf, b\.gguf"):
        adaptertools.read(folder)


def test_a_model_is_named_as_one(tmp_path: Path, run: Run) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((6, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(NotLoraError, match="this is a llama model, no LoRA adapter"):
        adaptertools.read(tmp_path / "model.gguf")
    assert run("inspect", tmp_path / "model.gguf").code == 1


def test_names_without_the_gguf_package_name_the_extra(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(module(layer("mlp.up_proj")), tmp_path / "a.gguf", base=llama)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"adaptertools\[gguf\]"):
        written(module(layer("mlp.up_proj")), tmp_path / "b.gguf", base=llama)
    assert len(adaptertools.read(tmp_path / "a.gguf").modules) == 1, "our record and the family's names suffice"


def test_a_linear_weight_that_is_stored_in_out_is_refused(llama: Path, tmp_path: Path) -> None:
    turned = replace(module(layer("mlp.up_proj")), transposed=True)
    with pytest.raises(UnsupportedFeatureError, match=r"stored \(in, out\)"):
        written(turned, tmp_path / "a.gguf", base=llama)


def test_several_models_are_refused_and_one_is_said(llama: Path, tmp_path: Path) -> None:
    one, other = (
        module("", target=Target(parameter=layer("mlp.up_proj"), component=name))
        for name in ("text_encoder", "text_encoder_2")
    )
    with pytest.raises(UnsupportedFeatureError, match=r"several models .*--only 'COMPONENT:\*'"):
        written(Adapter(modules=(one, other)), tmp_path / "a.gguf", base=llama)
    assert "'text_encoder'" in written(one, tmp_path / "a.gguf", base=llama).notes[0]


@pytest.mark.parametrize(
    "target",
    [
        Target(parameter="conv_in", component="unet"),
        Target(parameter="transformer_blocks_0_attn_to_q", component="transformer", opaque=True),
        Target(parameter="text_model.encoder.layers.0.self_attn.q_proj", component="text_encoder"),
        Target(parameter="mid_block.attentions.0.to_q"),
    ],
    ids=str,
)
def test_adapters_of_image_models_are_refused_as_such_and_no_base_is_asked_for(target: Target, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="GGUF adapters are for language models") as raised:
        written(module("", target=target), tmp_path / "a.gguf")
    assert str(target) in str(raised.value)
    assert "--base" not in str(raised.value)


def test_t5_is_no_image_model_but_a_family_that_is_refused(llama: Path, tmp_path: Path) -> None:
    t5 = Target(parameter="encoder.block.0.layer.0.SelfAttention.q")
    with pytest.raises(UnsupportedFeatureError, match="no name") as raised:
        written(module("", target=t5), tmp_path / "a.gguf", base=llama)
    assert "image" not in str(raised.value)


def test_an_image_model_is_named_before_its_convolutions(tmp_path: Path, run: Run) -> None:
    unet = FIXTURES.parent / "kohya" / "unet_and_text_encoder" / "adapter.safetensors"
    ran = run("convert", unet, tmp_path / "a.gguf", "--to", "gguf")
    assert (ran.code, "GGUF adapters are for language models" in ran.err, "--drop" in ran.err) == (1, True, False)


def test_that_a_configuration_is_enough_is_said_where_a_gguf_adapter_is_meant(llama: Path, tmp_path: Path) -> None:
    said = "For GGUF adapters its config.json is enough"
    written(module(layer("self_attn.v_proj")), tmp_path / "a.gguf", base=llama)
    adapter = adaptertools.read(tmp_path / "a.gguf")
    with pytest.raises(UnknownFormatError, match=f"cannot be the base model here.*{said}"):
        adaptertools.read(tmp_path / "a.gguf", base=tmp_path / "a.gguf")
    with pytest.raises(UnknownFormatError, match=said):
        written(adapter, tmp_path / "b.gguf", base=tmp_path / "a.gguf")
    adaptertools.write(adapter, tmp_path / "peft", format="peft")
    with pytest.raises(UnknownFormatError, match="Give the Hugging Face folder") as raised:
        adaptertools.read(tmp_path / "peft", base=tmp_path / "a.gguf")
    assert "config.json" not in str(raised.value)


# A base that is another.


LLAMA_BASE = Path(__file__).parents[1] / "fixtures" / "base" / "llama_tiny"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_a_base_whose_weights_have_other_shapes_is_refused_when_a_file_is_read(tmp_path: Path, run: Run) -> None:
    """Its heads would order the rows of q and k wrongly, and no row tells."""
    base = tmp_path / "base"
    shutil.copytree(LLAMA_BASE, base)
    config = json.loads((base / "config.json").read_text())
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    (base / "config.json").write_text(json.dumps(config))
    ran = run("convert", FIXTURES / "llama_f32" / "adapter.gguf", tmp_path / "out", "--to", "peft", "--base", base)
    assert ran.code == 1
    assert "mlp.down_proj: the base has it in shape (32, 88), the adapter is for (32, 48)" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"hidden_size": 64}, "q_proj: the base has it in shape"),
        ({"intermediate_size": 64}, r"down_proj: the base has it in shape \(32, 64\), the adapter is for \(32, 48\)"),
        ({"num_attention_heads": 2, "head_dim": 8}, r"q_proj: the base has it in shape \(16, 32\)"),
        ({"num_key_value_heads": 4}, r"[kv]_proj: the base has it in shape \(32, 32\)"),
    ],
)
@pytest.mark.parametrize("way", ["read", "write"])
def test_a_configuration_that_says_other_sizes_is_refused_both_ways(
    way: str, said: dict[str, Any], what: str, tmp_path: Path
) -> None:
    right, wrong = make_base(tmp_path / "right", **SIZES), make_base(tmp_path / "wrong", **(SIZES | said))
    sizes = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32)}
    modules = [module(layer(f"self_attn.{leaf}"), rows=rows, columns=n) for leaf, (rows, n) in sizes.items()]
    modules += [module(layer("mlp.down_proj"), rows=32, columns=48)]
    # what hides a wrong q behind down_proj, or the reverse, is left out
    if "intermediate_size" in said:
        modules = modules[-1:]
    adapter = Adapter(modules=tuple(modules))
    written(adapter, tmp_path / "a.gguf", base=right)
    theirs = foreign(tmp_path / "a.gguf")
    assert len(adaptertools.read(theirs, base=right).modules) == len(modules)
    ways = {
        "read": lambda: adaptertools.read(theirs, base=wrong),
        "write": lambda: written(adapter, tmp_path / "b.gguf", base=wrong),
    }
    with pytest.raises(ShapeError, match=what):
        ways[way]()


def foreign(path: Path) -> Path:
    """The file without our record, as another program would have written it."""
    file, changed = Source(path).tensors(path.name), path.with_name("foreign.gguf")
    header = {key: value for key, value in file.metadata.items() if key != HEADER_KEY}
    gguf_container.write(changed, file.tensors, header)
    return changed


def test_heads_that_the_file_itself_says_otherwise_are_refused(llama: Path, tmp_path: Path) -> None:
    written(module(layer("self_attn.q_proj")), tmp_path / "a.gguf", base=llama)
    other = make_base(tmp_path / "other", num_attention_heads=2)
    with pytest.raises(MatchError, match=r"made for a base of 4 heads.* the base given has 2 and 2"):
        adaptertools.read(tmp_path / "a.gguf", base=other)


def test_a_layer_that_the_base_does_not_have_is_said_both_ways(llama: Path, tmp_path: Path) -> None:
    deeper = make_base(tmp_path / "deeper", num_hidden_layers=9)
    adapter = Adapter(modules=(module(layer("self_attn.v_proj", 7)),))
    with pytest.raises(MatchError, match=r"model\.layers\.7.* layer 7, and the base has only 2 layers"):
        written(adapter, tmp_path / "a.gguf", base=llama)
    written(adapter, tmp_path / "a.gguf", base=deeper)
    with pytest.raises(MatchError, match=r"blk\.7\.attn_v.* layer 7, and the base has only 2 layers"):
        adaptertools.read(tmp_path / "a.gguf", base=llama)


# Real files.

REAL = Path(__file__).parents[2] / "shared" / "real"
DISCOLLAMA = REAL / "mlx_discollama_llama3_8b"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not there")
def test_a_real_base_model_is_no_adapter() -> None:
    with pytest.raises(NotLoraError, match="this is a llama model"):
        adaptertools.read(REAL / "base_tiny_llama_gguf")


@pytest.mark.skipif(not DISCOLLAMA.is_dir(), reason="the real files are not there")
def test_a_real_mlx_adapter_becomes_what_another_converter_made_of_it_but_for_the_rows_of_q(tmp_path: Path) -> None:
    """Ollama's, which leaves the rows of q as they are and moves columns of lora_a, unlike what llama.cpp reads."""
    base = make_base(tmp_path / "base", num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    reading = {"base": base, "format": "mlx"}
    adaptertools.convert(DISCOLLAMA, tmp_path / "a.gguf", to="gguf", dtype="f16", read_options=reading)
    keys, tensors = contents(tmp_path / "a.gguf")
    theirs = json.loads((DISCOLLAMA / "expected_gguf_discollama.json").read_text())
    assert keys["adapter.lora.alpha"] == float(theirs["adapter.lora.alpha"])
    same = {name for name, tensor in tensors.items() if sha256(tensor) == theirs[name]}
    assert same == {name for name in tensors if "attn_v" in name}
    for m in adaptertools.read(DISCOLLAMA, format="mlx").modules:
        if m.target.parameter.endswith("q_proj"):
            stored = theirs[f"blk.{m.target.parameter.split('.')[2]}.attn_q.weight.lora_b"]
            assert sha256(m.lora_B.half().numpy()) == stored


def sha256(tensor: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest()
