"""MLX: what mlx-lm made is read as it fuses it, what we write reads back, and what it cannot hold is refused."""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Ran
from hub_server import HubServer
from safetensors.torch import load_file, save_file

import adaptertools
from adaptertools import formats
from adaptertools.adapter import Adapter, Base, HistoryEntry, Kind, LoraModule, RowSlice, ScaleRule, Target
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.source import Source
from adaptertools.errors import (
    AmbiguousFormatError,
    ConfigError,
    MatchError,
    MissingAlphaError,
    OptionError,
    ShapeError,
    UnsupportedFeatureError,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = sorted(path.name for path in (FIXTURES / "mlx").iterdir())
REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no folder of real adapters beside the checkout")

CONFIG: dict[str, Any] = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 2, "scale": 2.0}}


def options(case: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((FIXTURES / "mlx" / case / "case.json").read_text())["read"]
    return read


def claims(path: Path) -> list[str]:
    """Every format that takes it for its own."""
    return [name for name in formats.names() if formats.get(name).detect(Source(path))]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def linear(name: str, rank: int = 2, alpha: float = 4.0, n_in: int = 6, n_out: int = 5, **more: Any) -> LoraModule:
    fields: dict[str, Any] = {"target": Target(parameter=name), "alpha": alpha, **more}
    return LoraModule(lora_A=random(rank, n_in), lora_B=random(n_out, rank, seed=1), **fields)


def stack(name: str, rank: int = 2, experts: int = 3, n_in: int = 6, n_out: int = 4, **more: Any) -> LoraModule:
    fields: dict[str, Any] = {"target": Target(parameter=name), "kind": Kind.PARAMETER, "transposed": False, **more}
    return LoraModule(
        lora_A=random(experts, rank, n_in), lora_B=random(experts, n_out, rank, seed=1), alpha=4.0, **fields
    )


def written(
    tmp_path: Path, *modules: LoraModule, **how: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any], Adapter]:
    """The tensors and the configuration of a written folder, and what is read of it."""
    folder = adaptertools.write(Adapter(modules=modules), tmp_path / "out", format="mlx", **how).path
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    return load_file(tmp_path / "out" / "adapters.safetensors"), config, adaptertools.read(str(folder))


def save(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "adapters.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def pair(name: str, n_in: int = 6, n_out: int = 5, rank: int = 2) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_a": random(n_in, rank), f"{name}.lora_b": random(rank, n_out, seed=1)}


def base(tensors: Mapping[str, tuple[int, ...]], **config: Any) -> Checkpoint:
    """The headers of a base model with these shapes."""
    shapes = dict(tensors)
    return Checkpoint(shapes=shapes, dtypes=dict.fromkeys(shapes, torch.float32), config=config, label="base")


def read_with(folder: Path, model: Checkpoint) -> Adapter:
    found: Adapter = formats.get("mlx").read(Source(folder), base=model)
    return found


# What mlx-lm made


@pytest.mark.parametrize("case", CASES)
def test_what_mlx_lm_made_is_read_as_it_fuses_it(case: str) -> None:
    folder = FIXTURES / "mlx" / case
    adapter = adaptertools.read(folder, **options(case))
    expected = load_file(folder / "expected.safetensors")
    weights = load_file(folder / "base.safetensors") if (folder / "base.safetensors").exists() else {}
    assert {module.target.parameter for module in adapter.modules} == expected.keys()
    for module in adapter.modules:
        name = module.target.parameter
        delta = module.delta_weight(base_weight=weights.get(f"{name}.weight"))
        assert torch.allclose(delta, expected[name], atol=2e-6, rtol=1e-5), name


@pytest.mark.parametrize("case", CASES)
def test_it_is_mlx_and_nothing_else(case: str) -> None:
    assert claims(FIXTURES / "mlx" / case) == ["mlx"]
    (weights,) = [path for path in (FIXTURES / "mlx" / case).iterdir() if "adapters." in path.name]
    assert claims(weights) == ["mlx"]


@pytest.mark.parametrize("case", CASES)
def test_what_mlx_lm_made_is_written_again_as_it_was(case: str, tmp_path: Path) -> None:
    adapter = adaptertools.read(FIXTURES / "mlx" / case, **options(case))
    report = adaptertools.write(adapter, tmp_path / "out", format="mlx")
    assert report.exact
    assert claims(tmp_path / "out") == ["mlx"]
    assert adaptertools.diff(adapter, adaptertools.read(tmp_path / "out"), tolerance=0).same


def test_the_fixtures_hold_what_they_are_for() -> None:
    found = {case: adaptertools.read(FIXTURES / "mlx" / case, **options(case)) for case in CASES}
    assert {m.kind for m in found["embeddings_and_head"].modules} == {Kind.LINEAR, Kind.EMBEDDING}
    assert {m.magnitude_axis for m in found["dora"].modules} == {"out"}
    assert {m.magnitude_axis for m in found["dora_embeddings"].modules} == {"in"}
    assert [m.experts for m in found["experts_before_october_2025"].modules] == [3]
    assert {m.lora_A.dtype for m in found["bf16"].modules} == {torch.bfloat16}
    assert {m.scaling for m in found["npz_without_a_configuration"].modules} == {20.0}
    assert {adapter.bases[""].id for adapter in found.values()} == {"org/tiny", None}


# How the scale is found


def test_a_file_without_a_scale_asks_for_it(tmp_path: Path, run: Callable[..., Ran]) -> None:
    folder = FIXTURES / "mlx" / "npz_without_a_configuration"
    with pytest.raises(MissingAlphaError, match=r"not there.*scale=… in Python, --in scale=….*Customary is 20"):
        adaptertools.read(folder)
    assert {m.scaling for m in adaptertools.read(folder, alpha=16).modules} == {4.0}
    ran = run("convert", folder, tmp_path / "peft", "--to", "peft", "--in", "scale=20")
    assert ran.code == 0, ran.err
    assert {m.scaling for m in adaptertools.read(tmp_path / "peft").modules} == {20.0}
    with pytest.raises(OptionError, match="both given"):
        adaptertools.read(folder, alpha=16, scale=2.0)
    for scale in (float("nan"), True, 10**400):
        with pytest.raises(OptionError, match="expected a finite number"):
            adaptertools.read(folder, scale=scale)


def test_a_scale_that_is_stated_is_not_overruled(tmp_path: Path) -> None:
    folder = save(tmp_path, pair("q_proj"))
    assert adaptertools.read(folder, scale=2.0).modules[0].scaling == 2.0
    for given in ({"scale": 4.0}, {"alpha": 4}):
        with pytest.raises(OptionError, match=r"states scale 2\.0.*rescale it"):
            adaptertools.read(folder, **given)


def test_an_alpha_beside_the_scale_does_not_count_and_is_noted(tmp_path: Path) -> None:
    parameters = {"rank": 2, "alpha": 16, "scale": 10.0, "dropout": 0.0}
    folder = save(tmp_path, pair("q_proj"), {"lora_layers": 4, "lora_parameters": parameters})
    adapter = adaptertools.read(folder)
    assert adapter.modules[0].scaling == 10.0
    assert any("June 2024" in note and "scale=80" in note for note in adapter.notes)
    assert adaptertools.read(folder, scale=80.0).modules[0].scaling == 80.0
    assert adaptertools.read(folder, scale=80.0).notes == ()
    with pytest.raises(OptionError, match="rescale"):
        adaptertools.read(folder, alpha=16)
    same = save(tmp_path / "same", pair("q_proj"), {"lora_layers": 4, "lora_parameters": {**parameters, "alpha": 2}})
    assert adaptertools.read(same).notes == ()


def test_early_configurations_say_dora_in_another_way(tmp_path: Path) -> None:
    config = {"lora_layers": 4, "use_dora": True, "lora_parameters": {"rank": 2, "scale": 1.0}}
    folder = save(tmp_path, {**pair("q_proj"), "q_proj.m": random(5).abs()}, config)
    (module,) = adaptertools.read(folder).modules
    assert module.magnitude is not None
    with pytest.raises(ConfigError, match='"fine_tune_type": "dora"'):
        adaptertools.read(save(tmp_path, {**pair("q_proj"), "q_proj.m": random(5).abs()}))


def test_a_rank_that_the_factors_do_not_have_is_noted(tmp_path: Path) -> None:
    adapter = adaptertools.read(save(tmp_path, pair("q_proj", rank=3)))
    assert adapter.modules[0].rank == 3
    assert any("says rank 2, the factors have 3" in note for note in adapter.notes)


# Embeddings look like linear layers


@pytest.mark.parametrize(
    ("name", "embedding"),
    [
        ("model.embed_tokens", True),
        ("model.wte", True),
        ("transformer.wpe", True),
        ("model.embedders.3", True),
        ("model.layers.0.mlp.down_proj", False),
        ("embed_out", False),
        ("lm_head", False),
    ],
)
def test_a_name_tells_an_embedding_where_nothing_else_does(name: str, embedding: bool, tmp_path: Path) -> None:
    tensors = pair(name, n_in=11, n_out=5)
    (module,) = adaptertools.read(save(tmp_path, tensors)).modules
    assert (module.kind is Kind.EMBEDDING) == embedding
    product = 2.0 * tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]
    assert torch.allclose(module.delta_weight(), product if embedding else product.mT)


def test_the_base_tells_an_embedding_whatever_its_name(tmp_path: Path) -> None:
    folder = save(tmp_path, {**pair("model.words", 11, 5), **pair("model.wte", 11, 5), **pair("h.0.c_attn", 6, 9)})
    shapes = {"model.words.weight": (11, 5), "model.wte.weight": (5, 11), "h.0.c_attn.weight": (6, 9)}
    words, wte, c_attn = (
        {m.target.parameter: m for m in read_with(folder, base(shapes, model_type="gpt2")).modules}[name]
        for name in ("model.words", "model.wte", "h.0.c_attn")
    )
    assert wte.kind is Kind.LINEAR
    assert words.kind is Kind.LINEAR  # of GPT-2, whose projections are stored (in, out)
    assert (c_attn.kind, c_attn.transposed, c_attn.weight_shape) == (Kind.LINEAR, True, (6, 9))
    found = {m.target.parameter: m for m in read_with(folder, base(shapes, model_type="llama")).modules}
    assert found["model.words"].kind is Kind.EMBEDDING
    assert found["model.words"].weight_shape == (11, 5)


def test_an_option_tells_an_embedding(tmp_path: Path, run: Callable[..., Ran]) -> None:
    folder = save(tmp_path, {**pair("model.words", 11, 5), **pair("model.types", 3, 5), **pair("q_proj")})
    found = adaptertools.read(folder, embeddings="model.words, types")
    assert {m.target.parameter for m in found.modules if m.kind is Kind.EMBEDDING} == {"model.words", "model.types"}
    with pytest.raises(OptionError, match="wurds fits no module"):
        adaptertools.read(folder, embeddings="wurds")
    assert run("inspect", folder, "--in", "embeddings=words").code == 0


@pytest.mark.parametrize(("length", "kind"), [(11, Kind.EMBEDDING), (5, Kind.LINEAR)])
def test_the_length_of_a_magnitude_tells_an_embedding(length: int, kind: Kind, tmp_path: Path) -> None:
    tensors = {**pair("model.words", 11, 5), "model.words.m": random(length).abs()}
    (module,) = adaptertools.read(save(tmp_path, tensors, {**CONFIG, "fine_tune_type": "dora"})).modules
    assert module.kind is kind


def test_our_own_files_say_what_is_an_embedding(tmp_path: Path) -> None:
    table = linear("model.words", kind=Kind.EMBEDDING, transposed=True)
    matrix = linear("model.wte", n_in=7)
    _, _, again = written(tmp_path, table, matrix)
    assert {m.target.parameter: m.kind for m in again.modules} == {
        "model.words": Kind.EMBEDDING,
        "model.wte": Kind.LINEAR,
    }


def test_an_embedding_held_the_other_way_round_is_turned(tmp_path: Path) -> None:
    table = linear("model.embed_tokens", n_in=5, n_out=11, kind=Kind.EMBEDDING, transposed=False)
    tensors, _, again = written(tmp_path, table)
    assert tuple(tensors["model.embed_tokens.lora_a"].shape) == (11, 2)
    assert torch.equal(again.modules[0].delta_weight(dtype=torch.float64), table.delta_weight(dtype=torch.float64))


# What is written


def test_a_common_scaling_is_stated_and_the_factors_stay_as_they_are(tmp_path: Path) -> None:
    modules = [linear("q", rank=2, alpha=6.0), linear("v", rank=2, alpha=3.0, scale_rule=ScaleRule.DIRECT)]
    tensors, config, again = written(tmp_path, *modules)
    assert config["lora_parameters"] == {"dropout": 0.0, "keys": ["q", "v"], "rank": 2, "scale": 3.0}
    assert (config["num_layers"], config["fine_tune_type"]) == (-1, "lora")
    assert "alpha" not in config["lora_parameters"]
    for module in modules:
        name = module.target.parameter
        assert torch.equal(tensors[f"{name}.lora_a"], module.lora_A.T)
        assert torch.equal(tensors[f"{name}.lora_b"], module.lora_B.T)
    assert {module.scaling for module in again.modules} == {3.0}


def test_rslora_is_but_a_scale(tmp_path: Path) -> None:
    _, config, again = written(tmp_path, linear("q", rank=3, alpha=5.0, scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK))
    assert config["lora_parameters"]["scale"] == 5.0 / 3**0.5
    assert again.modules[0].scaling == 5.0 / 3**0.5


def test_scalings_that_differ_are_folded_and_lower_ranks_filled_with_zeros(tmp_path: Path) -> None:
    modules = [linear("q", rank=2, alpha=4.0), linear("v", rank=5, alpha=40.0)]
    tensors, config, again = written(tmp_path, *modules)
    assert (config["lora_parameters"]["scale"], config["lora_parameters"]["rank"]) == (1.0, 5)
    assert {tensor.shape[tensor.shape.index(5)] for tensor in tensors.values()} == {5}
    assert not tensors["q.lora_a"][:, 2:].any()
    assert not tensors["q.lora_b"][2:].any()
    assert torch.equal(tensors["v.lora_b"], 8 * modules[1].lora_B.T)
    assert [module.rank for module in again.modules] == [2, 5]
    assert adaptertools.diff(Adapter(modules=tuple(modules)), again, tolerance=0).same


def test_one_scaling_of_several_ranks_changes_no_bit(tmp_path: Path) -> None:
    modules = [linear("q", rank=2, alpha=0.6), linear("v", rank=5, alpha=1.5)]
    assert modules[0].scaling == modules[1].scaling
    tensors, config, _ = written(tmp_path, *modules)
    assert config["lora_parameters"]["scale"] == 0.3
    assert torch.equal(tensors["q.lora_b"][:2], modules[0].lora_B.T)


def test_keys_are_whole_paths_in_the_order_of_layers(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (10, 2)]
    _, config, _ = written(tmp_path, *map(linear, [*names, "lm_head"]))
    assert config["lora_parameters"]["keys"] == ["lm_head", names[1], names[0]]


def test_dora_needs_a_magnitude_everywhere(tmp_path: Path) -> None:
    both = [linear("q", magnitude=random(5).abs()), linear("v")]
    with pytest.raises(UnsupportedFeatureError, match=r"v has no DoRA magnitude.*--drop dora"):
        written(tmp_path, *both)
    tensors, config, again = written(tmp_path, both[0])
    assert config["fine_tune_type"] == "dora"
    assert torch.equal(tensors["q.m"], both[0].magnitude)
    assert torch.equal(again.modules[0].magnitude, both[0].magnitude)
    shutil.rmtree(tmp_path / "out")
    _, config, _ = written(tmp_path, *both, drop=["dora"])
    assert config["fine_tune_type"] == "lora"


def test_magnitudes_along_the_other_axis_are_refused(tmp_path: Path) -> None:
    table = linear("model.embed_tokens", kind=Kind.EMBEDDING, transposed=True, magnitude=random(5).abs())
    with pytest.raises(UnsupportedFeatureError, match=r"embed_tokens.*magnitude for each token"):
        written(tmp_path, table)
    with pytest.raises(UnsupportedFeatureError, match=r"q: mlx-lm has a DoRA magnitude for each output feature"):
        written(tmp_path, linear("q", magnitude=random(6).abs(), magnitude_axis="in"))
    _, _, again = written(tmp_path, replace(table, magnitude=random(6).abs(), magnitude_axis="in"))
    assert again.modules[0].magnitude_axis == "in"


def test_the_configuration_of_the_run_goes_along(tmp_path: Path) -> None:
    config = {**CONFIG, "model": "org/tiny", "iters": 600, "seed": 7, "something_new": {"a": [1]}}
    config["lora_parameters"] = {**CONFIG["lora_parameters"], "dropout": 0.05}
    adapter = adaptertools.read(save(tmp_path / "in", pair("q_proj"), config))
    assert adapter.metadata["mlx"]["something_new"] == {"a": [1]}
    adaptertools.write(adapter, tmp_path / "out", format="mlx")
    again = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    expected = {**config, "num_layers": -1}
    expected["lora_parameters"] = {"rank": 2, "scale": 2.0, "dropout": 0.05, "keys": ["q_proj"]}
    assert again == expected


def test_the_base_the_history_and_the_dropout_of_peft_go_along(tmp_path: Path) -> None:
    adapter = Adapter(
        modules=(linear("q_proj"),),
        bases={"": Base(id="org/tiny", revision="abc")},
        history=(HistoryEntry(operation="truncate", details={"rank": 2}),),
        metadata={"peft": {"lora_dropout": 0.1}},
    )
    adaptertools.write(adapter, tmp_path / "out", format="mlx")
    again = adaptertools.read(tmp_path / "out")
    assert again.bases == adapter.bases
    assert again.history == adapter.history
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_parameters"]["dropout"] == 0.1


def test_a_configuration_with_nan_is_read_without_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", pair("q_proj"), {**CONFIG, "learning_rate": float("nan"), "iters": 3})
    adapter = adaptertools.read(folder)
    assert adapter.metadata["mlx"] == {"iters": 3}
    assert any("learning_rate is nan and is not kept" in note for note in adapter.notes)


# Experts


def test_a_stack_is_read_the_other_way_round_than_a_matrix(tmp_path: Path) -> None:
    lora_a, lora_b = random(3, 2, 6), random(3, 4, 2)
    name = "model.layers.0.mlp.switch_mlp.gate_proj"
    adapter = adaptertools.read(save(tmp_path / "in", {f"{name}.lora_a": lora_a, f"{name}.lora_b": lora_b}))
    (module,) = adapter.modules
    assert module.target == Target(parameter=name, opaque=True)
    assert torch.allclose(module.delta_weight(), torch.einsum("eor,eri->eoi", lora_b, lora_a) * 2.0)
    assert any("the name of mlx-lm" in note for note in adapter.notes)
    with pytest.raises(UnsupportedFeatureError, match="--base"):
        adaptertools.write(adapter, tmp_path / "peft", format="peft")
    adaptertools.write(adapter, tmp_path / "again", format="mlx")
    assert adaptertools.diff(adapter, adaptertools.read(tmp_path / "again"), tolerance=0).same


EXPERTS = "model.layers.0.mlp.experts"


def switch(tmp_path: Path, *parts: str, home: str = "model.layers.0.mlp.switch_mlp") -> Path:
    tensors = {}
    for part in parts:
        n_in, n_out = (4, 6) if part == "down_proj" else (6, 4)
        tensors |= {f"{home}.{part}.lora_a": random(3, 2, n_in), f"{home}.{part}.lora_b": random(3, n_out, 2)}
    return save(tmp_path / "in", tensors)


@pytest.mark.parametrize(
    ("mlx", "there", "words"),
    [
        ("mlp.switch_mlp", "mlp.experts", {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}),
        (
            "block_sparse_moe.switch_mlp",
            "block_sparse_moe.experts",
            {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        ),
    ],
)
def test_experts_get_the_names_of_the_base_one_by_one(
    mlx: str, there: str, words: dict[str, str], tmp_path: Path
) -> None:
    folder = switch(tmp_path, *words, home=f"model.layers.0.{mlx}")
    shapes = {
        f"model.layers.0.{there}.{expert}.{word}.weight": (6, 4) if part == "down_proj" else (4, 6)
        for expert in range(3)
        for part, word in words.items()
    }
    adapter = read_with(folder, base(shapes))
    assert {f"{module.target.parameter}.weight" for module in adapter.modules} == shapes.keys()
    stored = load_file(folder / "adapters.safetensors")
    for module in adapter.modules:
        _, expert, word = module.target.parameter.rsplit(".", 2)
        part = {word: part for part, word in words.items()}[word]
        name = f"model.layers.0.{mlx}.{part}"
        product = stored[f"{name}.lora_b"][int(expert)] @ stored[f"{name}.lora_a"][int(expert)] * 2.0
        assert torch.allclose(module.delta_weight(), product)
    adaptertools.write(adapter, tmp_path / "out", format="mlx")
    again = load_file(tmp_path / "out" / "adapters.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    assert adaptertools.diff(adapter, adaptertools.read(tmp_path / "out"), tolerance=0).same


def test_experts_get_the_names_of_a_base_that_holds_them_in_stacks(tmp_path: Path) -> None:
    folder = switch(tmp_path, "gate_proj", "up_proj", "down_proj")
    shapes = {f"{EXPERTS}.gate_up_proj": (3, 8, 6), f"{EXPERTS}.down_proj": (3, 6, 4)}
    adapter = read_with(folder, base(shapes))
    assert {str(module.target) for module in adapter.modules} == {
        f"{EXPERTS}.gate_up_proj[0:4]",
        f"{EXPERTS}.gate_up_proj[4:8]",
        f"{EXPERTS}.down_proj",
    }
    stored = load_file(folder / "adapters.safetensors")
    whole = sum(m.delta_weight() for m in adapter.modules if m.target.rows)
    halves = [
        stored[f"model.layers.0.mlp.switch_mlp.{part}.lora_b"] @ stored[f"model.layers.0.mlp.switch_mlp.{part}.lora_a"]
        for part in ("gate_proj", "up_proj")
    ]
    assert torch.allclose(torch.as_tensor(whole), 2.0 * torch.cat(halves, dim=1))
    assert not any(module.target.opaque for module in adapter.modules)


@pytest.mark.parametrize(
    "shapes",
    [
        {f"{EXPERTS}.{expert}.gate_proj.weight": (4, 6) for expert in range(4)},  # one more
        {f"{EXPERTS}.{expert}.gate_proj.weight": (4, 6) for expert in range(2)},  # one less
        {f"{EXPERTS}.{expert}.gate_proj.weight": (5, 6) for expert in range(3)},  # of another size
        {f"{EXPERTS}.gate_up_proj": (3, 6, 8)},  # stored (in, out)
        {"lm_head.weight": (4, 6)},
    ],
)
def test_experts_that_the_base_does_not_have_keep_their_names(shapes: Any, tmp_path: Path) -> None:
    adapter = read_with(switch(tmp_path, "gate_proj"), base(shapes))
    assert [module.target.opaque for module in adapter.modules] == [True]
    assert any("no experts of that name and size" in note for note in adapter.notes)


def test_interleaved_experts_are_not_taken_for_halves(tmp_path: Path) -> None:
    shapes = {f"{EXPERTS}.gate_up_proj": (3, 8, 6)}
    adapter = read_with(switch(tmp_path, "gate_proj"), base(shapes, model_type="gpt_oss"))
    assert [module.target.opaque for module in adapter.modules] == [True]


def test_a_checkpoint_of_mlx_lm_as_base_keeps_names_that_count(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.switch_mlp.gate_proj"
    adapter = read_with(switch(tmp_path, "gate_proj"), base({f"{name}.weight": (3, 4, 6)}))
    assert [module.target for module in adapter.modules] == [Target(parameter=name)]
    assert adapter.notes == ()


def test_stacks_of_transformers_are_split_and_read_back_whole(tmp_path: Path) -> None:
    fused, down = stack(f"{EXPERTS}.gate_up_proj", n_out=8), stack(f"{EXPERTS}.down_proj", rank=3, n_in=4, n_out=6)
    tensors, config, again = written(tmp_path, fused, down)
    home = "model.layers.0.mlp.switch_mlp"
    assert config["lora_parameters"]["keys"] == [f"{home}.down_proj", f"{home}.gate_proj", f"{home}.up_proj"]
    halves = [tensors[f"{home}.{p}.lora_b"] @ tensors[f"{home}.{p}.lora_a"] for p in ("gate_proj", "up_proj")]
    scale = config["lora_parameters"]["scale"]
    assert torch.allclose(torch.cat(halves, dim=1) * scale, fused.delta_weight(), atol=1e-6)
    assert [(str(m.target), m.rank) for m in again.modules] == [(str(down.target), 3), (str(fused.target), 2)]


def expert(number: int, word: str = "gate_proj", rank: int = 2, alpha: float = 4.0, **sizes: Any) -> LoraModule:
    return linear(f"{EXPERTS}.{number}.{word}", rank, alpha, **sizes)


def test_experts_of_several_ranks_and_scalings_become_one_stack(tmp_path: Path) -> None:
    modules = [expert(2, rank=1, alpha=3.0), expert(0, rank=4, alpha=2.0), expert(1, rank=3, alpha=9.0)]
    tensors, config, again = written(tmp_path, *modules)
    assert config["lora_parameters"]["scale"] == 1.0
    name = "model.layers.0.mlp.switch_mlp.gate_proj"
    product = tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
    for module in modules:
        number = int(module.target.parameter.split(".")[-2])
        assert torch.allclose(product[number], module.delta_weight(), atol=1e-6)
    assert [(str(m.target), m.rank) for m in again.modules] == [
        (f"{EXPERTS}.{number}.gate_proj", rank) for number, rank in enumerate((4, 3, 1))
    ]


def test_experts_that_are_not_there_need_their_number(tmp_path: Path, run: Callable[..., Ran]) -> None:
    modules = [expert(0), expert(2)]
    with pytest.raises(UnsupportedFeatureError, match=r"experts\.1\.gate_proj is not in the adapter.*num_experts"):
        written(tmp_path, *modules)
    for wrong in (2, True):
        with pytest.raises(OptionError, match="num_experts is"):
            written(tmp_path, *modules, num_experts=wrong)
    tensors, _, again = written(tmp_path, *modules, num_experts=5)
    name = "model.layers.0.mlp.switch_mlp.gate_proj"
    assert tuple(tensors[f"{name}.lora_a"].shape) == (5, 2, 6)
    assert [bool(tensors[f"{name}.lora_b"][number].any()) for number in range(5)] == [True, False, True, False, False]
    assert [str(m.target) for m in again.modules] == [str(m.target) for m in modules]
    with pytest.raises(OptionError, match="no expert that stands by itself"):
        adaptertools.write(Adapter(modules=(linear("q"),)), tmp_path / "no", format="mlx", num_experts=2)
    adaptertools.write(Adapter(modules=tuple(modules)), tmp_path / "peft", format="peft")
    ran = run("convert", tmp_path / "peft", tmp_path / "mlx", "--to", "mlx", "--out", "num_experts=5")
    assert ran.code == 0, ran.err


def test_a_pipeline_of_models_is_refused_and_one_of_them_loses_its_name(tmp_path: Path) -> None:
    unet, text = (linear("q", target=Target(parameter="q", component=name)) for name in ("unet", "text_encoder"))
    with pytest.raises(UnsupportedFeatureError, match=r"several models \(text_encoder, unet\)"):
        written(tmp_path, unet, text)
    report = adaptertools.write(Adapter(modules=(unet,)), tmp_path / "one", format="mlx")
    assert "the adapter is for 'unet'; MLX does not record that" in report.notes


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (linear("w", kind=Kind.PARAMETER, transposed=False), "bare parameter"),
        (linear("lora_unet_q", target=Target(parameter="lora_unet_q", opaque=True)), "could not be turned back"),
        (stack(f"{EXPERTS}.gate_up_proj", n_out=8, transposed=True), r"stored \(in, out\)"),
        (stack("model.layers.0.moe.weights"), "not known here"),
    ],
)
def test_what_no_layer_of_mlx_lm_is_is_refused_by_name(module: LoraModule, match: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match=match) as raised:
        written(tmp_path, module)
    assert module.target.parameter in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_experts_of_several_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="different sizes"):
        written(tmp_path, expert(0), expert(1, n_in=7))
    with pytest.raises(ShapeError, match="9 rows"):
        written(tmp_path, stack(f"{EXPERTS}.gate_up_proj", n_out=9))


def test_two_modules_for_one_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="two modules would both be"):
        written(tmp_path, stack("mlp.switch_mlp.gate_proj"), stack("mlp.experts.gate_proj"))


def test_slices_of_fused_projections_are_refused(tmp_path: Path) -> None:
    rows = RowSlice(start=0, stop=5, total=15)
    with pytest.raises(UnsupportedFeatureError, match="fused-rows"):
        written(tmp_path, linear("qkv", target=Target(parameter="qkv", rows=rows)))


# The names of a checkpoint that mlx-lm has saved


def of_mlx(folder: Path, names: Collection[str], form: str = "mlx", **config: Any) -> Path:
    """A checkpoint with these modules; its header says who saved it."""
    folder.mkdir()
    save_file({f"{name}.weight": torch.ones(5, 6) for name in names}, folder / "model.safetensors", {"format": form})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("transformer.h.0.attn.c_attn", "model.h.0.attn.c_attn"),
        ("model.language_model.layers.0.q_proj", "language_model.model.layers.0.q_proj"),
        ("lm_head", "language_model.lm_head"),
        ("model.layers.0.q_proj", "model.layers.0.q_proj"),
    ],
)
def test_modules_are_called_as_a_checkpoint_of_mlx_lm_calls_them(name: str, there: str, tmp_path: Path) -> None:
    base = of_mlx(tmp_path / "base", [there, "vision_tower.layers.0.q_proj", "vision_tower.h.0.attn.c_attn"])
    modules = [linear(name, rank=2)]
    tensors, config, again = written(tmp_path, *modules, base=base)
    assert config["lora_parameters"]["keys"] == [there]
    assert tensors.keys() == {f"{there}.lora_a", f"{there}.lora_b"}
    assert [str(module.target) for module in again.modules] == [name]
    assert adaptertools.diff(Adapter(modules=tuple(modules)), again, tolerance=0).same


def test_a_checkpoint_of_others_names_nothing_in_mlx_lm(tmp_path: Path) -> None:
    base = of_mlx(tmp_path / "base", ["h.0.attn.c_attn"], form="pt")
    _, config, _ = written(tmp_path, linear("transformer.h.0.attn.c_attn"), base=base)
    assert config["lora_parameters"]["keys"] == ["transformer.h.0.attn.c_attn"]


def test_what_a_checkpoint_of_mlx_lm_does_not_have_is_refused(tmp_path: Path) -> None:
    base = of_mlx(tmp_path / "base", ["model.layers.0.q_proj", "a.layers.1.q_proj", "b.layers.1.q_proj"])
    with pytest.raises(MatchError, match=r"layers\.0\.k_proj: there is no such module in .*mlx-lm would refuse"):
        written(tmp_path, linear("model.layers.0.k_proj"), base=base)
    assert not (tmp_path / "out").exists()
    several = of_mlx(tmp_path / "several", ["model.layers.0.q_proj", "language_model.layers.0.q_proj"])
    with pytest.raises(MatchError, match="several modules fit"):
        written(tmp_path, linear("layers.0.q_proj"), base=several)


def test_a_base_says_how_many_experts_there_are(tmp_path: Path) -> None:
    for number, config in enumerate(({"num_local_experts": 4}, {"text_config": {"num_experts": 4}})):
        base = of_mlx(tmp_path / f"base{number}", ["lm_head"], form="pt", **config)
        tensors, _, _ = written(tmp_path, expert(0), expert(2), base=base, overwrite=bool(number))
        assert {tensor.shape[0] for tensor in tensors.values()} == {4}
    renamed = of_mlx(tmp_path / "mlx", ["language_model.model.layers.0.mlp.switch_mlp.gate_proj"], num_experts=3)
    modules = [expert(0, rank=1), expert(2)]
    _, config, again = written(tmp_path, *modules, base=renamed, overwrite=True)
    assert config["lora_parameters"]["keys"] == ["language_model.model.layers.0.mlp.switch_mlp.gate_proj"]
    assert [(str(m.target), m.rank) for m in again.modules] == [(str(m.target), m.rank) for m in modules]


def test_stacks_are_called_as_a_checkpoint_of_mlx_lm_calls_them(tmp_path: Path) -> None:
    home = "language_model.model.layers.0.mlp.switch_mlp"
    base = of_mlx(tmp_path / "base", [f"{home}.{part}" for part in ("gate_proj", "up_proj", "down_proj")])
    modules = [stack(f"{EXPERTS}.down_proj", rank=1), stack(f"{EXPERTS}.gate_up_proj", n_out=8)]
    tensors, _, again = written(tmp_path, *modules, base=base)
    assert {name.rpartition(".")[0] for name in tensors} == {
        f"{home}.{p}" for p in ("gate_proj", "up_proj", "down_proj")
    }
    assert [(str(m.target), m.rank) for m in again.modules] == [(str(m.target), m.rank) for m in modules]
    assert adaptertools.diff(Adapter(modules=tuple(modules)), again, tolerance=0).same


# Where it lies


def test_checkpoints_alone_ask_for_one_and_do_not_count_beside_the_last(tmp_path: Path) -> None:
    folder = save(tmp_path, pair("q_proj"))
    save_file(pair("q_proj", rank=1), folder / "0000100_adapters.safetensors")
    assert adaptertools.read(folder).modules[0].rank == 2
    assert adaptertools.read(folder / "0000100_adapters.safetensors").modules[0].rank == 1
    shutil.copy(folder / "adapters.safetensors", folder / "0000200_adapters.safetensors")
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(AmbiguousFormatError, match=r"0000100.*Name the one.*0000200_adapters\.safetensors"):
        adaptertools.read(folder)


def test_overwriting_keeps_the_checkpoints_of_a_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", pair("q_proj"))
    save_file(pair("q_proj"), folder / "0000100_adapters.safetensors")
    adaptertools.write(adaptertools.read(folder), folder, format="mlx", overwrite=True)
    assert (folder / "0000100_adapters.safetensors").exists()


def test_a_folder_that_is_peft_and_mlx_asks_which(tmp_path: Path, plain: Adapter) -> None:
    folder = tmp_path / "both"
    adaptertools.write(plain, folder, format="peft")
    assert claims(folder) == ["peft"]
    adaptertools.write(plain, tmp_path / "mlx", format="mlx")
    assert claims(tmp_path / "mlx") == ["mlx"]
    documents = [json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "mlx")]
    (folder / "adapter_config.json").write_text(json.dumps({**documents[0], **documents[1], "iters": 5}))
    assert claims(folder) == ["peft"]  # the weights of MLX are not there
    shutil.copy(tmp_path / "mlx" / "adapters.safetensors", folder)
    assert claims(folder) == ["mlx", "peft"]
    with pytest.raises(AmbiguousFormatError, match="mlx or peft; say which with --from"):
        adaptertools.read(folder)
    assert claims(folder / "adapters.safetensors") == ["mlx"]
    assert claims(folder / "adapter_model.safetensors") == ["peft"]
    for name in ("mlx", "peft"):
        assert adaptertools.diff(plain, adaptertools.read(folder, format=name), tolerance=0).same
    assert adaptertools.read(folder, format="mlx").metadata["mlx"] == {"iters": 5, "lora_parameters": {"dropout": 0.0}}


def test_a_file_of_any_name_is_known_by_its_keys(tmp_path: Path) -> None:
    save_file(pair("model.layers.0.q_proj"), tmp_path / "some.safetensors")
    np.savez(tmp_path / "other.npz", **{name: tensor.numpy() for name, tensor in pair("model.layers.0.q_proj").items()})
    save_file(pair("model.layers.0.q_proj"), tmp_path / "flax.safetensors", {"format": "flax"})
    assert claims(tmp_path / "some.safetensors") == claims(tmp_path / "other.npz") == ["mlx"]
    assert claims(tmp_path / "flax.safetensors") == ["flax"]
    assert adaptertools.read(tmp_path / "some.safetensors", scale=3.0).modules[0].scaling == 3.0


def test_a_repository_with_the_checkpoints_of_a_run_is_read_and_written(
    hub: HubServer, run: Callable[..., Ran]
) -> None:
    config = json.dumps({**CONFIG, "model": "org/tiny"}).encode()
    last, first = (safetensors.torch.save(pair("q_proj", rank=rank)) for rank in (2, 1))
    files = {"adapters.safetensors": last, "0000100_adapters.safetensors": first, "adapter_config.json": config}
    hub.create_repo("org/run", files)
    adapter = adaptertools.read("hf://org/run")
    assert [(module.rank, module.scaling) for module in adapter.modules] == [(2, 2.0)]
    at = "hf://org/run/0000100_adapters.safetensors"
    assert [(module.rank, module.scaling) for module in adaptertools.read(at).modules] == [(1, 2.0)]
    ran = run("convert", "hf://org/run", "hf://org/peft", "--to", "peft")
    assert ran.code == 0, ran.err
    ran = run("convert", "hf://org/peft", "hf://org/back", "--to", "mlx")
    assert ran.code == 0, ran.err
    again = adaptertools.read("hf://org/back")
    assert again.origin is not None
    assert again.origin.format == "mlx"
    assert adaptertools.diff(adapter, again, tolerance=0).same


def test_a_single_number_that_is_a_view_is_written_by_other_formats(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", {"q.lora_a": random(1, 2)[:, :1].clone(), "q.lora_b": random(1, 1)})
    views = adaptertools.read(folder).map_modules(lambda m: replace(m, lora_A=random(1, 2).mT[:1]))
    for to in ("peft", "mlx"):
        adaptertools.write(views, tmp_path / to, format=to)
        assert torch.equal(adaptertools.read(tmp_path / to).modules[0].lora_A, views.modules[0].lora_A)


def test_tensors_in_memory_are_read_and_made() -> None:
    adapter = adaptertools.from_state_dict(pair("q_proj"), CONFIG, format="mlx")
    tensors, config = adapter.to_state_dict(format="mlx")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in pair("q_proj").items())
    assert config["lora_parameters"]["scale"] == 2.0


# Of other people


@real
def test_a_real_adapter_of_2024_is_read_with_its_scale_and_converted(tmp_path: Path) -> None:
    folder = REAL / "mlx_discollama_llama3_8b"
    adapter = adaptertools.read(folder)
    assert {module.scaling for module in adapter.modules} == {2.0}
    assert any("alpha 16 does not" in note and "scale=4" in note for note in adapter.notes)
    assert {tuple(module.weight_shape) for module in adapter.modules} == {(4096, 4096), (1024, 4096)}
    stored = load_file(folder / "adapters.safetensors")
    for to in ("peft", "mlx"):
        adaptertools.convert(folder, tmp_path / to, to=to)
        again = adaptertools.read(tmp_path / to)
        assert adaptertools.diff(adapter, again, tolerance=0).same
        for module in again.modules:
            a, b = (stored[f"{module.target.parameter}.lora_{letter}"] for letter in "ab")
            assert torch.equal(module.lora_A, a.T)
            assert torch.equal(module.lora_B, b.T)


@real
def test_a_real_npz_file_asks_for_its_scale(tmp_path: Path) -> None:
    folder = REAL / "mlx_npz_potter"
    assert claims(folder) == ["mlx"]
    with pytest.raises(MissingAlphaError, match="--in scale"):
        adaptertools.read(folder)
    adaptertools.convert(folder, tmp_path / "mlx", to="mlx", read_options={"scale": 20.0})
    again = adaptertools.read(tmp_path / "mlx")
    assert len(again.modules) == 32
    assert {(module.rank, module.scaling) for module in again.modules} == {(4, 20.0)}
    with np.load(folder / "adapters.npz") as stored:
        for module in again.modules:
            assert np.array_equal(module.lora_A.T.numpy(), stored[f"{module.target.parameter}.lora_a"])
            assert np.array_equal(module.lora_B.T.numpy(), stored[f"{module.target.parameter}.lora_b"])
