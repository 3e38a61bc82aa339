"""On a CUDA device the same comes out as on the CPU: delta weights, factor algebra, truncated adapters."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from factor_cases import ACCURACY, PAIRS, TALL, Pair, check_svd, check_triangle, normal

from adaptertools import truncate
from adaptertools.adapter import Adapter, Kind, LoraModule, RowSlice, Target
from adaptertools.errors import NonFiniteError
from adaptertools.linalg import (
    cholesky_triangle,
    inner_product,
    parse_device,
    product_norm,
    spectral_norm,
    svd_of_product,
    triangle,
)

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MODULES = {
    "linear": LoraModule(target=Target(parameter="q"), lora_A=random(8, 512), lora_B=random(256, 8), alpha=16.0),
    "half precision": LoraModule(
        target=Target(parameter="q"), lora_A=random(8, 512).bfloat16(), lora_B=random(256, 8).bfloat16(), alpha=16.0
    ),
    "fused rows": LoraModule(
        target=Target(parameter="c_attn", rows=RowSlice(start=0, stop=64, total=192)),
        lora_A=random(4, 64),
        lora_B=random(64, 4),
        alpha=8.0,
        transposed=True,
    ),
    "experts": LoraModule(
        target=Target(parameter="experts.gate_up_proj"),
        kind=Kind.PARAMETER,
        lora_A=random(4, 2, 64),
        lora_B=random(4, 32, 2),
        alpha=4.0,
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_delta_weight_on_the_gpu_is_that_of_the_cpu(name: str) -> None:
    module = MODULES[name]
    there = module.delta_weight(device="cuda")
    assert there.device.type == "cuda"
    reference = module.delta_weight(dtype=torch.float64)
    assert torch.allclose(there.cpu().double(), reference, rtol=0, atol=1e-5 * float(reference.abs().max()))


def test_float32_delta_weights_are_not_computed_in_tf32() -> None:
    module = LoraModule(target=Target(parameter="q"), lora_A=random(64, 1024), lora_B=random(512, 64), alpha=64.0)
    reference = module.delta_weight(dtype=torch.float64)
    error = (module.delta_weight(device="cuda").cpu().double() - reference).norm() / reference.norm()
    assert error < 1e-6


def on_device(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    return pair.lora_A.to(DEVICE), pair.lora_B.to(DEVICE)


@pytest.mark.parametrize("name", TALL)
def test_a_triangle_on_the_gpu_has_the_gram_matrix_of_its_factor(name: str) -> None:
    for make in (triangle, cholesky_triangle):
        found = make(TALL[name].to(DEVICE))
        assert found.device.type == DEVICE
        check_triangle(TALL[name], found)


@pytest.mark.parametrize("rank", [1, 4, 100])
@pytest.mark.parametrize("name", PAIRS)
def test_the_svd_on_the_gpu_is_that_of_the_dense_matrix_and_of_the_cpu(name: str, rank: int) -> None:
    pair, (there_A, there_B) = PAIRS[name], on_device(PAIRS[name])
    found = svd_of_product(there_A, there_B)
    assert {found.singular_values.device.type, found.left.device.type, found.right.device.type} == {DEVICE}
    lora_A, lora_B = found.factors(there_A, there_B, rank)
    assert {lora_A.device.type, lora_B.device.type} == {DEVICE}
    check_svd(pair, found.singular_values, lora_A, lora_B, min(rank, found.singular_values.shape[-1]))
    here = svd_of_product(pair.lora_A, pair.lora_B)
    off = (found.singular_values.cpu() - here.singular_values).abs()
    assert (off <= 2 * ACCURACY * pair.magnitude.unsqueeze(-1)).all()


@pytest.mark.parametrize("name", PAIRS)
def test_norms_on_the_gpu_are_those_of_the_cpu(name: str) -> None:
    pair, there = PAIRS[name], on_device(PAIRS[name])
    for norm in (product_norm, spectral_norm):
        off = norm(*there).cpu() - norm(pair.lora_A, pair.lora_B)
        assert (off.abs() <= 2 * ACCURACY * pair.magnitude).all()


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "all huge"])  # its square is beyond float64
def test_inner_products_on_the_gpu_are_those_of_the_cpu(name: str) -> None:
    pair, there = PAIRS[name], on_device(PAIRS[name])
    off = inner_product(*there, *there).cpu() - inner_product(pair.lora_A, pair.lora_B, pair.lora_A, pair.lora_B)
    assert (off.abs() <= 2 * ACCURACY * pair.magnitude**2).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_value_on_the_gpu_spoils_its_own_decomposition_alone(bad: float) -> None:
    lora_A, lora_B = normal(3, 6, 40), normal(3, 50, 6, seed=1)
    lora_A[1, 2, 3] = bad
    found = svd_of_product(lora_A.to(DEVICE), lora_B.to(DEVICE)).singular_values.cpu()
    assert torch.isnan(found[1]).all()
    here = svd_of_product(lora_A, lora_B).singular_values
    assert torch.allclose(found[[0, 2]], here[[0, 2]], rtol=1e-12)


def module(name: str, rank: int, n_in: int, n_out: int, *experts: int, **fields: Any) -> LoraModule:
    """Factors whose singular values fall off, so that rules have something to choose by."""
    seed = sum(map(ord, name)) + 7 * rank
    falling = 0.8 ** torch.arange(rank)
    return LoraModule(
        target=Target(parameter=name),
        lora_A=random(*experts, rank, n_in, seed=seed),
        lora_B=random(*experts, n_out, rank, seed=seed + 1) * falling,
        alpha=16.0,
        **fields,
    )


def fused(start: int) -> LoraModule:
    slot = module(f"c_attn{start}", 8, 96, 64, transposed=True)
    return replace(slot, target=Target(parameter="c_attn", rows=RowSlice(start=start, stop=start + 64, total=192)))


def in_half(one: LoraModule) -> LoraModule:
    return replace(one, lora_A=one.lora_A.bfloat16(), lora_B=one.lora_B.bfloat16())


ADAPTERS = {
    "several shapes": Adapter(
        modules=tuple(
            module(f"layers.{layer}.{name}", rank, n_in, n_out)
            for layer in range(3)
            for name, rank, n_in, n_out in (("q", 16, 256, 256), ("k", 16, 256, 64), ("down", 8, 700, 256))
        )
    ),
    "experts": Adapter(
        modules=(
            module("experts.gate_up_proj", 8, 96, 128, 4, kind=Kind.PARAMETER),
            module("experts.down_proj", 8, 64, 96, 4, kind=Kind.PARAMETER),
        )
    ),
    "half precision": Adapter(modules=tuple(in_half(module(name, 16, 256, 128)) for name in "qkv")),
    "fused slots": Adapter(modules=(fused(0), fused(128))),
    "dependent and zero": Adapter(
        modules=(
            module("plain", 8, 96, 64),
            replace(module("untrained", 8, 96, 64), lora_B=torch.zeros(64, 8)),
            replace(module("dependent", 8, 96, 64), lora_A=random(1, 96).repeat(8, 1)),
            replace(module("ill-conditioned", 8, 96, 64), lora_B=random(64, 8) * 10.0 ** -torch.arange(8)),
        )
    ),
}

RULES: list[dict[str, Any]] = [{"rank": 3}, {"energy": 0.9}, {"error": 0.3}, {"error": 0.3, "max_rank": 4}]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [None, "f32"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_truncating_on_the_gpu_gives_what_the_cpu_gives(name: str, dtype: str | None, rule: dict[str, Any]) -> None:
    adapter = ADAPTERS[name]
    here = truncate(adapter, **rule, dtype=dtype, device="cpu")
    there = truncate(adapter, **rule, dtype=dtype, device=DEVICE)
    assert [row.rank_after for row in there.rows] == [row.rank_after for row in here.rows]
    assert there.relative_error == pytest.approx(here.relative_error, rel=1e-9, abs=1e-14)
    assert there.energy == pytest.approx(here.energy, rel=1e-12)
    assert there.rounding_error == pytest.approx(here.rounding_error, rel=0.05, abs=1e-12)
    assert [row.nbytes for row in there.rows] == [row.nbytes for row in here.rows]
    for one, other in zip(there.rows, here.rows, strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-9, abs=1e-14)
        assert one.energy == pytest.approx(other.energy, rel=1e-12)
    rounding = here.rounding_error + there.rounding_error
    for before, one, other in zip(adapter.modules, there.adapter.modules, here.adapter.modules, strict=True):
        assert (one.lora_A.device.type, one.lora_A.dtype, one.alpha) == ("cpu", other.lora_A.dtype, other.alpha)
        norm = before.delta_weight(dtype=torch.float64).norm()
        off = one.delta_weight(dtype=torch.float64) - other.delta_weight(dtype=torch.float64)
        assert off.norm() <= (4 * rounding + 1e-12) * norm


def test_an_adapter_on_the_gpu_stays_there() -> None:
    adapter = ADAPTERS["several shapes"]
    moved = adapter.map_modules(lambda m: replace(m, lora_A=m.lora_A.to(DEVICE), lora_B=m.lora_B.to(DEVICE)))
    done = truncate(moved, rank=3, device="auto")
    assert {m.lora_A.device.type for m in done.adapter.modules} == {DEVICE}
    assert {m.lora_B.device.type for m in done.adapter.modules} == {DEVICE}
    here = truncate(adapter, rank=3, device="cpu")
    assert done.relative_error == pytest.approx(here.relative_error, rel=1e-9)


def test_a_bad_value_is_named_on_the_gpu_too() -> None:
    adapter = ADAPTERS["several shapes"]
    bad = adapter.modules[4].lora_B.clone()
    bad[3, 2] = float("nan")
    modules = list(adapter.modules)
    modules[4] = replace(modules[4], lora_B=bad)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.k\.lora_B"):
        truncate(replace(adapter, modules=tuple(modules)), rank=3, device=DEVICE)


def test_the_gpu_is_chosen_where_there_is_one() -> None:
    assert parse_device("auto").type == DEVICE
    assert parse_device(f"{DEVICE}:0") == torch.device(DEVICE, 0)
