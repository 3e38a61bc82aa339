"""Part of an adapter, under other names."""

import pytest
import torch

from adaptertools.adapter import Adapter, FullWeight, LoraModule, RowSlice, RowWeights, Target
from adaptertools.errors import DuplicateTargetError, OptionError
from adaptertools.operations.select import left_out, select


def module(name: str, rows: RowSlice | None = None) -> LoraModule:
    return LoraModule(
        target=Target(parameter=name, rows=rows), lora_A=torch.ones(2, 4), lora_B=torch.ones(3, 2), alpha=4.0
    )


LAYERS = [f"model.layers.{layer}.self_attn.{name}" for layer in (1, 10) for name in ("q_proj", "v_proj")]
SLOTS = [RowSlice(start=start, stop=start + 3, total=9) for start in (0, 6)]


@pytest.fixture
def adapter() -> Adapter:
    return Adapter(
        modules=(*map(module, LAYERS), module("lm_head"), *(module("h.0.c_attn", rows) for rows in SLOTS)),
        full_weights={
            "classifier.dense.weight": FullWeight(weight=torch.ones(2)),
            "classifier.out_proj.weight": FullWeight(weight=torch.ones(2)),
            "lm_head.bias": FullWeight(weight=torch.ones(2)),
        },
        row_weights={"model.embed_tokens.weight": RowWeights(indices=(1,), rows=torch.ones(1, 4))},
    )


def names(adapter: Adapter) -> list[str]:
    return [str(m.target) for m in adapter.modules] + [*adapter.full_weights, *adapter.row_weights]


def test_only_keeps_what_a_pattern_fits(adapter: Adapter) -> None:
    assert names(select(adapter, only=["q_proj"])) == [LAYERS[0], LAYERS[2]]
    assert names(select(adapter, only=["model.layers.1.*"])) == LAYERS[:2]
    assert names(select(adapter, only=["*.self_attn.?_proj"])) == LAYERS
    assert names(select(adapter, only=["q_proj", "lm_head"])) == [LAYERS[0], LAYERS[2], "lm_head", "lm_head.bias"]


def test_a_pattern_fits_whole_parts_of_a_name(adapter: Adapter) -> None:
    assert names(select(adapter, only=["layers.1"])) == LAYERS[:2]
    for pattern in ("proj", "attn", "ayers.1"):
        with pytest.raises(OptionError):
            select(adapter, only=[pattern])


def test_a_pattern_that_names_a_module_fits_all_that_lies_in_it(adapter: Adapter) -> None:
    assert names(select(adapter, only=["classifier"])) == ["classifier.dense.weight", "classifier.out_proj.weight"]
    assert names(select(adapter, only=["embed_tokens"])) == ["model.embed_tokens.weight"]
    assert len(select(adapter, only=["self_attn"]).modules) == 4


def test_exclude_leaves_out_what_a_pattern_fits(adapter: Adapter) -> None:
    kept = names(select(adapter, exclude=["lm_head", "classifier"]))
    assert kept == [*LAYERS, *(f"h.0.c_attn[{s.start}:{s.stop}]" for s in SLOTS), "model.embed_tokens.weight"]


def test_exclude_counts_after_only(adapter: Adapter) -> None:
    assert names(select(adapter, only=["self_attn"], exclude=["v_proj"])) == [LAYERS[0], LAYERS[2]]


def test_the_slots_of_a_fused_projection_stay_together(adapter: Adapter) -> None:
    assert [m.target.rows for m in select(adapter, only=["c_attn"]).modules] == SLOTS


def test_left_out_and_kept_are_all_there_was(adapter: Adapter) -> None:
    choice = {"only": ["self_attn", "classifier"], "exclude": ["v_proj"]}
    kept, left = names(select(adapter, **choice)), left_out(adapter, **choice)
    assert sorted([*kept, *left]) == sorted(names(adapter))
    assert "lm_head.bias" in left
    assert left_out(adapter) == ()


@pytest.mark.parametrize("option", ["only", "exclude"])
def test_a_pattern_that_fits_nothing_names_what_is_near(option: str, adapter: Adapter) -> None:
    with pytest.raises(OptionError, match=r"'q_prj' fits no target.*q_proj"):
        select(adapter, **{option: ["lm_head", "q_prj"]})


def test_a_selection_of_nothing_is_an_error(adapter: Adapter) -> None:
    with pytest.raises(OptionError, match="nothing"):
        select(adapter, exclude=["*"])
    with pytest.raises(OptionError, match="nothing"):
        select(adapter, only=["lm_head"], exclude=["lm_head"])


def test_rename_replaces_what_the_expression_finds_in_every_name(adapter: Adapter) -> None:
    renamed = select(adapter, rename=[r"^model\.=model.language_model."])
    assert renamed.modules[0].target.parameter == "model.language_model.layers.1.self_attn.q_proj"
    assert list(renamed.row_weights) == ["model.language_model.embed_tokens.weight"]
    assert "classifier.dense.weight" in renamed.full_weights
    assert renamed.modules[0].lora_A is adapter.modules[0].lora_A


def test_renames_follow_each_other_and_may_use_groups_and_lookahead(adapter: Adapter) -> None:
    renamed = select(adapter, rename=[r"layers\.(\d+)=blocks.\1", r"self_attn\.(?=q_proj)=attention.", "blocks=layers"])
    assert renamed.modules[0].target.parameter == "model.layers.1.attention.q_proj"
    assert renamed.modules[1].target.parameter == "model.layers.1.self_attn.v_proj"


def test_rename_sees_only_what_was_chosen(adapter: Adapter) -> None:
    with pytest.raises(OptionError, match=r"classifier.*finds nothing"):
        select(adapter, only=["self_attn"], rename=["classifier=head"])


@pytest.mark.parametrize(
    "text", ["model", "=x", "[=x", r"model=\7", r"model=\g<nope>", "(?P<a=b", "nowhere=x", r"^.*$="]
)
def test_a_faulty_rename_is_an_error_of_ours(text: str, adapter: Adapter) -> None:
    with pytest.raises(OptionError, match="--rename"):
        select(adapter, rename=[text])


def test_two_targets_of_one_name_are_refused(adapter: Adapter) -> None:
    with pytest.raises(DuplicateTargetError, match=r"^--rename \[qv\]_proj=qv_proj: .*qv_proj"):
        select(adapter, rename=["[qv]_proj=qv_proj"])
    with pytest.raises(DuplicateTargetError, match=r"classifier\.weight"):
        select(adapter, rename=[r"classifier\.(dense|out_proj)=classifier"])


def test_the_history_says_what_was_chosen(adapter: Adapter) -> None:
    chosen = select(adapter, only=["self_attn"], rename=["model=m"])
    assert chosen.history[-1].to_json() == {"operation": "select", "only": ["self_attn"], "rename": ["model=m"]}
    assert adapter.history == ()


def test_the_modules_of_one_of_several_models_are_chosen_by_its_name() -> None:
    modules = tuple(
        LoraModule(
            target=Target(component=component, parameter=name),
            lora_A=torch.ones(1, 2),
            lora_B=torch.ones(2, 1),
            alpha=1.0,
        )
        for component, name in (("unet", "a.to_q"), ("unet", "a.to_k"), ("text_encoder", "a.to_q"))
    )
    adapter = Adapter(modules=modules)
    for pattern, left in (("unet:*", 2), ("unet:", 2), ("unet:to_q", 1), ("to_q", 2), ("text_encoder:a.*", 1)):
        assert len(select(adapter, only=[pattern]).modules) == left
    with pytest.raises(OptionError, match="fits no target"):
        select(adapter, only=["text_encoder_2:*"])
