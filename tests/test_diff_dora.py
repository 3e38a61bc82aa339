"""`diff` of DoRA on its base model: what it adds, not the parts that it is made of."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adaptertools
from adaptertools.adapter import Adapter, RowSlice
from adaptertools.errors import NonFiniteError, ShapeError
from adaptertools.module import LoraModule, Target
from adaptertools.operations import renormalized
from adaptertools.operations.diff import diff

FIXTURES = Path(__file__).parents[1] / "fixtures"
OF_LIBRARIES = ("peft/dora", "peft/convolutions_dora", "mlx/dora", "mlx/dora_embeddings", "kohya/locon")
"""Whose expected delta weights the libraries themselves have computed."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dora(seed: int = 0, *, axis: str = "out", rows: RowSlice | None = None, n_out: int = 7) -> LoraModule:
    size = n_out if axis == "out" else 5
    return LoraModule(
        target=Target(parameter="layer.q_proj", rows=rows),
        lora_A=normal(2, 5, seed=seed),
        lora_B=normal(n_out, 2, seed=seed + 1),
        alpha=3.0,
        magnitude=1 + normal(size, seed=seed + 2).abs(),
        magnitude_axis=axis,  # type: ignore[arg-type]
    )


def added(module: LoraModule, weight: Tensor) -> Tensor:
    """What a DoRA module adds to its rows of a weight (out, in), in float64."""
    W = weight.double()
    V = W + module.alpha / 2 * module.lora_B.double() @ module.lora_A.double()
    if module.magnitude is None:
        return V - W
    if module.magnitude_axis == "out":
        return module.magnitude.double()[:, None] * V / (V**2).sum(dim=1, keepdim=True).sqrt() - W
    return module.magnitude.double() * V / (V**2).sum(dim=0).sqrt() - W


def one(*modules: LoraModule) -> Adapter:
    return Adapter(modules=modules)


def cosine(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum() / left.norm() / right.norm())


@pytest.fixture(params=[1 << 20, 1], ids=["whole", "row by row"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renormalized, "_BLOCK_ELEMENTS", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("case", OF_LIBRARIES)
def test_the_norm_is_that_of_the_librarys_own_delta_weights(case: str) -> None:
    base = FIXTURES / case / "base.safetensors"
    held = adaptertools.read(FIXTURES / case, base=base)
    stored = load_file(FIXTURES / case / "expected.safetensors")
    expected = {name.removesuffix(".weight"): delta.double() for name, delta in stored.items()}
    bare = held.map_modules(lambda module: replace(module, magnitude=None, magnitude_axis="out"))
    found = adaptertools.diff(held, bare, base=base, norms=True)
    plain = {module.target.parameter: module.delta_weight(dtype=torch.float64) for module in bare.modules}
    assert expected.keys() == plain.keys()
    for row in found.modules:
        name = row.target.parameter
        assert row.norm == pytest.approx(float(expected[name].norm()), rel=1e-5)
        assert row.other_norm == pytest.approx(float(plain[name].norm()), rel=1e-9)
        assert row.distance == pytest.approx(float((expected[name] - plain[name]).norm()), rel=1e-5, abs=1e-6)
    assert set(found.dora_on_base) == {str(m.target) for m in held.modules if m.magnitude is not None}
    assert found.dora_in_parts == ()


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("axes", [("out", "out"), ("in", "in"), ("out", "in")])
def test_distance_and_cosine_are_those_of_the_dense_delta_weights(axes: tuple[str, str]) -> None:
    left, right, weight = dora(axis=axes[0]), dora(50, axis=axes[1]), normal(7, 5, seed=9).bfloat16()
    found = diff(one(left), one(right), base_weight=lambda module: weight)
    ours, theirs = added(left, weight), added(right, weight)
    assert found.norm == pytest.approx(float(ours.norm()), rel=1e-12)
    assert found.other_norm == pytest.approx(float(theirs.norm()), rel=1e-12)
    assert found.distance == pytest.approx(float((ours - theirs).norm()), rel=1e-12)
    assert found.cosine == pytest.approx(cosine(ours, theirs), abs=1e-12)
    assert found.weights == ()


@pytest.mark.usefixtures("_blocks")
def test_slots_are_renormalised_each_and_meet_the_whole() -> None:
    weight = normal(7, 5, seed=9)
    parts = [
        dora(10, rows=RowSlice(start=0, stop=3, total=7), n_out=3),
        dora(20, rows=RowSlice(start=3, stop=7, total=7), n_out=4),
    ]
    dense = torch.cat([added(parts[0], weight[:3]), added(parts[1], weight[3:])])
    whole = dora(30)
    found = diff(one(*parts), one(whole), base_weight=lambda module: weight)
    assert found.norm == pytest.approx(float(dense.norm()), rel=1e-12)
    assert found.distance == pytest.approx(float((dense - added(whole, weight)).norm()), rel=1e-12)
    (row,) = found.modules
    assert str(row.target) == "layer.q_proj"
    alone = diff(one(*parts), one(parts[0]), base_weight=lambda module: weight)
    assert [(row.only_in, row.distance == 0) for row in alone.modules] == [(None, True), ("A", False)]
    assert alone.distance == pytest.approx(float(added(parts[1], weight[3:]).norm()), rel=1e-12)


def test_other_factors_of_the_same_delta_weight_are_the_same_dora() -> None:
    left, weight = dora(), normal(7, 5, seed=9)
    right = replace(left, lora_A=left.lora_A * 2, lora_B=left.lora_B.double() / 2)
    assert diff(one(left), one(right), tolerance=1e-12, base_weight=lambda module: weight).same
    assert not diff(
        one(left), one(replace(left, magnitude=left.magnitude * 1.01)), base_weight=lambda module: weight
    ).same  # type: ignore[operator]


def test_weights_that_are_stored_in_by_out_are_turned() -> None:
    """As GPT-2's are, where the adapter does not say it."""
    left, right, weight = dora(), dora(50), normal(7, 5, seed=9)
    found = diff(one(left), one(right), base_weight=lambda module: weight.T)
    assert found.distance == pytest.approx(float((added(left, weight) - added(right, weight)).norm()), rel=1e-12)
    with pytest.raises(ShapeError, match=r"the base weight has shape \(6, 5\)"):
        diff(one(left), one(right), base_weight=lambda module: weight[:6])


def test_what_is_equal_bit_for_bit_asks_for_no_base(tmp_path: Path) -> None:
    held = one(dora())
    found = adaptertools.diff(held, one(dora()), base=tmp_path / "nothing")
    assert (found.same, found.modules[0].identical, found.dora_on_base, found.dora_in_parts) == (True, True, (), ())
    weight = normal(7, 5, seed=9)
    (row,) = diff(held, one(dora()), norms=True, base_weight=lambda module: weight).modules
    assert row.norm == pytest.approx(float(added(dora(), weight).norm()), rel=1e-12)


def test_modules_that_the_base_lacks_are_compared_in_parts_and_named(tmp_path: Path) -> None:
    save_file({"layer.q_proj.weight": normal(7, 5, seed=9)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    other = Target(parameter="layer.v_proj")
    ours, theirs = one(dora(), replace(dora(), target=other)), one(dora(5), replace(dora(5), target=other))
    found = adaptertools.diff(ours, theirs, base=tmp_path)
    assert (found.dora_on_base, found.dora_in_parts) == (("layer.q_proj",), ("layer.v_proj",))
    assert [weight.name for weight in found.weights] == ["layer.v_proj.magnitude"]
    save_file({"layer.q_proj.weight": torch.ones(7, 5, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert adaptertools.diff(ours, theirs, base=tmp_path).dora_on_base == ()


def test_a_row_of_norm_zero_is_named() -> None:
    left = replace(dora(), lora_B=torch.zeros(7, 2))
    weight = torch.cat([torch.zeros(1, 5), torch.ones(6, 5)])
    with pytest.raises(NonFiniteError, match=r"layer\.q_proj: DoRA has no delta weight there: a row or column"):
        diff(one(left), one(dora()), base_weight=lambda module: weight)
    with pytest.raises(NonFiniteError, match=r"layer\.q_proj of the base model holds NaN"):
        diff(one(dora(3)), one(dora()), base_weight=lambda module: weight * math.nan)
