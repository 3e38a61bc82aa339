"""LyCORIS files: LoHa and LoKr as exact low-rank products, and what is none refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adaptertools
from adaptertools import formats
from adaptertools.adapter import Adapter, Kind, LoraModule
from adaptertools.containers.source import Source
from adaptertools.encoding import Encoder
from adaptertools.errors import (
    EmptyFactorError,
    NotLoraError,
    OptionError,
    ShapeError,
    UnclaimedTensorError,
    UnpairedFactorError,
    UnsupportedFeatureError,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "lycoris"
CASES = sorted(folder.name for folder in FIXTURES.iterdir())
NAME = "lora_unet_x"


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def saved(path: Path, parts: dict[str, torch.Tensor], name: str = NAME, **metadata: str) -> Path:
    save_file({f"{name}.{part}": tensor for part, tensor in parts.items()}, path, metadata)
    return path


def only(path: Path, **options: Any) -> LoraModule:
    (module,) = adaptertools.read(path, **options).modules
    return module


def loha(n_out: int = 9, n_in: int = 8, rank: int = 2, **parts: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {f"hada_w{half}_a": random(n_out, rank, seed=half) for half in (1, 2)}
    found |= {f"hada_w{half}_b": random(rank, n_in, seed=half + 5) for half in (1, 2)}
    return found | {"alpha": torch.tensor(1.0)} | parts


# Files that LyCORIS's modules saved


@pytest.mark.parametrize("name", CASES)
def test_delta_weights_are_those_that_lycoris_applies(name: str) -> None:
    case = json.loads((FIXTURES / name / "case.json").read_text())
    path = FIXTURES / name / case["file"]
    expected = load_file(FIXTURES / name / "expected.safetensors")
    base = load_file(FIXTURES / name / case["base"])
    assert formats.detect(Source(path)) == "lycoris"
    assert formats.detect(Source(path.parent)) == "lycoris"
    adapter = adaptertools.read(path, base=FIXTURES / name / case["base"])
    assert {module.target.parameter: module.rank for module in adapter.modules} == case["ranks"]
    for module in adapter.modules:
        parameter = module.target.parameter
        found = module.delta_weight(base_weight=base[f"{parameter}.weight"])
        assert found.shape == expected[parameter].shape
        assert (found - expected[parameter]).norm() < 1e-5 * expected[parameter].norm(), parameter


@pytest.mark.parametrize("name", CASES)
def test_what_was_read_is_truncated_and_written_as_kohya(name: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    folder = FIXTURES / name
    base = ("--base", folder / "base.safetensors")
    dst = tmp_path / "lora.safetensors"
    assert run("convert", folder / "adapter.safetensors", dst, "--to", "kohya", *base).code == 0
    assert formats.detect(Source(dst)) == "kohya"
    with_network = adaptertools.read(dst).metadata["kohya"]["header"]
    assert with_network["ss_network_module"] == "networks.lora"
    assert "ss_network_args" not in with_network
    ran = run("truncate", dst, tmp_path / "small.safetensors", "--rank", "2")
    assert ran.code == 0
    assert {module.rank for module in adaptertools.read(tmp_path / "small.safetensors").modules} == {2}


# The algebra, against the dense weight in float64


def test_loha_is_the_product_of_two_low_rank_products(tmp_path: Path) -> None:
    parts = loha()
    module = only(saved(tmp_path / "x.safetensors", parts))
    dense = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"]) / 2
    assert (module.rank, module.lora_A.dtype) == (4, torch.float64)
    assert (module.delta_weight(dtype=torch.float64) - dense).abs().max() < 1e-14


def test_the_rank_is_never_beyond_the_smaller_size_of_the_weight(tmp_path: Path) -> None:
    for sizes in ((9, 5), (5, 9)):
        parts = loha(*sizes, rank=3)
        module = only(saved(tmp_path / "x.safetensors", parts))
        dense = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"]) / 3
        assert module.rank == 5
        assert (module.delta_weight(dtype=torch.float64) - dense).abs().max() < 1e-14


@pytest.mark.parametrize("whole", [(True, True), (True, False), (False, True), (False, False)])
def test_lokr_scales_only_where_a_half_is_stored_as_factors(whole: tuple[bool, bool], tmp_path: Path) -> None:
    parts: dict[str, torch.Tensor] = {"alpha": torch.tensor(1.0)}
    halves = []
    for number, (is_whole, (rows, columns)) in enumerate(zip(whole, ((3, 4), (8, 6)), strict=True), 1):
        left, right = random(rows, 2, seed=number), random(2, columns, seed=number + 3)
        halves.append(left @ right)
        if is_whole:
            parts[f"lokr_w{number}"] = halves[-1]
        else:
            parts |= {f"lokr_w{number}_a": left, f"lokr_w{number}_b": right}
    module = only(saved(tmp_path / "x.safetensors", parts))
    scale = 1.0 if all(whole) else 0.5
    assert module.scaling == scale
    assert module.rank == (3 if whole[0] else 2) * (6 if whole[1] else 2)
    dense = torch.kron(*halves) * scale
    assert (module.delta_weight(dtype=torch.float64) - dense).abs().max() < 1e-14


def test_a_whole_kernel_makes_a_convolution_without_a_base(tmp_path: Path) -> None:
    w1, w2 = random(2, 3), random(4, 5, 3, 3)
    module = only(saved(tmp_path / "x.safetensors", {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(4.0)}))
    assert (module.kind, module.weight_shape) == (Kind.CONV, (8, 15, 3, 3))
    dense = torch.einsum("ab,cdkl->acbdkl", w1, w2).reshape(8, 15, 3, 3)
    assert (module.delta_weight(dtype=torch.float64) - dense).abs().max() < 1e-15


def test_a_flattened_kernel_is_a_matrix_until_a_base_says_otherwise(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", loha(n_out=9, n_in=27))
    adapter = adaptertools.read(path)
    assert adapter.modules[0].weight_shape == (9, 27)
    assert any("give --base" in note for note in adapter.notes)
    save_file({"x.weight": torch.zeros(9, 3, 3, 3)}, tmp_path / "base.safetensors")
    module = only(path, base=tmp_path / "base.safetensors")
    assert (module.kind, module.weight_shape) == (Kind.CONV, (9, 3, 3, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_are_computed_in_float32_and_the_rounding_is_said(dtype: torch.dtype, tmp_path: Path) -> None:
    parts = {part: tensor.to(dtype) for part, tensor in loha().items()}
    adapter = adaptertools.read(saved(tmp_path / "x.safetensors", parts))
    (module,) = adapter.modules
    wide = {part: tensor.double() for part, tensor in parts.items()}
    dense = (wide["hada_w1_a"] @ wide["hada_w1_b"]) * (wide["hada_w2_a"] @ wide["hada_w2_b"]) / 2
    found = module.lora_B.double() @ module.lora_A.double() * module.scaling
    assert module.lora_A.dtype is torch.float32
    exact = dtype is not torch.float32  # the product of two numbers of 11 bits has 22
    assert (found - dense).abs().max() < (1e-14 if exact else 1e-5)
    said = "without a loss" if exact else "2 factors were rounded to float32, by "
    (note,) = (note for note in adapter.notes if note.startswith("the factors of 1 module were computed: "))
    assert said in note
    assert exact or 1e-9 < float(note.removesuffix(" at most").rpartition(" ")[2]) < 2.0**-24


def test_locon_beside_loha_is_read_too_and_keeps_its_bits(tmp_path: Path) -> None:
    down, up = random(2, 4, dtype=torch.float16), random(6, 2, dtype=torch.float16)
    tensors = {f"{NAME}.{part}": tensor for part, tensor in loha().items()}
    tensors |= {"lora_unet_y.lora_down.weight": down, "lora_unet_y.lora_up.weight": up}
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = adaptertools.read(tmp_path / "x.safetensors")
    assert adapter.origin is not None
    assert adapter.origin.format == "lycoris"
    plain = next(module for module in adapter.modules if module.target.parameter == "y")
    assert plain.lora_A.equal(down)
    assert plain.lora_A.dtype is torch.float16


# What is refused


METHODS = {
    "diff": "whole difference",
    "diff_b": "difference of the bias",
    "w_norm": "norm",
    "oft_blocks": "OFT",
    "a1.weight": "GLoRA",
    "on_input": "IA",
    "lambda_layer": "T-LoRA",
    "set_weight": "ComfyUI",
}


@pytest.mark.parametrize(("part", "name"), METHODS.items())
def test_other_methods_are_refused_by_name(part: str, name: str, tmp_path: Path) -> None:
    beside = {"rescale": torch.ones(3)} if part == "oft_blocks" else {}
    path = saved(tmp_path / "x.safetensors", beside | {part: torch.ones(3)})
    assert formats.detect(Source(path)) == "lycoris"
    with pytest.raises(NotLoraError, match=name):
        adaptertools.read(path)


def test_other_methods_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    tensors = {f"{NAME}.{part}": tensor for part, tensor in loha(diff_b=torch.ones(9)).items()}
    tensors |= {"lora_unet_norm.w_norm": torch.ones(3), "lora_unet_norm.b_norm": torch.ones(3)}
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = adaptertools.read(tmp_path / "x.safetensors", ignore_other=True)
    assert [module.target.parameter for module in adapter.modules] == ["x"]
    assert any("3 tensors of other methods" in note for note in adapter.notes)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"hada_w2_b": None}, UnpairedFactorError),
        ({"hada_t1": random(2, 2, 3, 3)}, UnpairedFactorError),
        ({"hada_w2_b": random(2, 7)}, ShapeError),
        ({"hada_w2_b": random(3, 8)}, ShapeError),
        ({"hada_w2_b": random(2, 8, 1)}, ShapeError),
        ({"hada_w2_b": torch.zeros(0, 8)}, EmptyFactorError),
        ({"hada_t1": random(3, 2, 3, 3), "hada_t2": random(2, 2, 3, 3)}, ShapeError),
        ({"lokr_w1": random(2, 2)}, ShapeError),
        ({"hada_w3_a": random(2, 2)}, UnclaimedTensorError),
    ],
)
def test_a_damaged_module_is_an_error_that_names_it(
    change: dict[str, torch.Tensor | None], error: type[Exception], tmp_path: Path
) -> None:
    parts = {part: tensor for part, tensor in (loha() | change).items() if tensor is not None}
    with pytest.raises(error, match=NAME):
        adaptertools.read(saved(tmp_path / "x.safetensors", parts))


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ({"lokr_w1": random(2, 2), "lokr_w2_a": random(2, 2)}, UnpairedFactorError),
        ({"lokr_w1": random(2, 2)}, UnpairedFactorError),
        ({"lokr_w1": random(2, 2), "lokr_w1_a": random(2, 2), "lokr_w2": random(2, 2)}, ShapeError),
        ({"lokr_w1": random(2, 2), "lokr_w2": random(2)}, EmptyFactorError),
        ({"lokr_w1": random(2, 2, 3, 3), "lokr_w2": random(2, 2)}, ShapeError),
    ],
)
def test_a_damaged_lokr_is_an_error_that_names_it(
    parts: dict[str, torch.Tensor], error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error, match=NAME):
        adaptertools.read(saved(tmp_path / "x.safetensors", parts))


def test_lycoris_is_only_read(plain: Adapter, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="can be read, not written"):
        adaptertools.write(plain, tmp_path / "x.safetensors", format="lycoris")
    with pytest.raises(UnsupportedFeatureError, match="write kohya"):
        formats.get("lycoris").write(plain, Encoder(), container="safetensors")
