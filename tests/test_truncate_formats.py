"""Truncated adapters in files: every format reads back what was meant, real PEFT merges it, and sizes hold on disk."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft_cases import headers, make_adapter, make_base, quiet
from proof import needed
from strategies import adapters, tensor
from test_container_sizes import on_disk
from test_formats import COMBINATIONS, assert_same_meaning, delta_weights

import adaptertools
from adaptertools import formats
from adaptertools.adapter import Adapter, Base, Feature, FullWeight, LoraModule, Target
from adaptertools.containers.source import Source
from adaptertools.errors import OptionError, UnsupportedFeatureError
from adaptertools.module import ScaleRule
from adaptertools.operations.sizes import parse_size, stored_bytes
from adaptertools.operations.truncate import truncate

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize(("name", "container"), COMBINATIONS)
@given(data=st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_format_reads_back_the_truncated_delta_weights(
    name: str, container: str, data: st.DataObject, tmp_path: Path
) -> None:
    carried = formats.get(name).CARRIES - {Feature.CHANGED_BASE}
    rule = data.draw(st.sampled_from(({"rank": 1}, {"rank": 2}, {"energy": 0.7}, {"error": 0.4})))
    truncated = truncate(data.draw(adapters(carried)), **rule).adapter
    dst = tmp_path / "out" if formats.get(name).FOLDER else tmp_path / "out.bin"
    try:
        how = {"format": name, "container": container, **needed(name)}
        report = adaptertools.write(truncated, dst, overwrite=dst.exists(), **how)
    except UnsupportedFeatureError:
        assume(not truncated.features)
        raise
    after = adaptertools.read(dst)
    assert_same_meaning(truncated, after, report)
    assert after.history[-1].operation in ("truncate", "write")


PEFT_CASES = (
    "linear",
    "embedding",
    "rslora",
    "dora",
    "convolutions",
    "attention_patterns",
    "llama_patterns",
    "llama_dora",
    "gpt2",
    "moe_patterns",
    "moe_transposed",
    "parameter",
)


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match.*:RuntimeWarning")  # it overlooks parameters
@pytest.mark.parametrize("case", PEFT_CASES)
def test_real_peft_merges_a_truncated_adapter_as_we_say(case: str, tmp_path: Path) -> None:
    with quiet():
        make_adapter(case, make_base(case), r=4).save_pretrained(tmp_path / "by_peft")
    before = _read(case, tmp_path)
    done = truncate(before, energy=0.8)
    assert {row.rank_after < row.rank_before for row in done.rows} >= {True}
    adaptertools.write(done.adapter, tmp_path / "truncated", format="peft")
    weights = {name: weight.clone() for name, weight in make_base(case).state_dict().items()}
    with quiet():
        merged = PeftModel.from_pretrained(make_base(case), tmp_path / "truncated").merge_and_unload().state_dict()
    for module in done.adapter.modules:
        name = module.target.parameter
        name = name if name in weights else f"{name}.weight"
        expected = weights[name] + module.delta_weight(base_weight=weights[name])
        assert not torch.equal(expected, weights[name])
        assert (merged.pop(name) - expected).abs().max() <= 1e-6, name
    assert all(torch.equal(weight, weights[name]) for name, weight in merged.items())


def _read(case: str, folder: Path) -> Adapter:
    return formats.get("peft").read(Source(folder / "by_peft"), base=headers(make_base(case)))


def test_real_peft_loads_mixed_ranks_and_rslora_by_their_patterns(tmp_path: Path) -> None:
    with quiet():
        make_adapter("llama_patterns", make_base("llama_patterns")).save_pretrained(tmp_path / "by_peft")
    before = _read("llama_patterns", tmp_path)
    done = truncate(before, error=0.3)
    ranks = {row.rank_after for row in done.rows}
    assert len(ranks) > 2
    adaptertools.write(done.adapter, tmp_path / "truncated", format="peft")
    with quiet():
        loaded = PeftModel.from_pretrained(make_base("llama_patterns"), tmp_path / "truncated")
    assert loaded.peft_config["default"].use_rslora
    assert loaded.peft_config["default"].rank_pattern
    layers = {name: layer for name, layer in loaded.named_modules() if hasattr(layer, "scaling")}
    for module in done.adapter.modules:
        layer = layers[f"base_model.model.{module.target.parameter}"]
        assert layer.r["default"] == module.rank
        assert layer.scaling["default"] == pytest.approx(module.scaling, rel=1e-15)
        assert module.scale_rule is ScaleRule.ALPHA_OVER_SQRT_RANK


def llama(layers: int, rank: int, dtype: torch.dtype, alpha: float, width: int = 48) -> Adapter:
    """Modules of a small Llama whose spectra fall at different speeds."""
    sizes = {"self_attn.q_proj": width, "self_attn.k_proj": width // 4, "mlp.gate_proj": 2 * width}
    modules = []
    for layer in range(layers):
        decay = torch.exp(-torch.arange(rank) / (2.0 + layer)).unsqueeze(-1)
        for number, (name, n_out) in enumerate(sizes.items()):
            modules.append(
                LoraModule(
                    target=Target(parameter=f"model.layers.{layer}.{name}"),
                    lora_A=(tensor((rank, width), torch.float32, 10 * layer + number) * decay).to(dtype),
                    lora_B=tensor((n_out, rank), dtype, 10 * layer + number + 5),
                    alpha=alpha,
                )
            )
    return Adapter(modules=tuple(modules), bases={"": Base(id="tiny/llama")})


@pytest.mark.parametrize(("dtype", "alpha"), [(torch.float32, 32.0), (torch.bfloat16, 5.0)])
@pytest.mark.parametrize(("name", "container"), COMBINATIONS)
def test_a_size_holds_for_all_files_together(
    name: str, container: str, dtype: torch.dtype, alpha: float, tmp_path: Path, run: Callable[..., Any]
) -> None:
    src, dst = tmp_path / "src" / "a", tmp_path / "dst" / "a"
    adaptertools.write(llama(3, 24, dtype, alpha, width=64), src, format=name, container=container, **needed(name))
    for size, most in (("50%", on_disk(src) // 2), (f"{on_disk(src) * 7 // 10}", on_disk(src) * 7 // 10)):
        ran = run("truncate", src, dst, "--size", size, "--overwrite", "--json")
        assert ran.code == 0, ran.err
        assert ran.json["destination"]["container"] == container
        assert on_disk(dst) <= most
        assert on_disk(dst) == ran.json["destination"]["nbytes_on_disk"] > 0.92 * most
        ranks = {row["rank_after"] for row in ran.json["truncate"]["modules"]}
        narrow = name in ("loralib", "gguf") and dtype is torch.bfloat16
        padded = name in ("mlx", "diffusers")
        assert len(ranks) > 1 or narrow or padded, (
            "mixed, but where scalings would be folded in float32, or ranks filled"
        )
        assert ran.json["truncate"]["relative_error"] < 0.9


@pytest.mark.parametrize("name", ["peft", "flax-qwix"])
def test_where_factors_are_large_little_of_a_size_is_left_over(
    name: str, tmp_path: Path, run: Callable[..., Any]
) -> None:
    before = llama(2, 64, torch.float32, 16.0, width=1024)
    adaptertools.write(before, tmp_path / "a", format=name)
    for size, wanted in (("1MB", 1_000_000), ("0.5MiB", 1 << 19)):
        ran = run("truncate", tmp_path / "a", tmp_path / "b", "--size", size, "--overwrite", "--json")
        assert ran.code == 0, ran.err
        assert 0.97 * wanted <= on_disk(tmp_path / "b") <= wanted


@pytest.mark.parametrize("share", [0.03, 0.2, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_size_is_filled_until_no_step_fits_any_more(dtype: torch.dtype, share: float, tmp_path: Path) -> None:
    before = llama(2, 16, dtype, 16.0, width=16)
    least, most = (truncate(before, rank=rank, measure=_as_peft).nbytes_on_disk for rank in (1, 16))
    size = round(least + share * (most - least))
    done = truncate(before, size=size, measure=_as_peft)
    assert done.nbytes_on_disk == adaptertools.write(done.adapter, tmp_path / "a", format="peft").nbytes_on_disk
    assert on_disk(tmp_path / "a") == done.nbytes_on_disk <= size
    assert done.nbytes_on_disk > 0.97 * size
    for place, (old, new) in enumerate(zip(before.modules, done.adapter.modules, strict=True)):
        if new.rank == old.rank:
            continue
        larger = list(done.adapter.modules)
        rank = new.rank + 1
        larger[place] = replace(
            old, lora_A=old.lora_A[:rank], lora_B=old.lora_B[:, :rank], alpha=old.alpha * rank / old.rank
        )
        taken = _as_peft(replace(done.adapter, modules=tuple(larger)), None)
        assert taken > size - 32, f"{old.target} would fit with rank {rank}, but for digits in the history"


def _as_peft(adapter: Adapter, dtype: torch.dtype | None) -> int:
    return adaptertools.stored_size(adapter, format="peft", dtype=dtype)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_where_one_rank_for_all_fits_to_the_byte_it_is_found(rank: int) -> None:
    before = llama(4, 8, torch.float32, 16.0, width=8)
    uniform = truncate(before, rank=rank, measure=_as_peft)
    done = truncate(before, size=uniform.nbytes_on_disk + 32, measure=_as_peft)
    assert done.energy >= uniform.energy
    assert done.nbytes_on_disk <= uniform.nbytes_on_disk + 32


def test_folding_in_float32_is_foreseen(tmp_path: Path) -> None:
    before = llama(2, 16, torch.bfloat16, 5.0, width=256)
    done = truncate(before, size=120_000, measure=_as_flax)
    report = adaptertools.write(done.adapter, tmp_path / "a", format="flax")
    assert {loss.dtype for loss in report.losses} == {"f32"}
    assert 0.9 * 120_000 <= on_disk(tmp_path / "a") <= 120_000
    plain = truncate(before, size=120_000)
    assert adaptertools.stored_size(plain.adapter, format="flax") > 120_000, "what is counted plainly is less"


def _as_flax(adapter: Adapter, dtype: torch.dtype | None) -> int:
    return adaptertools.stored_size(adapter, format="flax", dtype=dtype)


def test_a_fused_leaf_of_flax_keeps_its_shared_lora_a_and_falls_in_rank(
    tmp_path: Path, run: Callable[..., Any]
) -> None:
    shared = tensor((6, 8), torch.float32, 1)
    modules = tuple(
        LoraModule(
            target=Target(parameter=f"model.layers.0.self_attn.{name}"),
            lora_A=shared,
            lora_B=tensor((4, 6), torch.float32, seed),
            alpha=6.0,
        )
        for seed, name in enumerate(("k_proj", "v_proj"))
    )
    options: dict[str, Any] = {"format": "flax-gemma", "naming": "gemma", "head_dim": 2, "container": "npz"}
    adaptertools.write(Adapter(modules=modules), tmp_path / "a", **options)
    ran = run("truncate", tmp_path / "a", tmp_path / "b", "--rank", "3", "--json")
    assert ran.code == 0, ran.err
    (row,) = ran.json["truncate"]["modules"]
    assert row["target"] == "model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj"
    assert {m.rank for m in adaptertools.read(tmp_path / "b").modules} == {3}
    assert ran.json["destination"]["nbytes"] == 3 * (8 + 4 + 4) * 4
    wanted = delta_weights(truncate(adaptertools.read(tmp_path / "a"), rank=3).adapter)
    for name, delta in delta_weights(adaptertools.read(tmp_path / "b")).items():
        assert torch.equal(delta, wanted[name])


def test_a_head_takes_its_share_of_a_size(tmp_path: Path) -> None:
    head = FullWeight(weight=torch.ones(100, 48))
    before = llama(2, 16, torch.float32, 16.0)
    with_head = Adapter(modules=before.modules, full_weights={"head.weight": head}, bases=before.bases)
    done, free = truncate(with_head, size=40_000), truncate(before, size=40_000)
    assert sum(row.nbytes for row in free.rows) - sum(row.nbytes for row in done.rows) > 15_000
    adaptertools.write(done.adapter, tmp_path / "a", format="peft")
    assert on_disk(tmp_path / "a") <= 40_000


@pytest.mark.parametrize("name", ["peft", "flax", "loralib"])
def test_a_size_too_small_says_the_smallest_that_will_do(name: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    adaptertools.write(llama(2, 8, torch.float32, 16.0), tmp_path / "a", format=name)
    ran = run("truncate", tmp_path / "a", tmp_path / "b", "--size", "2000")
    assert ran.code == 2
    assert not (tmp_path / "b").exists()
    (smallest,) = re.findall(r"takes (\d+)", ran.err)
    assert run("truncate", tmp_path / "a", tmp_path / "b", "--size", str(int(smallest) - 64)).code == 2
    ran = run("truncate", tmp_path / "a", tmp_path / "b", "--size", smallest, "--json")
    assert ran.code == 0, ran.err
    assert {row["rank_after"] for row in ran.json["truncate"]["modules"]} == {1}
    assert int(smallest) - 16 <= on_disk(tmp_path / "b") <= int(smallest)


def test_a_dtype_counts_for_all_tensors(tmp_path: Path, run: Callable[..., Any]) -> None:
    adaptertools.write(llama(3, 16, torch.float32, 16.0), tmp_path / "a", format="peft")
    wide, narrow = (
        run("truncate", tmp_path / "a", tmp_path / name, "--size", "40000", "--json", *more).json["truncate"]
        for name, more in (("wide", ()), ("narrow", ("--dtype", "bf16")))
    )
    assert on_disk(tmp_path / "narrow") <= 40000
    assert narrow["relative_error"] < wide["relative_error"]
    shutil.rmtree(tmp_path / "narrow")
    halved = run("truncate", tmp_path / "a", tmp_path / "narrow", "--size", "60%", "--dtype", "bf16", "--json")
    assert halved.json["truncate"]["relative_error"] == 0.0, "in half the bytes each, all of it fits"


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("300000", 300_000),
        (300_000, 300_000),
        ("20MB", 20_000_000),
        ("20 mb", 20_000_000),
        ("1.5MiB", 3 << 19),
        ("2kB", 2000),
        ("2KiB", 2048),
        ("1GB", 10**9),
        (".5kB", 500),
        ("1_000", 1000),
        ("50%", 500),
        ("12.5 %", 125),
    ],
)
def test_sizes_are_read_with_their_units(text: int | str, nbytes: int) -> None:
    assert parse_size(text, 1000) == nbytes


def test_sizes_of_other_kinds_are_refused() -> None:
    for bad in ("", "MB", "1e3", "5 apples", "1.2.3", "²", True, 2.0, None):
        with pytest.raises(OptionError):
            parse_size(bad, 1000)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(adapter=adapters(formats.get("peft").CARRIES - {Feature.CHANGED_BASE, Feature.FUSED_ROWS}))
def test_what_is_counted_plainly_is_enough_for_a_peft_folder(adapter: Adapter, tmp_path: Path) -> None:
    try:
        report = adaptertools.write(adapter, tmp_path / "a", format="peft", overwrite=(tmp_path / "a").exists())
    except UnsupportedFeatureError:
        return
    assume(not any(loss.factor != 1.0 for loss in report.losses))
    assert on_disk(tmp_path / "a") <= stored_bytes(adapter)
