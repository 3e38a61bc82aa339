"""What there is to say about an adapter."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from adaptertools.adapter import (
    Adapter,
    Base,
    FullWeight,
    HistoryEntry,
    Kind,
    LoraModule,
    Origin,
    RowSlice,
    RowWeights,
    ScaleRule,
    Target,
)
from adaptertools.operations.summary import summarize


def module(name: str = "x.q_proj", rank: int = 4, alpha: float = 8.0, **fields: Any) -> LoraModule:
    generator = torch.Generator().manual_seed(sum(name.encode()) + rank)
    factors: dict[str, Any] = {
        "lora_A": torch.randn(rank, 6, generator=generator),
        "lora_B": torch.randn(5, rank, generator=generator),
    }
    return LoraModule(target=Target(parameter=name), alpha=alpha, **{**factors, **fields})


def llama_3_1_8b(rank: int) -> Adapter:
    """LoRA on q, k, v, o of Llama-3.1-8B, by shape alone."""

    def projection(layer: int, name: str, n_out: int) -> LoraModule:
        return LoraModule(
            target=Target(parameter=f"model.layers.{layer}.self_attn.{name}_proj"),
            lora_A=torch.empty(rank, 4096, device="meta"),
            lora_B=torch.empty(n_out, rank, device="meta"),
            alpha=2.0 * rank,
        )

    sizes = {"q": 4096, "k": 1024, "v": 1024, "o": 4096}
    return Adapter(modules=tuple(projection(layer, *size) for layer in range(32) for size in sizes.items()))


def test_llama_3_1_8b_at_rank_16_has_the_parameters_that_the_guide_counts() -> None:
    summary = summarize(llama_3_1_8b(16))
    assert summary.parameters == summary.factor_parameters == 13_631_488
    assert summary.full_rank_parameters == 32 * 4096 * (4096 + 1024 + 1024 + 4096)
    assert summary.nbytes == 4 * 13_631_488
    assert summary.targets == {"k_proj": 32, "o_proj": 32, "q_proj": 32, "v_proj": 32}
    assert summary.scalings == {2.0: 128}
    assert summary.oddities == ()


def test_one_projection_at_rank_16_is_0_78_percent_of_its_weight() -> None:
    q = Adapter(modules=llama_3_1_8b(16).modules[:1])
    assert summarize(q).factor_parameters == 131_072
    assert summarize(q).full_rank_parameters == 16_777_216


def test_modules_are_counted_by_rank_alpha_scaling_rule_and_dtype() -> None:
    half = module("x.c", rank=2, alpha=4.0)
    half = replace(half, lora_A=half.lora_A.half(), lora_B=half.lora_B.half())
    rslora = module("x.b", alpha=2.0, scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK)
    summary = summarize(Adapter(modules=(module("x.a"), rslora, half)))
    assert summary.modules == 3
    assert summary.ranks == {2: 1, 4: 2}
    assert summary.alphas == {2.0: 1, 4.0: 1, 8.0: 1}
    assert summary.scalings == {1.0: 1, 2.0: 2}
    assert summary.scale_rules == {"alpha/r": 2, "alpha/sqrt(r)": 1}
    assert summary.dtypes == {"f16": 2, "f32": 4}
    assert summary.nbytes == 2 * 4 * (4 * 6 + 5 * 4) + 2 * (2 * 6 + 5 * 2)


def test_origin_base_weights_rows_and_history_are_told() -> None:
    adapter = Adapter(
        modules=(module(),),
        full_weights={"head.weight": FullWeight(weight=torch.ones(3, 2))},
        row_weights={"embed.weight": RowWeights(indices=(1, 5), rows=torch.ones(2, 4))},
        bases={"": Base(id="org/model", revision="v1", change="pissa")},
        history=(HistoryEntry(operation="rescale", details={"alpha": 32}),),
        notes=("a head is listed but absent",),
        origin=Origin(format="peft", container="safetensors", label="folder"),
    )
    summary = summarize(adapter)
    assert (summary.format, summary.container, summary.source) == ("peft", "safetensors", "folder")
    assert summary.bases == {"": "org/model@v1 (changed by pissa)"}
    assert summary.full_weights == {"head.weight": (3, 2)}
    assert summary.token_rows == {"embed.weight": 2}
    assert summary.history == ({"operation": "rescale", "alpha": 32},)
    assert summary.oddities == ("a head is listed but absent",)
    assert summary.parameters == summary.factor_parameters + 6 + 8
    assert summary.features == ("changed-base", "full-weights", "token-rows")


def test_a_factor_that_two_modules_share_is_counted_once() -> None:
    one = module("x.k")
    other = replace(module("x.v"), lora_A=one.lora_A)
    summary = summarize(Adapter(modules=(one, other)))
    assert summary.factor_parameters == 4 * 6 + 2 * 5 * 4


def test_slices_experts_and_convolutions_count_what_they_change() -> None:
    slots = tuple(
        LoraModule(
            target=Target(parameter="qkv", rows=RowSlice(start=start, stop=start + 5, total=15)),
            lora_A=torch.ones(2, 6),
            lora_B=torch.ones(5, 2),
            alpha=4.0,
        )
        for start in (0, 10)
    )
    assert summarize(Adapter(modules=slots)).full_rank_parameters == 2 * 5 * 6
    stack = module(lora_A=torch.ones(3, 4, 6), lora_B=torch.ones(3, 5, 4), kind=Kind.PARAMETER)
    assert summarize(Adapter(modules=(stack,))).full_rank_parameters == 3 * 5 * 6
    conv = module(lora_A=torch.ones(6, 9), lora_B=torch.ones(12, 6), kind=Kind.CONV, shape=(4, 3, 3, 3))
    summary = summarize(Adapter(modules=(conv,)))
    assert summary.full_rank_parameters == 4 * 3 * 3 * 3
    assert summary.ranks == {2: 1}


@pytest.mark.parametrize(
    ("alpha", "word"),
    [
        (1.9, "below 0.5"),
        (2.0, None),
        (16.0, None),
        (16.1, "above 4"),
        (32.0, "2e-4 / scaling = 2.5e-05"),
        (-32.0, "above 4"),
        (0.0, "change nothing"),
    ],
)
def test_a_word_on_unusual_scaling(alpha: float, word: str | None) -> None:
    oddities = summarize(Adapter(modules=(module(alpha=alpha),))).oddities
    assert (word is None) == (not oddities)
    assert all(word in oddity for oddity in oddities if word)


def test_values_are_read_only_when_asked_for() -> None:
    broken = Adapter(modules=(module(lora_B=torch.full((5, 4), math.nan)),))
    assert summarize(broken).oddities == ()
    assert summarize(broken).rows == ()
    assert any("NaN or infinity in x.q_proj.lora_B" in oddity for oddity in summarize(broken, values=True).oddities)


def test_rows_have_the_norm_of_the_delta_weight() -> None:
    adapter = Adapter(modules=(module("a", alpha=-3.0), module("b", rank=2)))
    rows = summarize(adapter, values=True).rows
    assert [row.target for row in rows] == ["a", "b"]
    for row, m in zip(rows, adapter.modules, strict=True):
        assert row.delta_norm == pytest.approx(float(m.delta_weight(dtype=torch.float64).norm()), rel=1e-12)
        assert (row.rank, row.alpha, row.scaling, row.shape) == (m.rank, m.alpha, m.scaling, (5, 6))


def test_untrained_and_repeated_modules_are_found() -> None:
    zero_b = module("a", lora_B=torch.zeros(5, 4))
    zero_a = module("b", lora_A=torch.zeros(4, 6))
    twin = module("c")
    adapter = Adapter(modules=(zero_b, zero_a, twin, replace(twin, target=Target(parameter="d"))))
    oddities = summarize(adapter, values=True).oddities
    assert any("all zero" in oddity and "2 modules: a, b" in oddity for oddity in oddities)
    assert any("same factors, bit by bit, in c, d" in oddity for oddity in oddities)


def test_the_json_is_json_whatever_the_values() -> None:
    broken = module("b", lora_B=torch.full((5, 4), math.nan))
    document = summarize(Adapter(modules=(module("a"), broken)), values=True).to_json()
    text = json.dumps(document, allow_nan=False)
    again = json.loads(text)
    assert again["scalings"] == {"2": 2}
    assert again["rows"][1]["delta_norm"] is None
    assert again["rows"][0]["shape"] == [5, 6]
    assert again["targets"] == {"a": 1, "b": 1}
