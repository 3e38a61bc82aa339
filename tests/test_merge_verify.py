"""`verify` proves right merges, and finds what is wrong with the others."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran
from merged_models import merge, read_adapter, save_adapter, save_base, save_model, weights_in
from peft_cases import CASES, make_base, quiet
from safetensors.torch import load_file, save_file
from torch import Tensor

import adaptertools
from adaptertools.adapter import Adapter, LoraModule, Target
from adaptertools.errors import SourceNotFoundError, UnsupportedFeatureError
from adaptertools.merging.coefficients import Moments, fit
from adaptertools.merging.comparison import Comparison, _same_bits
from adaptertools.merging.edits import Edit, Renormalization, Update
from adaptertools.merging.kernels import prepare
from adaptertools.merging.reference import ExactRows, Reference
from adaptertools.merging.scratch import scratch
from adaptertools.merging.verify import Verification

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias"),  # peft 0.21 takes a bias for a factor
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match.*:RuntimeWarning"),  # it overlooks parameters
]

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Llama in shards, two adapters of PEFT on it, and our merge of both."""
    folder = tmp_path_factory.mktemp("llama")
    save_base("llama", folder / "base", torch.bfloat16)
    save_adapter("llama", folder / "one")
    save_adapter("llama_patterns", folder / "other")
    merge(folder / "base", adapters_in(folder), folder / "merged", [1.0, 0.5])
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """The merge of both, to be spoiled."""
    return Path(shutil.copytree(llama / "merged", tmp_path / "merged"))


def adapters_in(folder: Path) -> list[Adapter]:
    """The two adapters; the second has other factors, so that the two are not alike."""
    one, other = (read_adapter(folder / name, folder / "base") for name in ("one", "other"))
    return [one, other.map_modules(turned)]


def turned(module: LoraModule) -> LoraModule:
    return replace(module, lora_A=module.lora_A.flip(-1), lora_B=module.lora_B.flip(-2))


def verified(llama: Path, merged: Path, weights: list[float] | None = None, **options: Any) -> Verification:
    return adaptertools.verify_merge(
        llama / "base", adapters_in(llama), merged, weights or [1.0, 0.5], device="cpu", **options
    )


def shard_with(folder: Path, name: str) -> Path:
    return next(path for path in sorted(folder.glob("*.safetensors")) if name in load_file(path))


def change(folder: Path, name: str, edit: Callable[[Tensor], Tensor | None]) -> None:
    """Replace one tensor of a model, or take it out of its shard and index."""
    shard = shard_with(folder, name)
    tensors = load_file(shard)
    new = edit(tensors.pop(name).clone())
    if new is not None:
        tensors[name] = new
    save_file(tensors, shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if new is None and index.exists():
        document = json.loads(index.read_text())
        del document["weight_map"][name]
        index.write_text(json.dumps(document))


# --------------------------------------------------------------------------------------------------- what is right


def test_a_right_merge_is_proven(llama: Path) -> None:
    found = verified(llama, llama / "merged")
    assert found.ok, (found.problems, found.wrong)
    assert not found.by_other_tool
    assert repr(found) == f"<Verification of {llama / 'merged'}: right, 14 tensors of {len(found.tensors)} merged>"
    assert {each.name for each in found.tensors} == set(weights_in(llama / "base"))
    assert sum(each.computed for each in found.tensors) == 14
    assert all(each.roundings <= 1.0 for each in found.tensors)
    assert sum(each.elements for each in found.tensors) == sum(t.numel() for t in weights_in(llama / "base").values())
    assert [each.verdict for each in found.coefficients] == ["once", "once"]
    assert [each.found for each in found.coefficients] == pytest.approx([1.0, 1.0], abs=0.01)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("alora", "gpt2_mixed")])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=["bf16", "f32"]
)
def test_our_merge_of_every_kind_is_proven(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_base(case, tmp_path / "base", dtype)
    save_adapter(case, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", base)
    merged = merge(base, [adapter], tmp_path / "merged", [0.75])
    found = adaptertools.verify_merge(base, [adapter], merged, [0.75], device="cpu")
    assert found.ok, (found.problems, found.wrong)
    assert [each.verdict for each in found.coefficients] == ["once"]


@pytest.mark.parametrize("options", [{"dtype": torch.float16}, {"dtype": torch.float32}], ids=["f16", "f32"])
def test_a_merge_into_another_dtype_is_proven_without_saying_which(options: dict[str, Any], tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base", torch.bfloat16)
    save_adapter("llama", tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", base)
    merged = merge(base, [adapter], tmp_path / "merged", **options)
    assert {t.dtype for t in weights_in(merged).values()} == {options["dtype"]}
    assert adaptertools.verify_merge(base, [adapter], merged, device="cpu").ok


def test_an_untied_head_is_proven_without_saying_so(tmp_path: Path) -> None:
    base = save_base("gpt2_mixed", tmp_path / "base")
    save_adapter("gpt2_mixed", tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", base)
    merged = merge(base, [adapter], tmp_path / "merged", untie=True)
    assert adaptertools.verify_merge(base, [adapter], merged, device="cpu").ok


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert", "moe_transposed", "embedding", "dora", "attention"])
def test_a_merge_by_peft_is_proven(case: str, tmp_path: Path) -> None:
    base = save_base(case, tmp_path / "base")
    model = save_adapter(case, tmp_path / "adapter")
    with quiet():
        theirs = save_model(model.merge_and_unload(), tmp_path / "theirs")
    found = adaptertools.verify_merge(base, [read_adapter(tmp_path / "adapter", base)], theirs, device="cpu")
    assert found.ok, (found.problems, found.wrong)
    assert found.by_other_tool
    assert [each.verdict for each in found.coefficients] == ["once"]


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_a_merge_by_peft_in_half_precision_may_round_twice(dtype: torch.dtype, safe: bool, tmp_path: Path) -> None:
    from peft import PeftModel

    base = save_base("llama", tmp_path / "base", dtype)
    save_adapter("llama", tmp_path / "adapter")
    with quiet():
        model = PeftModel.from_pretrained(make_base("llama").to(dtype), tmp_path / "adapter")
        theirs = save_model(model.merge_and_unload(safe_merge=safe), tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "adapter", base)
    assert adaptertools.verify_merge(base, [adapter], theirs, device="cpu").ok
    shutil.copy(merge(base, [adapter], tmp_path / "ours") / "adaptertools_merge.json", theirs)
    strictly = adaptertools.verify_merge(base, [adapter], theirs, device="cpu")
    assert bool(strictly.wrong) is safe, "only safe_merge rounds the delta weight first"


@pytest.mark.parametrize("case", ["llama_dora", "gpt2_dora", "convolutions_dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("factors", ["single", "half"])
def test_a_merge_of_dora_by_peft_in_half_precision_is_proven(
    factors: str, dtype: torch.dtype, case: str, tmp_path: Path
) -> None:
    """With factors in float32 PEFT rounds once; with factors in half precision it rounds norm, gain and all else."""
    from peft import PeftModel

    base, half = save_base(case, tmp_path / "base", dtype), factors == "half"
    save_adapter(case, tmp_path / "trained")
    with quiet():
        model = PeftModel.from_pretrained(
            make_base(case).to(dtype), tmp_path / "trained", autocast_adapter_dtype=not half
        )
        model = model.to(dtype) if half else model
        model.save_pretrained(tmp_path / "adapter")
        theirs = save_model(model.merge_and_unload(), tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "adapter", base)
    found = adaptertools.verify_merge(base, [adapter], theirs, device="cpu")
    assert found.ok, (found.problems, found.wrong)
    assert found.allowed == 6
    assert [each.verdict for each in found.coefficients] == ["once"]
    shutil.copy(merge(base, [adapter], tmp_path / "ours") / "adaptertools_merge.json", theirs)
    strictly = adaptertools.verify_merge(base, [adapter], theirs, device="cpu")
    assert strictly.allowed == 1
    assert bool(strictly.wrong) is half


def test_dora_so_small_that_its_roundings_would_hide_it_is_missed_all_the_same(tmp_path: Path) -> None:
    """Each weight stays within six roundings of what it has to be; the sum over all of them tells."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64).bfloat16()
    (tmp_path / "base").mkdir()
    save_file({"q.weight": weight}, tmp_path / "base" / "model.safetensors")
    norms = weight.float().norm(dim=1) * 1.007
    lora_A, lora_B = torch.randn(2, 64), torch.zeros(64, 2)
    module = LoraModule(target=Target(parameter="q"), lora_A=lora_A, lora_B=lora_B, alpha=2.0, magnitude=norms)
    adapter = Adapter(modules=(module,))
    shutil.copytree(tmp_path / "base", tmp_path / "same")
    missed = adaptertools.verify_merge(tmp_path / "base", [adapter], tmp_path / "same", device="cpu")
    assert not missed.wrong
    assert not missed.ok
    assert "coefficient 0 in the merge" in missed.problems[0]
    right = merge(tmp_path / "base", [adapter], tmp_path / "right")
    (right / "adaptertools_merge.json").unlink()
    assert adaptertools.verify_merge(tmp_path / "base", [adapter], right, device="cpu").ok


@pytest.mark.parametrize(
    ("name", "shape", "needed"),
    [
        ("embeddings.position_ids", (1, 9), False),
        ("layers.0.self_attn.rotary_emb.inv_freq", (4,), False),
        ("h.0.attn.bias", (1, 1, 9, 9), False),
        ("h.0.attn.masked_bias", (), False),
        ("h.0.attn.bias", (9,), True),
        ("embeddings.position_embeddings.weight", (9, 4), True),
    ],
)
def test_what_a_models_class_makes_anew_may_be_missing_from_a_merge_by_another_tool(
    name: str, shape: tuple[int, ...], needed: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    save_file({"q.weight": torch.randn(8, 6), name: torch.ones(shape)}, tmp_path / "base" / "model.safetensors")
    module = LoraModule(target=Target(parameter="q"), lora_A=torch.randn(2, 6), lora_B=torch.randn(8, 2), alpha=2.0)
    merged = merge(tmp_path / "base", [Adapter(modules=(module,))], tmp_path / "merged")
    save_file({"q.weight": weights_in(merged)["q.weight"]}, merged / "model.safetensors")
    ours = adaptertools.verify_merge(tmp_path / "base", [Adapter(modules=(module,))], merged, device="cpu")
    assert ours.problems == (f"missing: {name}",)
    (merged / "adaptertools_merge.json").unlink()
    theirs = adaptertools.verify_merge(tmp_path / "base", [Adapter(modules=(module,))], merged, device="cpu")
    assert theirs.ok is not needed
    assert any(name in note for note in theirs.notes) is not needed


def test_modules_that_were_left_out_are_named(llama: Path, tmp_path: Path) -> None:
    one = adapters_in(llama)[0]
    odd = replace(one.modules[0], target=Target(parameter="elsewhere.entirely"))
    with_odd = replace(one, modules=(*one.modules, odd))
    merged = merge(llama / "base", [with_odd], tmp_path / "merged", allow_unmatched=True)
    found = adaptertools.verify_merge(llama / "base", [with_odd], merged, allow_unmatched=True, device="cpu")
    assert found.ok
    assert "elsewhere.entirely" in found.notes[0]


def test_a_merge_of_an_adapter_that_still_trains_is_proven(llama: Path) -> None:
    first, second = adapters_in(llama)
    training = first.map_modules(
        lambda each: replace(each, lora_A=each.lora_A.requires_grad_(), lora_B=each.lora_B.requires_grad_())
    )
    assert adaptertools.verify_merge(llama / "base", [training, second], llama / "merged", [1.0, 0.5], device="cpu").ok


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_finds_what_the_cpu_finds(llama: Path, tmp_path: Path) -> None:
    wrong = merge(llama / "base", adapters_in(llama), tmp_path / "wrong", [1.0, 0.25])
    for merged in (llama / "merged", wrong):
        here = verified(llama, merged)
        there = adaptertools.verify_merge(llama / "base", adapters_in(llama), merged, [1.0, 0.5], device="cuda")
        assert here.ok == there.ok == (merged != wrong)
        assert {each.name for each in here.wrong} == {each.name for each in there.wrong}
        fitted = [each.found for each in here.coefficients]
        assert [each.found for each in there.coefficients] == pytest.approx(fitted, rel=1e-9)


# --------------------------------------------------------------------------------------------------- what is wrong


def flip(tensor: Tensor, element: int, bit: int = 0) -> Tensor:
    bits = tensor.reshape(-1).view(torch.int16)
    bits[element] ^= 1 << bit
    return bits.view(tensor.dtype).reshape(tensor.shape)


@pytest.mark.parametrize("element", [0, 100, 255])
def test_a_flipped_bit_in_an_untouched_tensor_is_found(element: int, llama: Path, copy: Path) -> None:
    change(copy, "model.embed_tokens.weight", lambda tensor: flip(tensor, element))
    found = verified(llama, copy)
    assert not found.ok
    assert [(each.name, each.wrong) for each in found.wrong] == [("model.embed_tokens.weight", 1)]


@pytest.mark.parametrize("element", [0, 77, 255])
@pytest.mark.parametrize("bit", [0, 3, 14, 15])
def test_a_flipped_bit_in_a_merged_tensor_is_found(element: int, bit: int, llama: Path, copy: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    change(copy, name, lambda tensor: flip(tensor, element, bit))
    found = verified(llama, copy)
    assert [(each.name, each.wrong) for each in found.wrong] == [(name, 1)]
    assert found.worst[0].name == name
    assert found.worst[0].roundings > 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_found(value: float, llama: Path, copy: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def spoil(tensor: Tensor) -> Tensor:
        tensor[3, 2] = value
        return tensor

    change(copy, name, spoil)
    found = verified(llama, copy)
    assert [(each.name, each.wrong) for each in found.wrong] == [(name, 1)]
    assert found.worst[0].roundings == float("inf")


def test_a_missing_tensor_an_extra_one_and_one_of_another_shape_are_found(llama: Path, copy: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change(copy, name, lambda _: None)
    assert any(name in problem and "missing" in problem for problem in verified(llama, copy).problems)
    change(copy, "model.norm.weight", lambda tensor: tensor[:-1].clone())
    assert any("model.norm.weight is (15,)" in problem for problem in verified(llama, copy).problems)
    change(copy, "lm_head.weight", lambda tensor: tensor.float())
    assert any("lm_head.weight is (32, 16) in f32" in problem for problem in verified(llama, copy).problems)
    shard = shard_with(copy, "lm_head.weight")
    save_file({**load_file(shard), "more.weight": torch.zeros(2)}, shard)
    index = copy / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["more.weight"] = shard.name
    index.write_text(json.dumps(document))
    assert any("more.weight" in problem for problem in verified(llama, copy).problems)


def test_an_index_that_lies_is_found(llama: Path, copy: Path) -> None:
    index = copy / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    index.write_text(json.dumps({**document, "metadata": {"total_size": 17}}))
    assert any("total_size of 17" in problem for problem in verified(llama, copy).problems)
    name, shard = next(iter(document["weight_map"].items()))
    other = next(file for file in document["weight_map"].values() if file != shard)
    index.write_text(json.dumps({**document, "weight_map": {**document["weight_map"], name: other}}))
    assert any(name in problem for problem in verified(llama, copy).problems)


def test_a_shard_that_is_gone_or_cut_off_is_found(llama: Path, copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert any(shard.name in problem for problem in verified(llama, copy).problems)
    shard.unlink()
    assert any(shard.name in problem for problem in verified(llama, copy).problems)
    with pytest.raises(SourceNotFoundError):
        verified(llama, copy / "nowhere")


def test_a_merge_without_its_index_is_no_right_one(llama: Path, copy: Path) -> None:
    (copy / "model.safetensors.index.json").unlink()
    assert any("is missing: download it too" in problem for problem in verified(llama, copy).problems)


def test_an_adapter_in_the_place_of_the_merge_is_called_that(llama: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"belongs to an adapter, and a whole model is expected here"):
        verified(llama, llama / "one")


def test_a_changed_configuration_and_strange_files_are_found(llama: Path, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 17, "vocab_size": 33}))
    shutil.copy(sorted(copy.glob("*.safetensors"))[0], copy / "old.safetensors")
    (copy / "generation_config.json").write_text("{}")
    problems = "; ".join(verified(llama, copy).problems)
    assert "vocab_size is 33, expected 32" in problems
    assert "rope_theta is 17" in problems
    assert "old.safetensors" in problems
    assert "generation_config.json" in problems


# ------------------------------------------------------------------------------------------ how often it was applied


@pytest.mark.parametrize(
    ("applied", "verdicts", "coefficients"),
    [
        ([1.0, 0.5], ["once", "once"], [1, 1]),
        ([2.0, 0.5], ["twice", "once"], [2, 1]),
        ([1.0, 1.0], ["once", "twice"], [1, 2]),
        ([1.0, 0.0], ["once", "not at all"], [1, 0]),
        ([0.0, 0.0], ["not at all", "not at all"], [0, 0]),
        ([0.25, 0.5], ["another weight", "once"], [0.25, 1]),
        ([-1.0, 0.5], ["another weight", "once"], [-1, 1]),
    ],
    ids=str,
)
def test_how_often_each_adapter_was_applied_is_told(
    applied: list[float], verdicts: list[str], coefficients: list[float], llama: Path, tmp_path: Path
) -> None:
    adapters = adapters_in(llama)
    chosen = [(adapter, weight) for adapter, weight in zip(adapters, applied, strict=True) if weight]
    merged = llama / "base"
    if chosen:
        merged = merge(
            llama / "base", [one for one, _ in chosen], tmp_path / "merged", [weight for _, weight in chosen]
        )
    found = verified(llama, merged)
    assert found.ok is (applied == [1.0, 0.5])
    assert [each.verdict for each in found.coefficients] == verdicts
    assert [each.found for each in found.coefficients] == pytest.approx(coefficients, abs=0.02)


def test_a_merge_on_top_of_a_merge_is_told_as_twice(llama: Path, tmp_path: Path) -> None:
    one = adapters_in(llama)[0]
    once = merge(llama / "base", [one], tmp_path / "once")
    twice = merge(once, [one], tmp_path / "twice")
    found = adaptertools.verify_merge(llama / "base", [one], twice, device="cpu")
    assert not found.ok
    assert [each.verdict for each in found.coefficients] == ["twice"]


def test_coefficients_of_adapters_that_cannot_be_told_apart_are_not_made_up() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 500, dtype=torch.float64)
    deltas = torch.stack([first, second, first * -3, torch.zeros(500)])
    found = 2 * first + 0.5 * second
    moments = Moments(gram=deltas @ deltas.T, found=deltas @ found, expected=deltas @ deltas.sum(0))
    told = fit(moments, "abcd", [1.0] * 4)
    assert [each.found for each in told] == [None, pytest.approx(0.5), None, None]
    assert [each.verdict for each in told] == ["cannot tell", "another weight", "cannot tell", "cannot tell"]
    assert fit(Moments.zero(2), "ab", [1.0, 1.0])[1].verdict == "cannot tell"


def test_what_rounding_takes_is_not_held_against_a_merge(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base", torch.bfloat16)
    save_adapter("llama", tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", base)
    small = [1e-6]
    merged = merge(base, [adapter], tmp_path / "merged", small)
    found = adaptertools.verify_merge(base, [adapter], merged, small, device="cpu")
    assert found.ok
    (coefficient,) = found.coefficients
    assert coefficient.expected == coefficient.found < 0.3
    assert coefficient.verdict == "cannot tell"


# ------------------------------------------------------------------------------------------------------- the reference


def edit_of(kind: str, dtype: torch.dtype) -> tuple[Edit, Tensor, Tensor]:
    """An edit, its weight, and what comes out in dense float64."""
    torch.manual_seed(3)
    weight = torch.randn(40, 24).to(dtype)
    left, right = torch.randn(16, 3), torch.randn(3, 12)
    update = Update(source=0, target="q", left=left, right=right, scale=0.5, row=8, column=6)
    whole = Update(source=1, target="p", left=torch.randn(40, 2), right=torch.randn(2, 24), scale=-1.5)
    dense = weight.double().clone()
    changes: dict[str, Any] = {}
    if kind == "whole":
        other = Update(source=0, target="o", left=torch.randn(40, 5), right=torch.randn(5, 24), scale=0.25)
        changes["updates"] = (whole, other)
        dense = dense - 1.5 * whole.left.double() @ whole.right.double()
        dense = dense + 0.25 * other.left.double() @ other.right.double()
    elif kind == "updates":
        changes["updates"] = (update, whole)
        dense = dense - 1.5 * whole.left.double() @ whole.right.double()
        dense[8:24, 6:18] += 0.5 * left.double() @ right.double()
    elif kind == "rows":
        rows = torch.randn(2, 24)
        changes |= {"rows": (((39, 0), rows),), "updates": (whole,)}
        dense[[39, 0]] = rows.double()
        dense = dense - 1.5 * whole.left.double() @ whole.right.double()
    else:
        over_columns = kind == "dora"
        magnitude = torch.rand(16 if over_columns else 12) + 0.5
        axis = "row" if over_columns else "column"
        changes["renormalizations"] = (Renormalization(update=update, weight=0.7, magnitude=magnitude, axis=axis),)
        old = dense[8:24, 6:18].clone()
        new = old + 0.5 * left.double() @ right.double()
        norm = new.norm(dim=1 if over_columns else 0, keepdim=True)
        magnitude = magnitude.double().unsqueeze(1) if over_columns else magnitude.double()
        dense[8:24, 6:18] += 0.7 * (magnitude * new / norm - old)
    edit = Edit(name="w", source="w", shape=(40, 24), matrix=(40, 24), dtype=dtype, **changes)
    return edit, weight, dense


KINDS = ["whole", "updates", "rows", "dora", "dora over rows"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 7, 40])
def test_the_reference_is_the_dense_sum_whatever_the_blocks(
    kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, weight, dense = edit_of(kind, torch.float32)
    monkeypatch.setattr("adaptertools.merging.reference.BLOCK_ELEMENTS", 24 * block)
    reference = Reference(edit, weight, CPU)
    assert reference.block_rows == block
    found = torch.cat([reference.rows(start, min(start + block, 40)).value.clone() for start in range(0, 40, block)])
    assert (found - dense).abs().max() <= 1e-13


def doubt_of(exact: ExactRows) -> torch.Tensor:
    """That of every element."""
    rows, columns = torch.ones_like(exact.before).nonzero().unbind(dim=1)
    return exact.doubt(rows, columns).reshape(exact.before.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_kernel_is_within_the_doubt_of_the_reference(kind: str, dtype: torch.dtype) -> None:
    edit, weight, dense = edit_of(kind, dtype)
    prepared = prepare(edit, CPU)
    if edit.rows:
        weight = weight.clone()
        for indices, rows in edit.rows:
            weight[list(indices)] = rows.to(dtype)
    if prepared.wants_norms:
        prepared.measure(weight, 0)
        prepared.settle()
    found = prepared.merged(weight, 0)
    exact = Reference(edit, weight, CPU).rows(0, 40)
    off = (found.double() - dense).abs()
    doubt = doubt_of(exact)
    limit = doubt + torch.finfo(dtype).eps / 2 * dense.abs() * 1.001
    if not edit.rows:  # trained rows meet the weights in the dtype that the kernel was given
        assert (off <= limit).all()
    assert (doubt <= 1e-4).all(), "a doubt that forgives everything proves nothing"


def test_the_doubt_is_far_below_a_rounding_to_bf16() -> None:
    edit, weight, dense = edit_of("updates", torch.bfloat16)
    doubt = doubt_of(Reference(edit, weight, CPU).rows(0, 40))
    assert float((doubt / dense.abs().clamp_min(0.1)).max()) < 2.0**-9 / 4


def test_memory_stays_within_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    rows = Reference.rows

    def counted(self: Reference, start: int, stop: int) -> Any:
        seen.append((stop - start) * self.edit.matrix[1])
        return rows(self, start, stop)

    monkeypatch.setattr(Reference, "rows", counted)
    monkeypatch.setattr("adaptertools.merging.reference.BLOCK_ELEMENTS", 100)
    edit, weight, _ = edit_of("updates", torch.float32)
    pieces = list(comparison_of(edit, weight, weight)._pieces("w"))
    for piece in pieces:
        piece.check(piece.start, piece.stop)
    assert len(pieces) == 10
    assert max(seen) <= 100


def comparison_of(edit: Edit, weight: Tensor, found: Tensor, ours: bool = True) -> Comparison:
    """Of a model with one tensor, `w`, that became `found`."""

    class File:
        def __init__(self, tensor: Tensor) -> None:
            self.shapes, self.dtypes = {"w": tuple(tensor.shape)}, {"w": tensor.dtype}
            self.tensor = {"w": tensor}.__getitem__

    class Plan:
        edits = {"w": edit}  # noqa: RUF012
        sources = ("a", "b")
        base = File(weight)

    return Comparison(Plan(), File(found), CPU, ours)  # type: ignore[arg-type]


# ------------------------------------------------------------------- the same verdict as float64 on the whole tensor


def moved(tensor: Tensor, steps: Tensor) -> Tensor:
    """Each element so many numbers of its dtype up or down."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return (tensor.contiguous().view(bits) + steps.to(bits)).view(tensor.dtype)


def judged(exact: ExactRows, dense: Tensor, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which elements of our merge are wrong, the roundings that each is off, and its distance: one formula for all."""
    doubt, eps = doubt_of(exact), exact.epsilon
    off, rounded = (found.double() - dense).abs(), dense.to(found.dtype)
    is_right = ((dense - doubt).to(found.dtype) <= found) & (found <= (dense + doubt).to(found.dtype))
    slack = torch.where(found == rounded, eps * dense.abs(), doubt)
    return ~is_right, ((off - slack) / half_step(dense, found.dtype)).clamp_min(0.0), off


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spoiled", [0.0, 0.01, 1.0], ids=["right", "one in a hundred", "all"])
def test_the_verdict_is_that_of_float64_on_the_whole_tensor(
    spoiled: float, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elements some numbers of their dtype off, through blocks and buffers, against one dense formula."""
    edit, weight, dense = edit_of(kind, dtype)
    touched = torch.rand(40, 24) < spoiled
    step = 1 if dtype.itemsize == 2 else 100  # arithmetic in float32 may be off by some numbers of float32
    found = moved(dense.to(dtype), torch.where(touched, step * torch.randint(-3, 4, (40, 24)), 0))
    exact = Reference(edit, weight, CPU).rows(0, 40)
    wrong, roundings, off = judged(exact, exact.value.clone(), found)
    deltas, before, value = exact.stack.flatten(1).clone(), exact.before.clone(), exact.value.clone()
    places = list(exact.sources)
    assert torch.allclose(value, dense, rtol=0, atol=1e-13)
    assert bool(wrong.any()) is (spoiled > 0)

    monkeypatch.setattr("adaptertools.merging.reference.BLOCK_ELEMENTS", 24 * 7)
    (check,), moments = comparison_of(edit, weight, found).run(["w"], None)
    assert check.wrong == int(wrong.sum())
    assert check.elements == 40 * 24
    assert check.roundings == pytest.approx(float(roundings.max()), rel=1e-6, abs=1e-6)
    assert check.max_abs == pytest.approx(float(off.max()), rel=1e-6, abs=1e-13)
    close = {"rtol": 1e-9, "atol": 1e-9}
    assert torch.allclose(moments.gram[places][:, places], deltas @ deltas.T, **close)
    assert torch.allclose(moments.found[places], deltas @ (found.double() - before).flatten(), **close)
    assert torch.allclose(moments.expected[places], deltas @ (dense.to(dtype).double() - before).flatten(), **close)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "another tool's"])
@pytest.mark.parametrize("direction", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_last_number_allowed_passes_and_the_next_is_found_wherever_it_stands(
    dtype: torch.dtype, direction: int, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the last, shorter block. Another tool may round each delta weight and the sum before the last one."""
    edit, weight, dense = edit_of("whole", dtype)
    exact = Reference(edit, weight, CPU).rows(0, 40)
    room = doubt_of(exact)
    if not ours:
        first, second = exact.stack
        room = room + sum(half_step(each, dtype) for each in (first, second, exact.before.abs() + first.abs()))
    limit = (dense + direction * room).to(dtype)
    beyond = moved(limit, (direction * limit.sign()).int())
    monkeypatch.setattr("adaptertools.merging.reference.BLOCK_ELEMENTS", 24 * 7)
    for place in (0, 23, 24 * 7 - 1, 24 * 7, 500, 40 * 24 - 1):
        for wrong, value in enumerate((limit, beyond)):
            found = dense.to(dtype)
            found.view(-1)[place] = value.view(-1)[place]
            (check,), _ = comparison_of(edit, weight, found, ours).run(["w"], None)
            assert check.wrong == wrong, place


def half_step(value: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.finfo(dtype).eps / 2 * torch.exp2(value.abs().log2().floor())


@pytest.mark.parametrize("nbytes", [1, 2, 7, 8, 9, 24, 31])
def test_one_bit_anywhere_in_untouched_bytes_is_found(nbytes: int) -> None:
    """They are compared eight at a time, wherever they begin and end."""
    room = torch.arange(40, dtype=torch.uint8)
    for start in (0, 1, 3, 8):
        expected = room[start : start + nbytes]
        assert _same_bits("w", expected, expected.clone(), 1).wrong == 0
        for place in range(nbytes):
            found = expected.clone()
            found[place] ^= 16
            assert _same_bits("w", expected, found, 1).wrong == 1


def test_no_thread_computes_in_the_memory_of_another() -> None:
    like = torch.empty(4, 5)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(scratch, "a test", like, torch.float64).result()
        here, again = (scratch("a test", like, torch.float64) for _ in range(2))
        assert here.data_ptr() == again.data_ptr() != there.data_ptr()
        assert scratch("another", like, torch.float64).data_ptr() != here.data_ptr()
        assert scratch("a test", like.expand(3, 4, 5), torch.float64).shape == (3, 4, 5)


# -------------------------------------------------------------------------------------------------- the command line


def test_the_command_line_exits_with_0_or_4(llama: Path, copy: Path, run: Callable[..., Ran]) -> None:
    places = (llama / "base", llama / "one", copy)
    merge(llama / "base", [adapters_in(llama)[0]], copy.parent / "right")
    right = run("verify", llama / "base", llama / "one", copy.parent / "right", "--device", "cpu")
    assert (right.code, right.err) == (0, "")
    assert "applied once" in right.out
    wrong = run("verify", *places, "--device", "cpu")
    assert wrong.code == 4
    assert "not" in wrong.out.splitlines()[0]
    document = run("verify", *places, "--device", "cpu", "--json")
    assert document.code == 4
    assert document.json["ok"] is False
    assert document.json["wrong"]
    assert document.json["adapters"][0]["verdict"] == "once"
    assert run("verify", *places, "-q").out == ""
    missing = run("verify", llama / "base", llama / "one", copy.parent / "nowhere")
    assert missing.code == 1
    assert missing.err == f"Error: {copy.parent / 'nowhere'}: there is no such merged model\n"


def test_of_many_problems_the_first_are_shown_and_no_coefficient_of_what_was_not_compared(
    llama: Path, copy: Path, run: Callable[..., Ran]
) -> None:
    for shard in copy.glob("*.safetensors"):
        save_file({name: tensor.unsqueeze(0) for name, tensor in load_file(shard).items()}, shard)
    ran = run("verify", llama / "base", llama / "one", copy, "--device", "cpu")
    assert ran.code == 4
    wrong = [line for line in ran.out.splitlines() if line.startswith("  wrong")]
    found = verified(llama, copy)
    assert wrong[-1] == f"  wrong        and {len(found.problems) - 5} more"
    assert len(wrong) == 6
    assert found.coefficients == ()
    assert "  adapter" not in ran.out


def test_weights_on_the_command_line_are_those_of_the_merge(
    llama: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    adapter = adapters_in(llama)[0]
    merged = merge(llama / "base", [adapter, adapter], tmp_path / "merged", [0.5, 0.25])
    names = (llama / "base", llama / "one", llama / "one", merged)
    assert run("verify", *names, "--weights", "0.5,0.25").code == 0
    assert run("verify", *names).code == 4
    assert run("verify", *names, "--weights", "0.5").code == 2
