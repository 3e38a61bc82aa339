"""What a merge is planned to do, executed densely and compared with real PEFT and with delta weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft_cases
import pytest
import torch
from merge_dense import execute, module, tensor, write_base
from safetensors.torch import save_file
from torch import Tensor, nn

import adaptertools
from adaptertools.adapter import Adapter, Base, FullWeight, Origin, RowWeights, WeightRole
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.containers.source import Located
from adaptertools.errors import (
    AdapterToolsError,
    MatchError,
    NonFiniteError,
    OptionError,
    ShapeError,
    UnsupportedFeatureError,
)
from adaptertools.merging.plan import MergePlan, plan_merge
from adaptertools.module import Kind, LoraModule, RowSlice, Target

PEFT_CASES = (
    "bias_all",
    "convolutions_dora",
    "dora",
    "embedding",
    "gpt2_dora",
    "gpt2_mixed",
    "llama_patterns",
    "llama_tied",
    "llama_tied_saved",
    "llama_tokens",
    "moe",
    "moe_transposed",
    "roberta",
)
"""One for each way in which a tensor changes; tests/test_merge_oracle.py runs the engine on all."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


def saved(model: nn.Module, folder: Path) -> Path:
    """The model as its own library stores it; a plain module as a state dict."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return folder
    return write_base(folder, model.state_dict())


def loaded(case: str, plan_folder: Path, config: dict[str, object], tensors: dict[str, Tensor]) -> nn.Module:
    """A fresh model with these tensors, through the library where it has one."""
    fresh = peft_cases.make_base(case)
    if not hasattr(fresh, "save_pretrained"):
        fresh.load_state_dict(tensors)
        return fresh
    plan_folder.mkdir()
    (plan_folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        plan_folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    model, report = type(fresh).from_pretrained(plan_folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("case", PEFT_CASES)
def test_the_merged_model_gives_what_the_adapter_model_gives(case: str, tmp_path: Path) -> None:
    base = peft_cases.make_base(case)
    folder = saved(base, tmp_path / "base")
    model = peft_cases.make_adapter(case, base)
    with peft_cases.quiet():
        model.save_pretrained(tmp_path / "adapter")
    adapter = adaptertools.read(tmp_path / "adapter", base=folder)
    plan = plan_merge(folder, [adapter], untie=case == "gpt2_mixed")
    merged = loaded(case, tmp_path / "merged", {**plan.base.config, **plan.config}, execute(plan))
    wanted, found = peft_cases.run(case, model), peft_cases.run(case, merged)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert not torch.allclose(found, peft_cases.run(case, peft_cases.make_base(case)), atol=1e-3)


def adapter(*modules: LoraModule, **fields: Any) -> Adapter:
    return Adapter(modules=modules, **fields)


def whole(role: WeightRole = WeightRole.MODULE, **weights: Tensor) -> dict[str, FullWeight]:
    """Whole weights; two underscores in a name are a dot."""
    return {name.replace("__", "."): FullWeight(weight=weight, role=role) for name, weight in weights.items()}


LAYERS = {
    "model.embed_tokens.weight": tensor(7, 4, seed=1),
    "model.layers.0.q_proj.weight": tensor(6, 4, seed=2).bfloat16(),
    "model.layers.0.q_proj.bias": tensor(6, seed=3).bfloat16(),
    "model.layers.1.q_proj.weight": tensor(6, 4, seed=4).half(),
    "model.norm.weight": tensor(4, seed=5),
    "model.position_ids": torch.arange(7),
}
Q0, Q1 = module("model.layers.0.q_proj", 6, 4), module("model.layers.1.q_proj", 6, 4, alpha=5.0)


def write_torch(folder: Path, shards: int) -> Path:
    """The layers in torch files, as transformers named them."""
    folder.mkdir()
    if shards == 1:
        torch.save(LAYERS, folder / "pytorch_model.bin")
        return folder
    files = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(LAYERS)}
    for file in set(files.values()):
        torch.save({name: LAYERS[name] for name in LAYERS if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_a_plain_merge_patches_files_of_the_base(shards: int, tmp_path: Path) -> None:
    base = write_base(tmp_path, LAYERS, shards=shards)
    plan = plan_merge(base, [adapter(Q0), adapter(Q0, Q1)], [0.5, -2.0])
    assert list(plan.edits) == ["model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight"]
    assert all(shard.patches for shard in plan.shards)
    assert {shard.name: shard.tensors for shard in plan.shards} == dict(Checkpoint.open(base).tensors_of)
    assert plan.config == {}
    found = execute(plan)
    for name, weight in LAYERS.items():
        scale = {"model.layers.0.q_proj.weight": -1.5, "model.layers.1.q_proj.weight": -2.0}.get(name, 0)
        lora = Q1 if name.startswith("model.layers.1") else Q0
        delta = scale * lora.delta_weight(dtype=torch.float64) if scale else 0
        assert torch.equal(found[name], (weight.double() + delta).to(weight.dtype)), name


@pytest.mark.parametrize(("shards", "names"), [(1, ["model.safetensors"]), (2, [1, 2])])
def test_torch_files_become_safetensors(shards: int, names: list[Any], tmp_path: Path) -> None:
    base = write_torch(tmp_path / "base", shards)
    plan = plan_merge(str(base), [adapter(Q0, Q1)])
    wanted = [name if isinstance(name, str) else f"model-0000{name}-of-00002.safetensors" for name in names]
    assert [shard.name for shard in plan.shards] == wanted
    assert not any(shard.patches for shard in plan.shards)
    assert sorted(plan.tensors) == sorted(LAYERS)
    right = execute(plan_merge(write_base(tmp_path / "other", LAYERS), [adapter(Q0, Q1)]))
    assert all(torch.equal(tensor, right[name]) for name, tensor in execute(plan).items())


def test_factors_are_views_of_the_adapters_own(tmp_path: Path) -> None:
    embedding = module("model.embed_tokens", 4, 7, kind=Kind.EMBEDDING, transposed=True)
    plan = plan_merge(write_base(tmp_path, LAYERS), [adapter(Q0, embedding)])
    (update,) = plan.edits["model.layers.0.q_proj.weight"].updates
    assert (update.left.data_ptr(), update.right.data_ptr()) == (Q0.lora_B.data_ptr(), Q0.lora_A.data_ptr())
    (update,) = plan.edits["model.embed_tokens.weight"].updates
    assert (update.left.data_ptr(), update.right.data_ptr()) == (
        embedding.lora_A.data_ptr(),
        embedding.lora_B.data_ptr(),
    )


def test_no_weight_is_read(tmp_path: Path) -> None:
    """A file of 64 GB that is nothing but a header and a hole."""
    names = [f"model.layers.{i}.q_proj.weight" for i in range(64)]
    size = 512 << 20
    entries = {
        name: {"dtype": "BF16", "shape": [16384, 16384], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 64 * size)
    wide = {"lora_A": tensor(1, 1).expand(2, 16384), "lora_B": tensor(1, 1).expand(16384, 2)}
    modules = [module(name.removesuffix(".weight"), 1, 1, **wide) for name in names]
    plan = plan_merge(tmp_path, [adapter(*modules)])
    assert len(plan.edits) == 64
    assert plan.bytes_read == plan.bytes_written == 64 * size
    resident = Path("/proc/self/smaps").read_text().split(str(path))[1].split("Rss:")[1].split("kB")[0]
    assert int(resident) == 0


def dora(name: str, out: int, n_in: int, **changes: Any) -> LoraModule:
    return module(name, out, n_in, magnitude=tensor(out, seed=8).abs() + 0.1, **changes)


DORA = {
    "linear": (dora("lin", 6, 4), (6, 4), False),
    "transposed": (dora("lin", 6, 4), (4, 6), True),
    "embedding": (dora("lin", 4, 7, kind=Kind.EMBEDDING, transposed=True), (7, 4), False),
    "convolution": (dora("lin", 6, 18, kind=Kind.CONV, shape=(6, 2, 3, 3)), (6, 2, 3, 3), False),
    "slot": (dora("lin", 3, 4, target=Target(parameter="lin", rows=RowSlice(start=3, stop=6, total=9))), (9, 4), False),
    "slot, transposed": (
        dora("lin", 3, 4, target=Target(parameter="lin", rows=RowSlice(start=3, stop=6, total=9))),
        (4, 9),
        True,
    ),
    "magnitude of inputs": (
        module("lin", 6, 4, magnitude=tensor(4, seed=8).abs(), magnitude_axis="in"),
        (6, 4),
        False,
    ),
}


@pytest.mark.parametrize("case", DORA)
def test_dora_is_taken_from_the_unmerged_weight_beside_others(case: str, tmp_path: Path) -> None:
    lora, shape, turned = DORA[case]
    weight = tensor(*shape, seed=7)
    base = write_base(tmp_path, {"lin.weight": weight})
    plain = replace(lora, magnitude=None)
    plan = plan_merge(base, [adapter(lora), adapter(plain)], [0.7, 3.0])
    as_trained = weight.T if turned else weight
    delta = 0.7 * lora.delta_weight(base_weight=as_trained) + 3 * plain.delta_weight()
    wanted = as_trained + delta
    torch.testing.assert_close(execute(plan)["lin.weight"], wanted.T if turned else wanted)


def test_dora_that_shares_a_weight_with_another_adapter_is_said_to_be_taken_from_the_base(tmp_path: Path) -> None:
    base = write_base(tmp_path, {"lin.weight": tensor(6, 4), "fused.weight": tensor(9, 4)})
    with_dora, plain = dora("lin", 6, 4), module("lin", 6, 4)
    told = "change the same weights (lin.weight)"

    def is_told(*adapters: Adapter) -> bool:
        return any(told in note for note in plan_merge(base, adapters).notes)

    assert is_told(adapter(with_dora), adapter(plain))
    assert is_told(adapter(plain), adapter(with_dora))
    assert is_told(adapter(with_dora), adapter(with_dora))
    assert not is_told(adapter(with_dora))
    assert not is_told(adapter(plain), adapter(plain))
    slots = [Target(parameter="fused", rows=RowSlice(start=start, stop=start + 3, total=9)) for start in (0, 3)]
    apart = [adapter(dora("fused", 3, 4, target=slots[0])), adapter(module("fused", 3, 4, target=slots[1]))]
    assert not any("DoRA" in note for note in plan_merge(base, apart).notes)


@pytest.mark.parametrize("fold", [False, True])
def test_convolutions_of_either_layout_add_up(fold: bool, tmp_path: Path) -> None:
    weight = tensor(5, 3, 2, 2)
    plain = module("conv", 5, 12, kind=Kind.CONV, shape=(5, 3, 2, 2))
    folded = module("conv", 10, 6, lora_A=tensor(4, 6), lora_B=tensor(10, 4), kind=Kind.CONV, shape=(5, 3, 2, 2))
    assert folded.kernel_fold == 2
    adapters = [adapter(folded)] if fold else [adapter(folded), adapter(plain)]
    plan = plan_merge(write_base(tmp_path, {"conv.weight": weight}), adapters)
    delta = folded.delta_weight() + (0 if fold else plain.delta_weight())
    torch.testing.assert_close(execute(plan)["conv.weight"], weight + delta)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1), (6, 4, 1, 1)])
def test_a_kernel_of_one_value_may_be_left_out(shape: tuple[int, ...], tmp_path: Path) -> None:
    base = write_base(tmp_path, {"a.weight": tensor(*shape)})
    for lora in (module("a", 6, 4), module("a", 6, 4, kind=Kind.CONV, shape=(6, 4, 1, 1))):
        found = execute(plan_merge(base, [adapter(lora)]))["a.weight"]
        torch.testing.assert_close(found, tensor(*shape) + lora.delta_weight().reshape(shape))


def test_a_lora_bias_is_added_to_the_bias_of_its_layer(tmp_path: Path) -> None:
    base = write_base(tmp_path, LAYERS)
    biased = replace(Q0, lora_bias=tensor(6, seed=9))
    found = execute(plan_merge(base, [adapter(biased)], [2.0]))["model.layers.0.q_proj.bias"]
    wanted = LAYERS["model.layers.0.q_proj.bias"].double() + 3.0 * tensor(6, seed=9).double()
    assert torch.equal(found, wanted.bfloat16())
    with pytest.raises(UnsupportedFeatureError, match=r"^adapter 2: .* no bias for model\.layers\.1\.q_proj\.weight"):
        plan_merge(base, [adapter(Q0), adapter(replace(Q1, lora_bias=tensor(6)))])


def test_whole_weights_replace_those_of_the_base_in_its_dtype(tmp_path: Path) -> None:
    base = write_base(tmp_path, LAYERS)
    brought = whole(model__norm__weight=tensor(4, seed=11), model__layers__0__q_proj__weight=tensor(6, 4, seed=12))
    plan = plan_merge(base, [adapter(Q0, full_weights=brought)])
    assert all(shard.patches for shard in plan.shards)
    found = execute(plan)
    assert torch.equal(found["model.norm.weight"], tensor(4, seed=11))
    wanted = tensor(6, 4, seed=12).double() + Q0.delta_weight(dtype=torch.float64)
    assert torch.equal(found["model.layers.0.q_proj.weight"], wanted.bfloat16()), "replaced first, then added to"


def test_whole_weights_that_differ_need_a_choice(tmp_path: Path) -> None:
    base = write_base(tmp_path, LAYERS)
    adapters = [adapter(Q0, full_weights=whole(model__norm__weight=tensor(4, seed=seed))) for seed in (11, 12, 11)]
    plan_merge(base, [adapters[0], adapters[2]])
    with pytest.raises(UnsupportedFeatureError, match=r"different weights for model\.norm\.weight.*--full-weights N"):
        plan_merge(base, adapters)
    plan = plan_merge(base, adapters, full_weights=2)
    assert torch.equal(execute(plan)["model.norm.weight"], tensor(4, seed=12))
    assert any("not taken: model.norm.weight" in note for note in plan.notes)
    for number in (4, "1"):
        with pytest.raises(
            OptionError, match=rf"full_weights is {number!r}, expected the number of an adapter: 1, 2, 3"
        ):
            plan_merge(base, adapters, full_weights=number)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "named"), [("a/path", "str"), (["a/path"], "str"), ([Path("a/path")], "Path"), (None, "Adapter")]
)
def test_what_is_no_list_of_adapters_is_an_error_of_ours(given: Any, named: str, tmp_path: Path) -> None:
    write_base(tmp_path, {"a.weight": torch.ones(2, 2)})
    adapters = given or Adapter(modules=(), full_weights={"a.weight": FullWeight(weight=torch.ones(2, 2))})
    for call in (
        lambda: adaptertools.plan_merge(tmp_path, adapters),
        lambda: adaptertools.merge_into({"a.weight": torch.ones(2, 2)}, adapters),
    ):
        with pytest.raises(OptionError, match=rf"^adapters: found .*{named}, expected a list of Adapter"):
            call()


def test_a_head_that_the_base_lacks_is_added(tmp_path: Path) -> None:
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    base = write_base(tmp_path, LAYERS, config, shards=2)
    brought = whole(classifier__weight=tensor(3, 4).bfloat16(), classifier__bias=tensor(3).bfloat16())
    plan = plan_merge(base, [adapter(Q0, full_weights=brought)])
    assert plan.shards[-1].tensors[-2:] == ("classifier.weight", "classifier.bias")
    assert [shard.patches for shard in plan.shards] == [True, False]
    assert plan.edits["classifier.weight"].dtype == torch.float32, "that of most of the base"
    assert plan.config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert any("the base has no classifier.weight, classifier.bias" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("brought", "count"),
    [
        (whole(score__weight=tensor(5, 4)), 5),
        (whole(classifier__dense__weight=tensor(4, 4), classifier__out_proj__weight=tensor(3, 4)), 3),
        (whole(classifier__out_proj__weight=tensor(3, 4), classifier__dense__weight=tensor(4, 4)), 3),
        (whole(score__weight=tensor(2, 4)), None),
        (whole(cls__predictions__transform__dense__weight=tensor(4, 4)), None),
    ],
)
def test_a_head_for_other_labels_is_said_in_the_configuration(
    brought: dict[str, FullWeight], count: int | None, tmp_path: Path
) -> None:
    base = write_base(
        tmp_path, LAYERS | {"classifier.out_proj.weight": tensor(2, 4)}, {"id2label": {"0": "a", "1": "b"}}
    )
    plan = plan_merge(base, [adapter(Q0, full_weights=brought)])
    assert len(plan.config.get("label2id", ())) == (count or 0)
    assert len(plan.config.get("id2label", ())) == (count or 0)
    said = [note for note in plan.notes if note.startswith(f"the result's head has {count} labels")]
    assert len(said) == (count is not None)


@pytest.mark.parametrize(
    "brought",
    [
        whole(model__layers__1__q_proj__bias=tensor(6), role=WeightRole.BIAS),
        whole(model__layers__7__norm__weight=tensor(6)),
        whole(model__embed_positions__weight=tensor(6, 4), role=WeightRole.BASE),
    ],
)
def test_other_weights_that_the_base_lacks_are_an_error(brought: dict[str, FullWeight], tmp_path: Path) -> None:
    base = write_base(tmp_path, LAYERS)
    with pytest.raises(MatchError, match=next(iter(brought))):
        plan_merge(base, [adapter(Q0, full_weights=brought)])
    plan = plan_merge(base, [adapter(Q0, full_weights=brought)], allow_unmatched=True)
    assert plan.left_out == tuple(brought)


def test_a_whole_weight_of_another_shape_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"model\.norm\.weight: the adapter's weight has shape \(5,\)"):
        plan_merge(write_base(tmp_path, LAYERS), [adapter(Q0, full_weights=whole(model__norm__weight=tensor(5)))])


def rows(*indices: int, seed: int = 0) -> dict[str, RowWeights]:
    return {"model.embed_tokens.weight": RowWeights(indices=indices, rows=tensor(len(indices), 4, seed=seed))}


def test_trained_token_rows_replace_rows(tmp_path: Path) -> None:
    base = write_base(tmp_path, LAYERS)
    plan = plan_merge(base, [adapter(row_weights=rows(5, 2)), adapter(row_weights=rows(6, seed=3))])
    wanted = LAYERS["model.embed_tokens.weight"].clone()
    wanted[[5, 2]], wanted[6] = tensor(2, 4), tensor(1, 4, seed=3)[0]
    assert torch.equal(execute(plan)["model.embed_tokens.weight"], wanted)
    assert plan.computed == ()
    with pytest.raises(UnsupportedFeatureError, match="different rows for token 2"):
        plan_merge(base, [adapter(row_weights=rows(5, 2)), adapter(row_weights=rows(2, seed=3))])
    with pytest.raises(ShapeError, match="up to token 7"):
        plan_merge(base, [adapter(row_weights=rows(7))])


CAUSAL = {"architectures": ["LlamaForCausalLM"], "vocab_size": 7}
TIED, UNTIED = {**CAUSAL, "tie_word_embeddings": True}, {**CAUSAL, "tie_word_embeddings": False}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HEAD_LORA = module("lm_head", 7, 4)
EMBED_LORA = module("model.embed_tokens", 4, 7, kind=Kind.EMBEDDING, transposed=True)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("lora", [HEAD_LORA, EMBED_LORA], ids=["head", "embedding"])
def test_one_of_two_tied_weights_is_changed_only_where_they_are_untied(
    lora: LoraModule, stored: bool, tmp_path: Path
) -> None:
    weights = LAYERS | ({HEAD: LAYERS[EMBED]} if stored else {})
    base = write_base(tmp_path, weights, TIED, shards=2)
    with pytest.raises(UnsupportedFeatureError, match=r"ties its output head to .*embed_tokens.*--untie"):
        plan_merge(base, [adapter(lora)])
    plan = plan_merge(base, [adapter(lora)], untie=True)
    assert plan.config == {"tie_word_embeddings": False}
    found = execute(plan)
    changed, kept = (HEAD, EMBED) if lora is HEAD_LORA else (EMBED, HEAD)
    torch.testing.assert_close(found[changed], LAYERS[EMBED] + lora.delta_weight())
    assert torch.equal(found[kept], LAYERS[EMBED])
    assert plan.shards[-1].patches == stored


def test_a_head_that_is_no_copy_is_changed_alone(tmp_path: Path) -> None:
    head = tensor(7, 4, seed=20)
    plan = plan_merge(write_base(tmp_path, LAYERS | {HEAD: head}, UNTIED), [adapter(HEAD_LORA)])
    assert list(plan.edits) == [HEAD]
    assert plan.config == {}
    torch.testing.assert_close(execute(plan)[HEAD], head + HEAD_LORA.delta_weight())


def test_a_configuration_that_leaves_tying_open_is_settled(tmp_path: Path) -> None:
    """GPT-2's class ties them, Llama's does not, and neither writes it down."""
    plan = plan_merge(write_base(tmp_path, LAYERS | {HEAD: tensor(7, 4)}, CAUSAL), [adapter(HEAD_LORA)])
    assert plan.config == {"tie_word_embeddings": False}
    assert list(plan.edits) == [HEAD]


def test_a_model_without_an_output_head_ties_nothing(tmp_path: Path) -> None:
    config = {"architectures": ["BertModel"], "tie_word_embeddings": True}
    plan = plan_merge(write_base(tmp_path, LAYERS, config), [adapter(EMBED_LORA)])
    assert list(plan.edits) == [EMBED]
    assert plan.config == {}


def test_a_stored_copy_of_a_tied_weight_changes_with_it(tmp_path: Path) -> None:
    trained = adapter(EMBED_LORA, row_weights=rows(3), metadata={"peft": {"ensure_weight_tying": True}})
    base = write_base(tmp_path, LAYERS | {HEAD: LAYERS[EMBED]}, TIED)
    found = execute(plan_merge(base, [trained]))
    assert not torch.equal(found[EMBED], LAYERS[EMBED])
    assert torch.equal(found[HEAD], found[EMBED])


def test_tied_weights_of_a_torch_file_stay_the_same(tmp_path: Path) -> None:
    shared = tensor(7, 4)
    torch.save({EMBED: shared, HEAD: shared}, tmp_path / "pytorch_model.bin")
    found = execute(plan_merge(tmp_path, [adapter(row_weights=rows(3))]))
    assert not torch.equal(found[EMBED], shared)
    assert torch.equal(found[HEAD], found[EMBED])
    with pytest.raises(UnsupportedFeatureError, match="untie"):
        plan_merge(tmp_path, [adapter(HEAD_LORA)])


def test_a_change_of_one_of_two_names_of_a_tensor_is_refused(tmp_path: Path) -> None:
    weight = tensor(6, 4)
    torch.save({"a.q.weight": weight, "b.q.weight": weight, "c.weight": tensor(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedFeatureError, match=r"b\.q\.weight, which is the same tensor as a\.q\.weight"):
        plan_merge(tmp_path, [adapter(module("b.q", 6, 4))])
    found = execute(plan_merge(tmp_path, [adapter(module("a.q", 6, 4))]))
    assert torch.equal(found["a.q.weight"], found["b.q.weight"])


def test_both_ends_of_a_tie_that_were_saved_count_once_unless_they_differ(tmp_path: Path) -> None:
    base = write_base(tmp_path, LAYERS, TIED)
    same = whole(model__embed_tokens__weight=tensor(7, 4), lm_head__weight=tensor(7, 4))
    plan = plan_merge(base, [adapter(Q0, full_weights=same)])
    assert HEAD not in plan.tensors
    assert torch.equal(execute(plan)[EMBED], tensor(7, 4))
    apart = whole(model__embed_tokens__weight=tensor(7, 4), lm_head__weight=tensor(7, 4, seed=1))
    with pytest.raises(UnsupportedFeatureError, match="untie"):
        plan_merge(base, [adapter(Q0, full_weights=apart)])
    found = execute(plan_merge(base, [adapter(Q0, full_weights=apart)], untie=True))
    assert torch.equal(found[EMBED], tensor(7, 4))
    assert torch.equal(found[HEAD], tensor(7, 4, seed=1))


def test_a_model_that_scales_with_its_tie_is_not_untied(tmp_path: Path) -> None:
    config = {**TIED, "model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    base = write_base(tmp_path, {"shared.weight": tensor(7, 4)}, config)
    with pytest.raises(UnsupportedFeatureError, match="cannot be untied"):
        plan_merge(base, [adapter(HEAD_LORA)], untie=True)


@pytest.mark.parametrize("inner", [False, True])
def test_a_resized_vocabulary_changes_the_configuration(inner: bool, tmp_path: Path) -> None:
    config = {"text_config": UNTIED, "architectures": ["X"]} if inner else UNTIED
    base = write_base(tmp_path, LAYERS | {HEAD: tensor(7, 4)}, config)
    embedding, head = (
        whole(WeightRole.BASE, model__embed_tokens__weight=tensor(9, 4)),
        whole(WeightRole.BASE, lm_head__weight=tensor(9, 4, seed=2)),
    )
    grown = replace(EMBED_LORA, lora_A=tensor(2, 9))
    plan = plan_merge(base, [adapter(grown, full_weights=embedding | head)])
    assert plan.config == ({"text_config": {**UNTIED, "vocab_size": 9}} if inner else {"vocab_size": 9})
    assert not plan.shards[0].patches
    found = execute(plan)
    torch.testing.assert_close(found[EMBED], tensor(9, 4) + grown.delta_weight())
    assert torch.equal(found[HEAD], tensor(9, 4, seed=2))
    with pytest.raises(ShapeError, match=r"gets 9 rows, lm_head\.weight has 7"):
        plan_merge(base, [adapter(Q0, full_weights=embedding)])
    with pytest.raises(ShapeError, match=r"gets 7 rows, lm_head\.weight has 9"):
        plan_merge(base, [adapter(Q0, full_weights=head)])
    with pytest.raises(ShapeError, match="Was its vocabulary resized"):
        plan_merge(base, [adapter(grown)])


def test_a_resized_vocabulary_of_a_tied_model_needs_the_embedding_alone(tmp_path: Path) -> None:
    base = write_base(tmp_path, LAYERS, TIED)
    plan = plan_merge(
        base, [adapter(Q0, full_weights=whole(WeightRole.BASE, model__embed_tokens__weight=tensor(9, 4)))]
    )
    assert plan.config == {"vocab_size": 9}
    assert plan.edits[EMBED].shape == (9, 4)


def test_every_floating_point_tensor_is_cast(tmp_path: Path) -> None:
    base = write_base(tmp_path, LAYERS, {"torch_dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}})
    plan = plan_merge(base, [adapter(Q0)], dtype=torch.float16)
    found = execute(plan)
    assert {tensor.dtype for tensor in found.values()} == {torch.float16, torch.int64}
    assert "model.layers.1.q_proj.weight" not in plan.edits, "it is float16 already"
    wanted = LAYERS["model.layers.0.q_proj.weight"].double() + Q0.delta_weight(dtype=torch.float64)
    assert torch.equal(found["model.layers.0.q_proj.weight"], wanted.half())
    assert plan.config == {"torch_dtype": "float16", "text_config": {"torch_dtype": "float16"}}
    assert "cast      4 tensors to f16" in str(plan)


FILES = {
    "config.json": True,
    "tokenizer.json": True,
    "README.md": True,
    "merges.txt": True,
    "1_Pooling/config.json": True,
    "2_Dense/model.safetensors": True,
    "2_Dense/pytorch_model.bin": False,
    "chat_templates/a.jinja": True,
    "pytorch_model.bin": False,
    "consolidated.00.pth": False,
    "model.gguf": False,
    "onnx/config.json": False,
    "training_args.bin": False,
    "other/model.safetensors": False,
    "adapter_config.json": False,
    "adaptertools_merge.json": False,
    ".git/config": False,
    "model.safetensors.index.json": False,
}


def test_small_files_travel_along_and_other_weights_do_not(tmp_path: Path) -> None:
    base = write_base(tmp_path, LAYERS, {}, shards=2)
    for name in FILES:
        (base / name).parent.mkdir(exist_ok=True)
        if not (base / name).exists():
            (base / name).write_text("{}")
    (base / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    plan = plan_merge(base, [adapter(Q0)])
    assert set(plan.copied) == {name for name, travels in FILES.items() if travels} | {"modules.json"}
    assert any("left in the base's folder" in note and "consolidated.00.pth" in note for note in plan.notes)


def test_the_plan_prints_what_it_does(tmp_path: Path) -> None:
    plan: MergePlan = plan_merge(write_base(tmp_path, LAYERS, {}, shards=2), [adapter(Q0)], [0.5], sources=["mine"])
    size = sum(weight.nbytes for weight in LAYERS.values())
    assert (plan.bytes_read, plan.bytes_written) == (size, size)
    assert plan.adapter_bytes == Q0.lora_A.nbytes + Q0.lora_B.nbytes
    assert str(plan).splitlines() == [
        f"base      {tmp_path}: 6 tensors in 2 files",
        "adapter   mine, weight 0.5",
        "changed   1 of 6 tensors",
        f"read      {size} bytes",
        f"written   {size} bytes in 2 files",
        "copied    1 other file",
        f"adapters  {plan.adapter_bytes} bytes in memory",
    ]


@pytest.mark.parametrize("weights", [[], [1.0, 2.0], [float("nan")], [float("inf")], [True], ["1"]], ids=repr)
def test_weights_are_one_finite_number_for_each_adapter(weights: list[Any], tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"weights are .*, expected finite numbers|weights? for 1 adapter: expected one"
    ):
        plan_merge(write_base(tmp_path, LAYERS), [adapter(Q0)], weights)


@pytest.mark.parametrize("flag", ["untie", "allow_unmatched"])
def test_what_is_neither_true_nor_false_is_an_error_of_ours(flag: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"{flag} is 'no', expected True or False"):
        plan_merge(write_base(tmp_path, LAYERS), [adapter(Q0)], **{flag: "no"})


def test_an_adapter_of_weight_0_changes_nothing(tmp_path: Path) -> None:
    silent = adapter(Q1, full_weights=whole(model__norm__weight=tensor(4)))
    plan = plan_merge(write_base(tmp_path, LAYERS), [silent, adapter(Q0)], [0, 1])
    assert list(plan.edits) == ["model.layers.0.q_proj.weight"]
    assert plan.edits["model.layers.0.q_proj.weight"].updates[0].source == 1
    assert any("weight 0" in note for note in plan.notes)


def test_adapters_of_which_nothing_matches_are_an_error_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(MatchError, match=r"nothing that the adapters hold matches it, such as other\.q"):
        plan_merge(write_base(tmp_path, LAYERS), [adapter(module("other.q", 6, 4))], allow_unmatched=True)


def test_other_dtypes_are_no_dtype_of_a_model(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"dtype is torch\.int8, expected one of f64, f32, f16, bf16"):
        plan_merge(write_base(tmp_path, LAYERS), [adapter(Q0)], dtype=torch.int8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    bad = tensor(6, 2)
    bad[3, 1] = value
    base = write_base(tmp_path, LAYERS)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0\.q_proj\.lora_B"):
        plan_merge(base, [adapter(replace(Q0, lora_B=bad))])
    with pytest.raises(NonFiniteError, match="norm"):
        plan_merge(base, [adapter(Q0, full_weights=whole(model__norm__weight=bad[3]))])


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_nothing_is_added_to_integers(dtype: torch.dtype, tmp_path: Path) -> None:
    base = write_base(tmp_path, {"a.table": torch.zeros(6, 4, dtype=dtype)})
    with pytest.raises(AdapterToolsError, match=r"a\.table is (int64|uint8)"):
        plan_merge(base, [adapter(module("a.table", 6, 4))])


def named(name: str, base: str | None) -> Adapter:
    bases = {"": Base(id=base)}
    return Adapter(modules=(Q0,), bases=bases, origin=Origin(format="peft", container="safetensors", label=name))


def remarks(plan: MergePlan) -> list[str]:
    return [note for note in plan.notes if "was made for" in note]


def test_an_adapter_that_names_another_model_of_the_hub_is_remarked_on(tmp_path: Path) -> None:
    folder = write_base(tmp_path, LAYERS)
    hub = Located(path=folder, label="org/base", name=f"org/base@{'0' * 40}")
    assert remarks(plan_merge(hub, [named("one", "org/other")])) == [
        "one was made for org/other, and the base is org/base: make sure that these are the same weights"
    ]
    for same in ("org/base", "Org/Base", "/a/folder", "models/of/mine", "name", None):
        assert not remarks(plan_merge(hub, [named("one", same)]))
    assert not remarks(plan_merge(folder, [named("one", "org/other")])), "a folder's name tells nothing"


def test_adapters_that_name_different_models_are_remarked_on(tmp_path: Path) -> None:
    folder = write_base(tmp_path, LAYERS)
    adapters = [named("none", None), named("one", "org/base"), named("same", "org/base"), named("two", "org/other")]
    assert remarks(plan_merge(folder, adapters)) == [
        "two was made for org/other, and one for org/base: make sure that these are the same weights"
    ]
    assert not remarks(plan_merge(folder, adapters[:3]))


def test_a_plan_is_short_where_it_is_not_printed(tmp_path: Path) -> None:
    plan = plan_merge(write_base(tmp_path, LAYERS), [adapter(Q0)])
    assert repr(plan) == f"<MergePlan: 1 adapter into {tmp_path}, 1 of {len(LAYERS)} tensors change>"


def test_a_pipeline_of_several_models_is_refused_with_their_names(tmp_path: Path) -> None:
    for name in ("unet", "text_encoder"):
        write_base(tmp_path / name, LAYERS)
    with pytest.raises(OptionError, match=r"several models \(unet, text_encoder\), .* such as .*unet"):
        plan_merge(tmp_path, [adapter(Q0)])


def test_an_adapter_in_the_place_of_the_base_is_called_that(tmp_path: Path) -> None:
    lora = write_base(tmp_path, {"base_model.model.q_proj.lora_A.weight": tensor(2, 4)})
    with pytest.raises(UnsupportedFeatureError, match=r"lora_A\.weight belongs to an adapter, and a whole model is ex"):
        plan_merge(lora, [adapter(Q0)])


def test_a_base_may_hold_an_adapter_of_its_own(tmp_path: Path) -> None:
    """As Phi-4-multimodal does, of which the weights beside can be merged into."""
    own = {f"model.layers.0.q_proj.lora_{factor}.speech.weight": tensor(2, 2) for factor in "AB"}
    base = write_base(tmp_path, LAYERS | own)
    plan = plan_merge(base, [adapter(Q0)])
    assert plan.changed == ("model.layers.0.q_proj.weight",)
    assert any(note.startswith("the base holds an adapter of its own, which stays as it is") for note in plan.notes)
    with pytest.raises(
        UnsupportedFeatureError, match=r"lora_A\.speech\.weight belongs to an adapter that is a part of"
    ):
        adaptertools.estimate(base, ranks=2)


@pytest.mark.parametrize("allow_unmatched", [False, True])
def test_a_base_with_an_adapter_around_its_layers_is_told_to_take_it_off(allow_unmatched: bool, tmp_path: Path) -> None:
    wrapped = {name.replace("q_proj.weight", "q_proj.base_layer.weight"): weight for name, weight in LAYERS.items()}
    base = write_base(tmp_path, wrapped)
    with pytest.raises(MatchError, match=r"has it as model\.layers\.0\.q_proj\.base_layer\.weight.* Take that off"):
        plan_merge(base, [adapter(Q0)], allow_unmatched=allow_unmatched)


def test_of_several_adapters_notes_say_whose_they_are(tmp_path: Path) -> None:
    base = write_base(tmp_path, LAYERS)
    one, other = replace(named("one", None), notes=("odd",)), replace(named("other", None), modules=(Q1,))
    assert "odd" in plan_merge(base, [one]).notes
    assert "one: odd" in plan_merge(base, [one, other]).notes


def test_a_weight_that_one_adapter_replaces_and_another_trained_rows_of_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path, LAYERS)
    name = "model.embed_tokens.weight"
    all_of_it = Adapter(modules=(), full_weights={name: FullWeight(weight=tensor(7, 4, seed=8))})
    some = adapter(row_weights=rows(5, 2))
    for pair in ([all_of_it, some], [some, all_of_it]):
        with pytest.raises(UnsupportedFeatureError, match=r"replaces all of .* brings other rows of it\. full"):
            plan_merge(base, pair)
    assert torch.equal(execute(plan_merge(base, [all_of_it, some], full_weights=1))[name], tensor(7, 4, seed=8))
    same = RowWeights(indices=(3, 1), rows=tensor(7, 4, seed=8)[[3, 1]])
    plan_merge(base, [all_of_it, adapter(row_weights={name: same})])


def test_that_rows_are_taken_whatever_the_weight_is_said(tmp_path: Path) -> None:
    plan = plan_merge(write_base(tmp_path, LAYERS), [adapter(row_weights=rows(5, 2))], [0.5])
    assert any("whatever the weight: model.embed_tokens.weight (token rows)" in note for note in plan.notes)


def test_an_embedding_that_may_be_a_head_is_remarked_upon(tmp_path: Path) -> None:
    change = adapter(module("model.embed_tokens", out=7, n_in=4, kind=Kind.LINEAR))
    bare = plan_merge(write_base(tmp_path / "bare", LAYERS), [change])
    assert any("if it is, the head changes too" in note for note in bare.notes)
    encoder = plan_merge(write_base(tmp_path / "encoder", LAYERS, {"model_type": "bert"}), [change])
    assert not any("the head changes too" in note for note in encoder.notes)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((None, [adapter(Q0)]), "base is NoneType, expected the path"),
        (("here", None), "adapters: found NoneType, expected a list"),
        (("here", [adapter(Q0)], 0.5), "weights is 0.5, expected a list"),
        (("here", [adapter(Q0)], {0: 1.0}), r"weights is \{0: 1.0\}, expected a list"),
        (("here", [adapter(Q0)], {1.0}), r"weights is \{1.0\}, expected a list"),
    ],
)
def test_what_is_of_another_type_is_an_error_of_ours(given: Any, said: str, tmp_path: Path) -> None:
    base = write_base(tmp_path, LAYERS)
    with pytest.raises(OptionError, match=said):
        plan_merge(base if given[0] == "here" else given[0], *given[1:])


def test_adapters_may_come_one_by_one_and_weights_be_numbers_of_any_kind(tmp_path: Path) -> None:
    base = write_base(tmp_path, LAYERS)
    plan = plan_merge(base, (each for each in [adapter(Q0)]), torch.tensor([0.5]), dtype="f16")
    assert plan.weights == (0.5,)
    assert plan.edits["model.layers.0.q_proj.weight"].dtype == torch.float16
