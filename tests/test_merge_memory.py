"""Merging into weights in memory: in place, swapped, and undone to the last bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_cases import normal
from safetensors.torch import save_file
from torch import Tensor

from adaptertools import merge_into, plan_merge, run_merge
from adaptertools.adapter import Adapter, FullWeight, RowWeights
from adaptertools.containers import safetensors
from adaptertools.errors import MatchError, NonFiniteError, OptionError, UnsupportedFeatureError
from adaptertools.module import LoraModule, Target

NAMES = tuple(f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj"))
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    named = {f"{name}.weight": normal(40, 24, seed=seed, size=0.02, dtype=dtype) for seed, name in enumerate(NAMES)}
    return named | {"model.norm.weight": normal(24, seed=9, dtype=dtype), "lm_head.weight": normal(50, 24, seed=8)}


def adapter(*, seed: int = 100, names: tuple[str, ...] = NAMES, size: float = 0.01, dora: bool = False) -> Adapter:
    modules = tuple(
        LoraModule(
            target=Target(parameter=name),
            lora_A=normal(4, 24, seed=seed + place),
            lora_B=normal(40, 4, seed=seed + place + 50, size=size),
            alpha=8.0,
            magnitude=normal(40, seed=seed, size=0.001) + 0.1 if dora else None,
        )
        for place, name in enumerate(names)
    )
    return Adapter(modules=modules)


def on(device: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device, copy=True) for name, tensor in state.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(one[name].cpu().view(torch.uint8), other[name].cpu().view(torch.uint8)) for name in one
    ) and set(one) == set(other)


def near(found: dict[str, Tensor], reference: dict[str, Tensor]) -> bool:
    """Correctly rounded, but for one entry in a thousand, which float32 may take to the number beside."""
    pairs = [(found[name].cpu(), value) for name, value in reference.items()]
    wrong = sum(int((one != other).sum()) for one, other in pairs)
    total = sum(value.numel() for value in reference.values())
    close = all(torch.allclose(one.double(), other.double(), rtol=2.0**-7, atol=1e-7) for one, other in pairs)
    return close and wrong <= total / 1000 and set(found) == set(reference)


def expected(state: dict[str, Tensor], *adapters: Adapter, share: float = 1.0) -> dict[str, Tensor]:
    result = {name: tensor.double() for name, tensor in state.items()}
    for each in adapters:
        for module in each.modules:
            delta = module.lora_B.double() @ module.lora_A.double() * module.scaling
            result[f"{module.target.parameter}.weight"] += share * delta
    return {name: tensor.to(state[name].dtype) for name, tensor in result.items()}


@pytest.fixture(params=["device", "host", "path"])
def keep(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    if request.param != "path":
        return str(request.param)
    save_file(weights(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("device", DEVICES)
def test_merging_swapping_and_undoing_give_what_they_say(device: str, keep: str | Path) -> None:
    state = on(device, weights())
    places = {name: tensor.data_ptr() for name, tensor in state.items()}
    one, two = adapter(), adapter(seed=500, names=NAMES[1:3])
    merged = merge_into(state, [one], keep=keep)  # type: ignore[arg-type]
    assert near(state, expected(weights(), one))
    merged.swap([one, two], weights=[0.5, 0.5])
    assert near(state, expected(weights(), one, two, share=0.5))
    assert merged.statistics == {}
    merged.swap([two], has_statistics=True)
    assert near(state, expected(weights(), two))
    assert set(merged.statistics) == {f"{name}.weight" for name in NAMES[1:3]}
    merged.undo()
    assert same(state, weights())
    assert merged.plan is None
    merged.swap([one])
    assert near(state, expected(weights(), one))
    assert places == {name: tensor.data_ptr() for name, tensor in state.items()}


@pytest.mark.parametrize("device", DEVICES)
def test_a_thousand_swaps_leave_no_trace(device: str) -> None:
    state = on(device, weights())
    merged = merge_into(state, [adapter()])
    for seed in range(1000):
        merged.swap([adapter(seed=seed % 7, names=NAMES[: 1 + seed % 4])])
    merged.undo()
    assert same(state, weights())


@pytest.mark.parametrize("dora", [False, True])
def test_memory_and_files_get_the_same_bits(tmp_path: Path, dora: bool) -> None:
    state = weights()
    base = tmp_path / "base"
    base.mkdir()
    save_file(state, base / "model.safetensors")
    chosen = [adapter(dora=dora), adapter(seed=300)]
    run_merge(plan_merge(base, chosen, [1.0, 0.5]), tmp_path / "merged", device="cpu")
    merge_into(state, chosen, weights=[1.0, 0.5])
    written = safetensors.read(tmp_path / "merged" / "model.safetensors").tensors
    assert same(state, dict(written))
    assert not same(state, weights())


def test_a_module_is_merged_into_where_it_stands() -> None:
    model = torch.nn.Sequential()
    model.add_module("proj", torch.nn.Linear(24, 40, bias=False))
    model.add_module("turned", torch.nn.Linear(24, 40, bias=False))
    with torch.no_grad():
        model.turned.weight.set_(torch.randn(24, 40).t())  # not contiguous
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = adapter(names=("proj", "turned"))
    x = torch.randn(3, 24)
    merged = merge_into(model, [chosen])
    for name, module in zip(("proj", "turned"), chosen.modules, strict=True):
        dense = before[f"{name}.weight"] + module.lora_B @ module.lora_A * module.scaling
        assert torch.allclose(getattr(model, name)(x), x @ dense.t(), atol=1e-5)
    merged.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_tensor_under_two_names_changes_once() -> None:
    state = weights()
    state["again.weight"] = state[f"{NAMES[0]}.weight"]
    merge_into(state, [adapter(names=NAMES[:1])])
    assert state["again.weight"].data_ptr() == state[f"{NAMES[0]}.weight"].data_ptr()
    del state["again.weight"]
    assert near(state, expected(weights(), adapter(names=NAMES[:1])))


@pytest.mark.parametrize("device", DEVICES)
def test_whole_weights_replace_and_come_back(device: str) -> None:
    state = on(device, weights())
    head = normal(50, 24, seed=70)
    changed = Adapter(modules=adapter().modules, full_weights={"lm_head.weight": FullWeight(weight=head)})
    merged = merge_into(state, [changed])
    assert torch.equal(state["lm_head.weight"].cpu(), head)
    merged.swap([adapter(seed=3)])
    assert near(state, expected(weights(), adapter(seed=3)))
    merged.undo()
    assert same(state, weights())


@pytest.mark.parametrize("device", DEVICES)
def test_trained_token_rows_are_set_and_come_back(device: str) -> None:
    state = on(device, weights() | {"model.embed_tokens.weight": normal(50, 24, seed=4, dtype=torch.bfloat16)})
    rows = normal(2, 24, seed=5)
    trained = Adapter(
        modules=adapter().modules, row_weights={"model.embed_tokens.weight": RowWeights(indices=(7, 3), rows=rows)}
    )
    merged = merge_into(state, [trained])
    found = state["model.embed_tokens.weight"].cpu()
    assert torch.equal(found[[7, 3]], rows.bfloat16())
    assert torch.equal(found[8:], normal(50, 24, seed=4, dtype=torch.bfloat16)[8:])
    merged.undo()
    assert torch.equal(state["model.embed_tokens.weight"].cpu(), normal(50, 24, seed=4, dtype=torch.bfloat16))


def test_a_resized_weight_is_refused_before_anything_changes() -> None:
    state = weights()
    head = Adapter(
        modules=adapter().modules, full_weights={"lm_head.weight": FullWeight(weight=normal(60, 24, seed=1))}
    )
    with pytest.raises((UnsupportedFeatureError, ValueError)):
        merge_into(state, [head])
    assert same(state, weights())


def test_an_unknown_module_changes_nothing() -> None:
    state = weights()
    with pytest.raises(MatchError):
        merge_into(state, [adapter(names=(*NAMES, "model.layers.7.q_proj"))])
    assert same(state, weights())


@pytest.mark.parametrize("device", DEVICES)
def test_a_merge_that_fails_half_way_gives_the_originals_back(device: str) -> None:
    state = on(device, weights(torch.float16))
    merged = merge_into(state, [adapter()])
    huge = Adapter(modules=(*adapter().modules[:2], *adapter(names=NAMES[2:], size=1e6).modules))
    with pytest.raises(NonFiniteError, match=r"layers\.1\.self_attn.*range of torch\.float16"):
        merged.swap([huge])
    assert same(state, weights(torch.float16))


def test_a_checkpoint_of_other_bits_is_refused(tmp_path: Path) -> None:
    other = weights()
    other[f"{NAMES[2]}.weight"][3, 4] += 1
    save_file(other, tmp_path / "model.safetensors")
    state = weights()
    with pytest.raises(OptionError, match=r"does not hold the bits of model\.layers\.1\.self_attn\.q_proj"):
        merge_into(state, [adapter()], keep=tmp_path)
    assert same(state, weights())


@pytest.mark.parametrize("keep", ["gpu", 3])
def test_an_unknown_place_to_keep_originals_is_refused(keep: object) -> None:
    with pytest.raises(OptionError, match="keep is"):
        merge_into(weights(), [adapter()], keep=keep)  # type: ignore[arg-type]


def test_weights_that_were_never_loaded_are_refused() -> None:
    state = {name: tensor.to("meta") for name, tensor in weights().items()}
    with pytest.raises(UnsupportedFeatureError, match="on the device meta"):
        merge_into(state, [adapter()])


@pytest.mark.parametrize("call", [lambda: merge_into({}, [adapter()])])
def test_nothing_to_merge_into_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(OptionError, match="no tensor"):
        call()


@pytest.mark.parametrize("device", DEVICES)
def test_of_two_merges_into_a_tensor_the_later_one_is_undone_first(device: str) -> None:
    state, before = on(device, weights()), on(device, weights())
    first = merge_into(state, [adapter()])
    after_first = on(device, state)
    second = merge_into(state, [adapter()], [2.0])
    for too_early in (first.undo, lambda: first.swap([adapter()], [0.5])):
        with pytest.raises(UnsupportedFeatureError, match="came later: undo that one first"):
            too_early()
    second.undo()
    assert same(state, after_first)
    second.swap([adapter()])  # anew, upon the first
    second.undo()
    first.undo()
    assert same(state, before)
    second.swap([adapter()])
    assert same(state, after_first)


def test_a_tensor_that_is_another_one_by_now_is_not_taken_for_the_one_that_was_changed() -> None:
    model = torch.nn.Module()
    model.proj = torch.nn.Linear(24, 40, bias=False)
    merged = merge_into(model, [adapter(names=("proj",))])
    model.half()
    for call in (merged.undo, lambda: merged.swap([adapter(names=("proj",))])):
        with pytest.raises(UnsupportedFeatureError, match="the model has another tensor there by now"):
            call()


def test_a_tied_head_is_refused_with_what_can_be_done_in_memory() -> None:
    state = {"model.embed_tokens.weight": normal(50, 24, seed=7), **weights()}
    del state["lm_head.weight"]
    with pytest.raises(UnsupportedFeatureError, match=r"Give the model a lm_head\.weight of its own first"):
        merge_into(state, [adapter(names=("lm_head",))], config={"tie_word_embeddings": True})


def test_what_is_merged_is_told_in_a_line() -> None:
    merged = merge_into(weights(), [adapter(), adapter(seed=3)], [1, 0.5])
    assert repr(merged) == "<Merged: 1 × adapter 1, 0.5 × adapter 2, in 4 tensors>"
    merged.undo()
    assert repr(merged) == "<Merged: nothing, the originals are in place>"


@pytest.mark.parametrize("target", ["model", [1], None])
def test_what_holds_no_weights_is_an_error_of_ours(target: Any) -> None:
    with pytest.raises(OptionError, match=r"expected a torch\.nn\.Module or its state dict"):
        merge_into(target, [adapter()])
