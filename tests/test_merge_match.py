"""Which tensor of a base an adapter means, by name; orientation by shape and model type; experts in every layout."""

from pathlib import Path

import pytest
import torch
from merge_dense import execute, module, tensor, write_base
from torch import Tensor

from adaptertools.adapter import Adapter, Base
from adaptertools.errors import MatchError, ShapeError, UnsupportedFeatureError
from adaptertools.merging.match import Names, expert_of
from adaptertools.merging.plan import MergePlan, plan_merge
from adaptertools.module import Kind, LoraModule, RowSlice, Target

Q = "layers.0.self_attn.q_proj"


def names(tmp_path: Path, *stored: str, **config: str) -> Names:
    from adaptertools.containers.checkpoint import Checkpoint

    return Names(Checkpoint.open(write_base(tmp_path, {name: torch.zeros(1) for name in stored}, config or None)))


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        (f"model.{Q}.weight", f"model.{Q}"),
        (f"model.{Q}.weight", Q),
        (f"{Q}.weight", f"model.{Q}"),
        (f"model.language_model.{Q}.weight", f"model.{Q}"),
        (f"language_model.model.{Q}.weight", f"model.language_model.{Q}"),
        (f"model.decoder.{Q}.weight", f"decoder.{Q}"),
        ("h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn"),
        ("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn"),
        ("encoder.layer.0.attention.self.query.weight", "roberta.encoder.layer.0.attention.self.query"),
        ("bert.encoder.layer.0.attention.self.query.weight", "encoder.layer.0.attention.self.query"),
        ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        ("_orig_mod.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj"),
        ("model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate"),
        ("model.layers.0.mlp.experts.3.gate_proj.weight", "model.layers.0.block_sparse_moe.experts.3.w1"),
        ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj"),
        ("embed_out.weight", "lm_head"),
        ("attn.in_proj_weight", "attn.in_proj_weight"),
        ("lm_head.bias", "lm_head.bias"),
    ],
)
def test_prefixes_and_wrappers_do_not_matter(stored: str, asked: str, tmp_path: Path) -> None:
    assert names(tmp_path, stored, "something.else.weight").find(asked) == stored


@pytest.mark.parametrize(
    ("stored", "asked", "said"),
    [
        (["model.layers.0.self_attn.qkv_proj.weight"], "model.layers.0.self_attn.k_proj", "fused with others"),
        (["gpt_neox.layers.0.attention.query_key_value.weight"], "layers.0.attention.query", "fused with others"),
        (["transformer.h.0.attn.c_attn.weight"], "h.0.attn.q_proj", "fused with others"),
        (["layers.0.self_attn.in_proj_weight"], "layers.0.self_attn.q_proj", "fused with others"),
        (["model.layers.0.mlp.gate_up_proj.weight"], "model.layers.0.mlp.up_proj", "fused with others"),
        ([f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"], "layers.0.self_attn.qkv_proj", "in parts"),
    ],
)
def test_projections_that_are_fused_on_one_side_alone_are_refused_by_the_names_of_the_others(
    stored: list[str], asked: str, said: str, tmp_path: Path
) -> None:
    """Nothing is guessed: whether q, k and v are one block of rows each or interleaved, no name or shape can tell."""
    others = [
        "layers.1.self_attn.qkv_proj.weight",
        "layers.1.self_attn.q_proj.weight",
        "layers.0.self_attn.o_proj.weight",
    ]
    base = write_base(tmp_path, {name: tensor(24, 8) for name in (*stored, *others)})
    with pytest.raises(MatchError) as caught:
        plan_merge(base, [Adapter(modules=(module(asked, 8, 8),))])
    assert f"it holds it {said}: {', '.join(sorted(stored))}. Their rows" in str(caught.value)


def test_the_type_of_the_model_is_a_prefix(tmp_path: Path) -> None:
    assert names(tmp_path, "layers.0.q.weight", model_type="new-model").find("new_model.layers.0.q") is not None


def test_a_whole_name_stands_before_others_like_it(tmp_path: Path) -> None:
    found = names(tmp_path, f"model.{Q}.weight", f"{Q}.weight")
    assert found.find(f"model.{Q}") == f"model.{Q}.weight"
    assert found.find(Q) == f"{Q}.weight"


def test_encoder_and_decoder_are_not_taken_for_one_another(tmp_path: Path) -> None:
    found = names(tmp_path, f"model.encoder.{Q}.weight", f"model.decoder.{Q}.weight")
    assert found.find(f"decoder.{Q}") == f"model.decoder.{Q}.weight"
    assert found.find(f"encoder.{Q}") == f"model.encoder.{Q}.weight"


@pytest.mark.parametrize(
    "stored",
    [
        (f"text_model.{Q}.weight", f"vision_model.{Q}.weight"),
        (f"model.{Q}.weight", f"language_model.{Q}.weight"),
    ],
)
def test_several_tensors_that_fit_are_an_error_that_lists_them(stored: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(MatchError) as caught:
        names(tmp_path, *stored).find(Q)
    assert all(name in str(caught.value) for name in stored)


@pytest.mark.parametrize("stored", [f"vision_tower.{Q}.weight", f"visual.{Q}.weight", "proj.weight", "q_proj.weight"])
def test_a_part_of_the_model_that_the_name_does_not_mean_is_not_taken(stored: str, tmp_path: Path) -> None:
    assert names(tmp_path, stored).find(Q) is None


def test_what_matches_nothing_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    base = write_base(tmp_path, {"model.layers.0.q_proj.weight": tensor(6, 4)})
    adapter = Adapter(modules=(module("model.layers.9.q_proj", 6, 4), module("model.layers.0.q_proj", 6, 4)))
    with pytest.raises(MatchError, match=r"layers\.9\.q_proj.*nearest are model\.layers\.0\.q_proj\.weight.*allow"):
        plan_merge(base, [adapter])
    plan = plan_merge(base, [adapter], allow_unmatched=True)
    assert plan.left_out == ("model.layers.9.q_proj",)
    assert list(plan.edits) == ["model.layers.0.q_proj.weight"]
    assert "left out  model.layers.9.q_proj" in str(plan)


def test_a_name_that_could_not_be_turned_back_matches_nothing(tmp_path: Path) -> None:
    base = write_base(tmp_path, {"q_proj.weight": tensor(6, 4)})
    opaque = module("q_proj", 6, 4, target=Target(parameter="q_proj", opaque=True))
    with pytest.raises(MatchError):
        plan_merge(base, [Adapter(modules=(opaque,))])


def test_an_expert_is_known_by_its_name() -> None:
    assert expert_of("a.experts.12.w3.weight") == ("a.experts", 12, "up_proj")
    assert expert_of("a.experts.gate_up_proj") is None
    assert expert_of("a.shared_experts.up_proj") is None


def merged(base: Path, *modules: LoraModule) -> tuple[MergePlan, dict[str, Tensor]]:
    plan = plan_merge(base, [Adapter(modules=modules)])
    return plan, execute(plan)


def test_a_weight_that_is_stored_the_other_way_round_is_told_by_its_shape(tmp_path: Path) -> None:
    weights = {"h.0.c_attn.weight": tensor(4, 6), "h.0.lin.weight": tensor(6, 4)}
    attn, lin = module("h.0.c_attn", 6, 4), module("h.0.lin", 6, 4)
    _, found = merged(write_base(tmp_path, weights), attn, lin)
    torch.testing.assert_close(found["h.0.c_attn.weight"], weights["h.0.c_attn.weight"] + attn.delta_weight().T)
    torch.testing.assert_close(found["h.0.lin.weight"], weights["h.0.lin.weight"] + lin.delta_weight())


@pytest.mark.parametrize(
    ("model_type", "leaf", "stated", "turned"),
    [
        ("gpt2", "c_proj", None, True),
        ("gpt2", "c_proj", False, True),
        ("gpt2", "lm_head", None, False),
        ("llama", "c_proj", None, False),
        ("llama", "c_proj", True, False),
        (None, "c_proj", None, False),
        (None, "c_proj", True, True),
    ],
)
def test_a_square_weight_is_told_by_the_type_of_the_model(
    model_type: str | None, leaf: str, stated: bool | None, turned: bool, tmp_path: Path
) -> None:
    weight = tensor(5, 5)
    config = {"model_type": model_type} if model_type else None
    lora = module(f"h.0.{leaf}", 5, 5, transposed=stated)
    _, found = merged(write_base(tmp_path, {f"h.0.{leaf}.weight": weight}, config), lora)
    delta = 1.5 * lora.lora_B @ lora.lora_A
    torch.testing.assert_close(found[f"h.0.{leaf}.weight"], weight + (delta.T if turned else delta))


def test_a_module_for_another_shape_is_an_error_that_names_both(tmp_path: Path) -> None:
    base = write_base(tmp_path, {"q.weight": tensor(6, 4)})
    with pytest.raises(ShapeError, match=r"q: lora_A \(2, 5\) and lora_B \(6, 2\).*q\.weight has \(6, 4\)"):
        plan_merge(base, [Adapter(modules=(module("q", 6, 5),))])


@pytest.mark.parametrize("turned", [False, True])
def test_slots_of_a_fused_projection_are_rows_or_columns(turned: bool, tmp_path: Path) -> None:
    weight = tensor(4, 9) if turned else tensor(9, 4)
    slots = tuple(
        module("qkv", 3, 4, target=Target(parameter="qkv", rows=RowSlice(start=k, stop=k + 3, total=9)), alpha=1.0 + k)
        for k in (0, 6)
    )
    plan, found = merged(write_base(tmp_path, {"qkv.weight": weight}), *slots)
    delta = sum(slot.delta_weight() for slot in slots)
    torch.testing.assert_close(found["qkv.weight"], weight + (delta.T if turned else delta))
    assert [(update.row, update.column) for update in plan.edits["qkv.weight"].updates] == (
        [(0, 0), (0, 6)] if turned else [(0, 0), (6, 0)]
    )


E, INNER, HIDDEN = 3, 4, 6
HOME = "model.layers.0.mlp.experts"


def stack(name: str, out: int, n_in: int, **changes: object) -> LoraModule:
    return module(
        f"{HOME}.{name}",
        out,
        n_in,
        lora_A=tensor(E, 2, n_in, seed=5),
        lora_B=tensor(E, out, 2, seed=6),
        kind=Kind.PARAMETER,
        **changes,
    )


def per_expert(
    home: str = HOME, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> dict[str, Tensor]:
    weights = {}
    for e in range(E):
        weights[f"{home}.{e}.{gate}.weight"] = tensor(INNER, HIDDEN, seed=10 + e)
        weights[f"{home}.{e}.{up}.weight"] = tensor(INNER, HIDDEN, seed=20 + e)
        weights[f"{home}.{e}.{down}.weight"] = tensor(HIDDEN, INNER, seed=30 + e)
    return weights


FUSED = (stack("gate_up_proj", 2 * INNER, HIDDEN), stack("down_proj", HIDDEN, INNER))


@pytest.mark.parametrize("turned", [False, True])
def test_a_stack_goes_onto_a_stack_of_either_layout(turned: bool, tmp_path: Path) -> None:
    weights = {f"{HOME}.gate_up_proj": tensor(E, 2 * INNER, HIDDEN), f"{HOME}.down_proj": tensor(E, HIDDEN, INNER)}
    if turned:
        weights = {name: weight.mT.contiguous() for name, weight in weights.items()}
    _, found = merged(write_base(tmp_path, weights), *FUSED)
    for lora in FUSED:
        delta = lora.delta_weight()
        old = weights[lora.target.parameter]
        torch.testing.assert_close(found[lora.target.parameter], old + (delta.mT if turned else delta))


@pytest.mark.parametrize(
    ("stated", "config", "turned"),
    [
        (True, None, True),
        (False, {"model_type": "gpt_oss"}, False),
        (None, {"model_type": "gpt_oss"}, True),
        (None, {"model_type": "qwen3_moe"}, False),
    ],
)
def test_square_experts_are_told_by_the_adapter_or_the_type_of_the_model(
    stated: bool | None, config: dict[str, str] | None, turned: bool, tmp_path: Path
) -> None:
    weight = tensor(E, 6, 6)
    lora = stack("down_proj", 6, 6, transposed=stated)
    _, found = merged(write_base(tmp_path, {f"{HOME}.down_proj": weight}, config), lora)
    delta = 1.5 * lora.lora_B @ lora.lora_A
    torch.testing.assert_close(found[f"{HOME}.down_proj"], weight + (delta.mT if turned else delta))


def test_square_experts_that_nothing_tells_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path, {f"{HOME}.down_proj": tensor(E, 6, 6)})
    with pytest.raises(UnsupportedFeatureError, match="square"):
        plan_merge(base, [Adapter(modules=(stack("down_proj", 6, 6),))])


MIXTRAL = ("model.layers.0.block_sparse_moe.experts", "w1", "w3", "w2")


@pytest.mark.parametrize("layout", [(HOME, "gate_proj", "up_proj", "down_proj"), MIXTRAL])
def test_a_stack_goes_onto_experts_that_are_stored_one_by_one(layout: tuple[str, ...], tmp_path: Path) -> None:
    weights = per_expert(*layout)
    _, found = merged(write_base(tmp_path, weights, shards=2), *FUSED)
    gate_up, down = (lora.delta_weight() for lora in FUSED)
    home, *parts = layout
    for e in range(E):
        deltas = (gate_up[e, :INNER], gate_up[e, INNER:], down[e])
        for part, delta in zip(parts, deltas, strict=True):
            name = f"{home}.{e}.{part}.weight"
            torch.testing.assert_close(found[name], weights[name] + delta)
    assert not any(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("parts", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_experts_one_by_one_go_onto_a_stack(parts: tuple[str, ...], turned: bool, tmp_path: Path) -> None:
    weights = {f"{HOME}.gate_up_proj": tensor(E, 2 * INNER, HIDDEN), f"{HOME}.down_proj": tensor(E, HIDDEN, INNER)}
    if turned:
        weights = {name: weight.mT.contiguous() for name, weight in weights.items()}
    sizes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    modules = {
        (e, k): module(f"{HOME}.{e}.{part}", *size, alpha=1.0 + e + k)
        for e in range(E)
        for k, (part, size) in enumerate(zip(parts, sizes, strict=True))
    }
    _, found = merged(write_base(tmp_path, weights), *modules.values())
    gate_up = torch.stack([torch.cat([modules[e, k].delta_weight() for k in (0, 1)]) for e in range(E)])
    down = torch.stack([modules[e, 2].delta_weight() for e in range(E)])
    for name, delta in ((f"{HOME}.gate_up_proj", gate_up), (f"{HOME}.down_proj", down)):
        torch.testing.assert_close(found[name], weights[name] + (delta.mT if turned else delta))


@pytest.mark.parametrize("turned", [False, True])
def test_dora_of_one_expert_is_renormalised_within_the_stack(turned: bool, tmp_path: Path) -> None:
    whole = tensor(E, 2 * INNER, HIDDEN)
    lora = module(f"{HOME}.1.up_proj", INNER, HIDDEN, magnitude=tensor(INNER, seed=9).abs())
    stored = whole.mT.contiguous() if turned else whole
    _, found = merged(write_base(tmp_path, {f"{HOME}.gate_up_proj": stored}), lora)
    wanted = whole.clone()
    wanted[1, INNER:] += lora.delta_weight(base_weight=whole[1, INNER:])
    torch.testing.assert_close(found[f"{HOME}.gate_up_proj"], wanted.mT if turned else wanted)


def test_one_half_of_interleaved_experts_is_refused(tmp_path: Path) -> None:
    weights = {f"{HOME}.gate_up_proj": tensor(E, HIDDEN, 2 * INNER)}
    base = write_base(tmp_path, weights, {"model_type": "gpt_oss"})
    with pytest.raises(UnsupportedFeatureError, match="interleaves"):
        plan_merge(base, [Adapter(modules=(module(f"{HOME}.0.gate_proj", INNER, HIDDEN),))])


@pytest.mark.parametrize("count", [E - 1, E + 1])
def test_another_number_of_experts_is_an_error(count: int, tmp_path: Path) -> None:
    base = write_base(tmp_path, per_expert())
    lora = module(
        f"{HOME}.down_proj",
        HIDDEN,
        INNER,
        lora_A=tensor(count, 2, INNER),
        lora_B=tensor(count, HIDDEN, 2),
        kind=Kind.PARAMETER,
    )
    with pytest.raises(MatchError, match=f"a stack of {count} experts"):
        plan_merge(base, [Adapter(modules=(lora,))])


def test_an_expert_that_the_base_does_not_have_is_an_error(tmp_path: Path) -> None:
    fused = write_base(tmp_path / "fused", {f"{HOME}.down_proj": tensor(E, HIDDEN, INNER)})
    with pytest.raises(ShapeError):
        plan_merge(fused, [Adapter(modules=(module(f"{HOME}.{E}.down_proj", HIDDEN, INNER),))])


REFUSED = {
    "aLoRA": Adapter(modules=(module("q", 6, 4),), invocation_tokens=(1, 2)),
    "PiSSA|pissa": Adapter(modules=(module("q", 6, 4),), bases={"": Base(change="pissa")}),
    "layer_replication": Adapter(modules=(module("q", 6, 4),), bases={"": Base(layer_replication=((0, 2), (1, 3)))}),
    "several models": Adapter(
        modules=tuple(module("q", 6, 4, target=Target(parameter="q", component=part)) for part in ("unet", "text"))
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_merge_can_hold_is_refused_with_the_reason(reason: str, tmp_path: Path) -> None:
    base = write_base(tmp_path, {"q.weight": tensor(6, 4)})
    with pytest.raises(UnsupportedFeatureError, match=reason):
        plan_merge(base, [REFUSED[reason]])


U8 = torch.zeros(4, 6, dtype=torch.uint8)
QUANTISED = {
    "bitsandbytes": ({"q.weight": U8}, {"quant_method": "bitsandbytes"}),
    "GPTQ": ({"q.qweight": U8.int()}, {"quant_method": "gptq"}),
    "AWQ": ({"q.qweight": U8.int()}, {"quant_method": "awq"}),
    "FP8 with scales": ({"q.weight": tensor(6, 4)}, {"quant_method": "fp8"}),
    "MXFP4": ({"q.weight": tensor(6, 4)}, {"quant_method": "mxfp4"}),
    "compressed-tensors": ({"q.weight": tensor(6, 4)}, {"quant_method": "compressed-tensors"}),
    "GPTQ or AWQ": ({"q.qweight": U8.int(), "q.scales": tensor(1)}, None),
    "4 bits": ({"q.weight": U8, "q.weight.absmax": tensor(1)}, None),
    "8 bits": ({"q.weight": U8.to(torch.int8), "q.SCB": tensor(4)}, None),
    "FP8 with": ({"q.weight": tensor(6, 4).to(torch.float8_e4m3fn), "q.weight_scale_inv": tensor(1)}, None),
    "FP8": ({"q.weight": tensor(6, 4).to(torch.float8_e4m3fn)}, None),
    "(FP8)": ({"q.weight": tensor(6, 4), "q.scale": tensor(6).to(torch.float8_e8m0fnu)}, None),
    "MXFP4)": ({"experts.down_proj_blocks": U8, "experts.down_proj_scales": U8}, None),
    "uint8": ({"q.weight": U8}, None),
}


@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_base_is_refused_by_name(method: str, tmp_path: Path) -> None:
    weights, stated = QUANTISED[method]
    base = write_base(tmp_path, weights, {"quantization_config": stated} if stated else None)
    with pytest.raises(UnsupportedFeatureError) as caught:
        plan_merge(base, [Adapter(modules=(module("q", 6, 4),))])
    assert method in str(caught.value)


def test_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path, {"conv.weight": tensor(8, 2, 3, 3)})
    conv = module("conv", 8, 36, kind=Kind.CONV, shape=(8, 4, 3, 3))
    with pytest.raises(UnsupportedFeatureError, match="grouped"):
        plan_merge(base, [Adapter(modules=(conv,))])
