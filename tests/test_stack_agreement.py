"""What adapters must agree on to be stacked, what is said where they do not, and what the result remembers."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from proof import needed
from stack_cases import NAMES, adapter, assert_is_weighted_sum, kinds, module
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import adaptertools
from adaptertools import formats
from adaptertools.adapter import (
    Adapter,
    Base,
    FullWeight,
    HistoryEntry,
    Kind,
    Origin,
    RowWeights,
    ScaleRule,
    WeightRole,
)
from adaptertools.errors import NonFiniteError, OptionError, ShapeError, UnsupportedFeatureError


def named(one: Adapter, name: str) -> Adapter:
    return replace(one, origin=Origin(format="peft", container="safetensors", label=f"somewhere/{name}"))


def head(value: float, size: int = 2, role: WeightRole = WeightRole.MODULE) -> FullWeight:
    return FullWeight(weight=torch.full((size, 2), value), role=role)


# Whole weights and token rows.


def test_whole_weights_that_are_equal_are_kept_and_others_too() -> None:
    first = adapter(module(), full_weights={"head.weight": head(1.0), "norm.weight": head(3.0)})
    other = adapter(module(seed=1), full_weights={"head.weight": head(1.0), "score.weight": head(2.0)})
    done = adaptertools.stack([named(first, "a"), named(other, "b")])
    assert set(done.adapter.full_weights) == {"head.weight", "norm.weight", "score.weight"}
    assert "only in source 1 (a), and kept: norm.weight" in done.notes
    assert "only in source 2 (b), and kept: score.weight" in done.notes
    assert done.left_out == ()


def test_a_head_of_nan_equals_itself() -> None:
    weights = {"head.weight": head(math.nan)}
    done = adaptertools.stack([adapter(module(), full_weights=weights), adapter(module("y"), full_weights=weights)])
    assert set(done.adapter.full_weights) == {"head.weight"}


@pytest.mark.parametrize("other", [head(2.0), head(1.0, size=3), FullWeight(weight=torch.ones(2, 2).half())])
def test_whole_weights_that_differ_are_refused_by_name(other: FullWeight) -> None:
    weights = {"head.weight": other, "head.bias": head(5.0, role=WeightRole.BIAS), "same": head(1.0)}
    first = adapter(
        module(),
        full_weights={"head.weight": head(1.0), "head.bias": head(4.0, role=WeightRole.BIAS), "same": head(1.0)},
    )
    third = adapter(module("z"))
    sources = [named(first, "a"), named(third, "c"), named(adapter(module(seed=1), full_weights=weights), "b")]
    with pytest.raises(UnsupportedFeatureError) as caught:
        adaptertools.stack(sources)
    message = str(caught.value)
    assert message.startswith("whole weights differ between source 1 (a), source 3 (b): head.weight, head.bias.")
    assert "--full-weights SRC_NUMBER" in message
    for number, kept, left in ((1, 1.0, "source 3 (b)"), (3, float(other.weight[0, 0]), "source 1 (a)")):
        done = adaptertools.stack(sources, full_weights=number)
        assert float(done.adapter.full_weights["head.weight"].weight[0, 0]) == kept
        assert done.left_out == (f"head.weight of {left}", f"head.bias of {left}")
        assert done.adapter.history[-1].details["left_out"] == list(done.left_out)
        assert done.adapter.history[-1].details["full_weights"] == number
    none = adaptertools.stack(sources, full_weights=2)
    assert not none.adapter.full_weights
    assert len(none.left_out) == 6


def test_token_rows_are_kept_where_they_put_the_same_into_the_same_places() -> None:
    rows = torch.randn(2, 4)
    one = adapter(module(), row_weights={"embed.weight": RowWeights(indices=(3, 1), rows=rows)})
    same = adapter(module(seed=1), row_weights={"embed.weight": RowWeights(indices=(1, 3), rows=rows.flip(0))})
    done = adaptertools.stack([one, same])
    assert done.adapter.row_weights["embed.weight"].indices == (3, 1)
    for other in (
        RowWeights(indices=(3, 2), rows=rows),
        RowWeights(indices=(1, 3), rows=rows),
    ):
        differing = adapter(module(seed=1), row_weights={"embed.weight": other})
        with pytest.raises(UnsupportedFeatureError, match=r"embed\.weight"):
            adaptertools.stack([one, differing])
        kept = adaptertools.stack([one, differing], full_weights=2)
        assert kept.adapter.row_weights["embed.weight"] is other
    whole = adapter(module(seed=1), full_weights={"embed.weight": head(1.0)})
    with pytest.raises(UnsupportedFeatureError, match=r"embed\.weight"):
        adaptertools.stack([one, whole])


@pytest.mark.parametrize("number", [0, 3, -1, True, 1.0, "1"])
def test_the_number_of_a_source_is_checked(number: Any) -> None:
    sources = [adapter(module(), full_weights={"head": head(1.0)}), adapter(module(seed=1))]
    with pytest.raises(OptionError, match="from 1 to 2"):
        adaptertools.stack(sources, full_weights=number)


def test_choosing_among_whole_weights_that_nobody_has_is_an_error() -> None:
    with pytest.raises(OptionError, match="no source holds a whole weight"):
        adaptertools.stack([adapter(module()), adapter(module(seed=1))], full_weights=1)


# Base models, variants, tokens.


def with_base(name: str | None, seed: int = 0, revision: str | None = None) -> Adapter:
    return adapter(module(seed=seed), bases={"": Base(id=name, revision=revision)})


def test_base_models_that_differ_are_refused_unless_forced() -> None:
    sources = [with_base("org/a"), with_base("org/b", 1)]
    with pytest.raises(UnsupportedFeatureError, match=r"source 1 .* org/a, source 2 .* org/b.*--force"):
        adaptertools.stack(sources)
    done = adaptertools.stack(sources, force=True)
    assert done.adapter.bases[""].id == "org/a"
    assert any("org/b" in note and "forced" in note for note in done.notes)
    assert done.adapter.history[-1].details["force"] is True


def test_revisions_that_differ_are_refused_and_unknown_ones_are_not() -> None:
    with pytest.raises(UnsupportedFeatureError, match="org/a@one"):
        adaptertools.stack([with_base("org/a", 0, "one"), with_base("org/a", 1, "two")])
    done = adaptertools.stack([with_base("org/a"), with_base("org/a", 1, "two")])
    assert done.adapter.bases[""] == Base(id="org/a", revision="two")


def test_a_slash_at_the_end_of_a_base_model_means_nothing() -> None:
    done = adaptertools.stack([with_base("org/a"), with_base("org/a/", 1, "one"), with_base("org/a//", 2)])
    assert done.adapter.bases[""] == Base(id="org/a", revision="one")
    assert not any("base" in note for note in done.notes)
    apart = [with_base("org/a", 0, "one"), with_base("org/a/", 1, "two")]
    with pytest.raises(UnsupportedFeatureError, match=r"org/a@one, .* org/a/@two.*--force"):
        adaptertools.stack(apart)
    assert adaptertools.stack(apart, force=True).adapter.bases[""].revision == "one"
    with pytest.raises(UnsupportedFeatureError, match="org/a"):
        adaptertools.stack([with_base("/"), with_base("org/a", 1)])


def test_two_later_sources_that_contradict_each_other_are_refused() -> None:
    sources = [with_base("org/a"), with_base("org/a", 1, "one"), with_base("org/a", 2, "two")]
    with pytest.raises(UnsupportedFeatureError, match=r"source 2.*source 3"):
        adaptertools.stack(sources)


def test_an_unknown_base_model_is_said_and_not_refused() -> None:
    done = adaptertools.stack([named(with_base(None), "bare"), with_base("org/a", 1)])
    assert done.adapter.bases[""].id == "org/a"
    unchecked = "that all sources are for the same one was not checked"
    assert f"no base model is named in source 1 (bare): {unchecked}" in done.notes


def test_dora_is_refused_by_source_and_module() -> None:
    dora = adapter(module("y"), module("x.v_proj", magnitude=torch.ones(8)))
    with pytest.raises(UnsupportedFeatureError, match=r"source 2 \(dora\) has a DoRA magnitude in x\.v_proj:"):
        adaptertools.stack([adapter(module()), named(dora, "dora")])


def test_a_changed_base_is_refused_by_source() -> None:
    pissa = adapter(module(), bases={"": Base(id="org/model", change="pissa")})
    with pytest.raises(UnsupportedFeatureError, match=r"source 1 \(p\) was trained with pissa initialisation"):
        adaptertools.stack([named(pissa, "p"), adapter(module(seed=1))])


def test_adapters_that_act_after_tokens_must_have_the_same() -> None:
    alora = adapter(module(), invocation_tokens=(1, 2))
    other = adapter(module(seed=1), invocation_tokens=(1, 3))
    assert adaptertools.stack([alora, replace(other, invocation_tokens=(1, 2))]).adapter.invocation_tokens == (1, 2)
    for source in (other, adapter(module(seed=1))):
        with pytest.raises(UnsupportedFeatureError, match=r"source 1 .*\[1, 2\].*source 2"):
            adaptertools.stack([alora, source])


# Shapes and options.


def test_delta_weights_of_different_shapes_are_refused_with_both_sources() -> None:
    for other in (module(n_in=11), module(n_out=9)):
        with pytest.raises(ShapeError, match=r"x\.q_proj.*source 1 \(a\).*source 3 \(c\)"):
            adaptertools.stack([named(adapter(module()), "a"), adapter(module("y")), named(adapter(other), "c")])


def test_what_sources_know_of_a_weight_must_not_contradict() -> None:
    for fields in ({"transposed": False}, {"kind": Kind.EMBEDDING}):
        with pytest.raises(ShapeError, match=r"x\.q_proj: (transposed|kind) is .* source 1 \(a\) .* source 2 \(b\)"):
            adaptertools.stack(
                [named(adapter(module(transposed=True)), "a"), named(adapter(module(seed=1, **fields)), "b")]
            )


@pytest.mark.parametrize(
    "options",
    [
        {"weights": [1.0]},
        {"weights": [1.0, 2.0, 3.0]},
        {"weights": [1.0, math.nan]},
        {"weights": [1.0, math.inf]},
        {"weights": [1.0, 10**400]},
        {"weights": [1.0, "2"]},
        {"weights": [1.0, True]},
        {"weights": [1.0, 5e-324]},
        {"weights": [0.0, 0]},
        {"method": "average"},
        {"density": 0.5},
        {"seed": 1},
        {"method": "ties", "seed": 1},
        {"method": "knots-ties", "seed": 1},
        {"method": "dare-ties", "seed": 1.5},
        {"method": "ties", "density": 0.0},
        {"method": "ties", "density": 1.5},
        {"method": "dare-linear", "density": math.nan},
        {"rank": 0},
        {"energy": 1.5},
        {"rank": 2, "energy": 0.5},
        {"max_rank": 0},
        {"device": "abacus"},
        {"dtype": "f8"},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        adaptertools.stack([adapter(module()), adapter(module(seed=1))], **options)


@pytest.mark.parametrize("given", [["a", "b"], "a", [None], [b"a"], adapter(module())])
def test_what_is_no_adapter_is_refused_with_advice(given: Any) -> None:
    with pytest.raises(OptionError, match=r"adaptertools\.read|a list of adapters"):
        adaptertools.stack(given)


@pytest.mark.parametrize("weights", [1.0, 2, "0.7,0.3", True])
def test_weights_that_are_no_list_are_refused(weights: Any) -> None:
    with pytest.raises(OptionError, match="expected a list of numbers, one for each source"):
        adaptertools.stack([adapter(module()), adapter(module(seed=1))], weights)


def test_nothing_to_stack_is_refused() -> None:
    with pytest.raises(OptionError, match="no adapter"):
        adaptertools.stack([])


def test_what_is_not_finite_is_refused_by_source_and_tensor_unless_carried_along() -> None:
    bad = module(seed=1)
    bad.lora_B[2, 1] = math.inf
    sources = [named(adapter(module()), "a"), named(adapter(bad), "b")]
    with pytest.raises(NonFiniteError, match=r"source 2 \(b\): x\.q_proj\.lora_B: 0 NaN and 1 infinite"):
        adaptertools.stack(sources, [0.7, 0.3])
    done = adaptertools.stack(sources, [0.7, 0.3], allow_nonfinite=True)
    assert torch.isinf(done.adapter.modules[0].lora_B).sum() == 1
    assert done.max_element_error < 1e-6


def test_a_sum_beyond_the_dtype_is_refused() -> None:
    large = module(lora_B=torch.full((8, 3), 6e4))
    with pytest.raises(NonFiniteError, match="too large for f16"):
        adaptertools.stack([adapter(large), adapter(module(seed=1))], [3.0, 0.7], dtype="f16")
    with pytest.raises(OptionError, match="float64"):
        adaptertools.stack([adapter(module(alpha=1e200)), adapter(module(seed=1))], [1e200, 0.7])


@pytest.mark.parametrize("method", ["ties", "dare-linear", "dare-ties", "knots-ties"])
def test_a_bias_is_no_matter_for_a_consensus(method: Any) -> None:
    biased = named(adapter(module(lora_bias=torch.ones(8))), "biased")
    with pytest.raises(UnsupportedFeatureError, match=r"source 2 \(biased\): x\.q_proj has a lora_bias"):
        adaptertools.stack([adapter(module(seed=1)), biased], method=method)


# What the result remembers.


def test_the_history_holds_that_of_every_source_and_survives_a_file(tmp_path: Path) -> None:
    past = HistoryEntry(operation="rescale", source="old", details={"alpha": 8.0, "exact": True})
    first = named(adapter(module(), history=(past,)), "a")
    done = adaptertools.stack([first, named(adapter(module(seed=1)), "b")], [0.7, -1.0])
    again = adaptertools.stack(
        [named(done.adapter, "c"), named(adapter(module(seed=2)), "d")], method="dare-ties", seed=4
    )
    (entry,) = again.adapter.history
    assert entry.operation == "stack"
    assert entry.details["method"] == "dare-ties"
    assert entry.details["seed"] == 4
    inner = entry.details["sources"][0]["history"][0]
    assert inner["operation"] == "stack"
    assert [(one["source"], one["weight"]) for one in inner["sources"]] == [("a", 0.7), ("b", -1.0)]
    assert inner["sources"][0]["history"] == [past.to_json()]
    assert 0 < inner["max_element_error"] < 1e-6
    for name in ("peft", "loralib", "flax"):
        path = adaptertools.write(again.adapter, tmp_path / name, format=name).path
        assert adaptertools.read(path).history[0].to_json() == json.loads(json.dumps(entry.to_json()))


def test_notes_are_carried_with_their_source_and_settings_are_those_of_the_first() -> None:
    first = named(adapter(module(), notes=("odd",), metadata={"peft": {"task_type": "X", "r": 1}}), "a")
    other = named(
        adapter(
            module(seed=1), metadata={"peft": {"task_type": "Y", "r": 1, "target_modules": ["x"]}, "flax": {"k": 1}}
        ),
        "b",
    )
    done = adaptertools.stack([first, other])
    assert "source 1 (a): odd" in done.notes
    assert done.adapter.metadata == {"peft": {"task_type": "X", "r": 1}, "flax": {"k": 1}}
    assert "source 2 (b) has other settings of peft (task_type); those of source 1 (a) are kept" in done.notes
    assert done.adapter.origin == first.origin


def test_each_module_is_reported_with_its_ranks() -> None:
    done = adaptertools.stack([adapter(module(rank=2), module("y")), adapter(module(rank=4, seed=1))], [0.7, 1.0])
    assert [(row.target, row.ranks, row.rank) for row in done.rows] == [("x.q_proj", (2, 4), 6), ("y", (3, 0), 3)]
    assert done.rows[0].element_error == done.max_element_error > 0
    assert done.rows[0].delta_error == done.max_delta_error > 0
    json.dumps(done.to_json(), allow_nan=False)


# Other methods.


@pytest.mark.parametrize("method", ["ties", "dare-linear", "dare-ties", "knots-ties"])
def test_a_consensus_of_every_kind_is_an_adapter_with_the_same_targets(method: Any) -> None:
    sources = [adapter(*(m for m in kinds(seed=s, ranks=r) if m.lora_bias is None)) for s, r in ((0, 1), (40, 2))]
    sources[1] = replace(sources[1], modules=sources[1].modules[:-1])
    done = adaptertools.stack(sources, [0.7, 1.0], method=method)
    assert [m.target for m in done.adapter.modules] == [m.target for m in sources[0].modules]
    assert [(m.kind, m.shape) for m in done.adapter.modules] == [(m.kind, m.shape) for m in sources[0].modules]
    assert {m.lora_A.dtype for m in done.adapter.modules} == {torch.float32}
    assert 0 < done.max_delta_error < 1e-6
    assert len({m.rank for m in done.adapter.modules if m.target.rows}) == 1
    cut = adaptertools.stack(sources, [0.7, 1.0], method=method, rank=1)
    assert {m.nominal_rank for m in cut.adapter.modules} == {1}


def test_a_consensus_that_drops_nothing_is_the_sum() -> None:
    sources = [adapter(*(m for m in kinds(seed=s, ranks=2) if m.lora_bias is None)) for s in (0, 40)]
    done = adaptertools.stack(sources, [0.7, -1.0], method="dare-linear", density=1.0)
    wanted = adaptertools.stack(sources, [0.7, -1.0])
    assert_is_weighted_sum(done.adapter, [wanted.adapter], [1.0], 1e-5)


def test_the_seed_of_dare_settles_what_it_drops() -> None:
    sources = [adapter(module(seed=s)) for s in (0, 1)]
    made = [adaptertools.stack(sources, method="dare-linear", seed=seed).adapter.modules[0] for seed in (0, None, 3)]
    assert torch.equal(made[0].lora_B, made[1].lora_B)
    assert not torch.equal(made[0].lora_B @ made[0].lora_A, made[2].lora_B @ made[2].lora_A)


# Formats and memory.


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("name", [name for name in formats.names() if formats.get(name).CONTAINERS])
def test_a_stack_is_written_in_every_format_that_holds_its_sources(name: str, kind: str, tmp_path: Path) -> None:
    settings = ((0, 1, ScaleRule.ALPHA_OVER_RANK), (40, 2, ScaleRule.ALPHA_OVER_SQRT_RANK))
    sources = [
        adapter(*(replace(m, scale_rule=rule) for m in kinds(seed=s, ranks=r) if m.target.parameter == kind))
        for s, r, rule in settings
    ]
    try:
        adaptertools.write(sources[1], tmp_path / "source", format=name, **needed(name))
    except UnsupportedFeatureError:
        assert kind != "linear" or needed(name)  # a base model has no parameter of that name
        return
    done = adaptertools.stack(sources, [0.7, -1.0])
    report = adaptertools.write(done.adapter, tmp_path / "out", format=name, **needed(name))
    error = done.max_element_error + 2 * report.max_relative_error
    assert_is_weighted_sum(adaptertools.read(report.path), sources, [0.7, -1.0], error)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"energy": 0.9}, {"method": "ties"}, {"method": "dare-ties"}])
def test_stacking_on_the_gpu_gives_what_the_cpu_gives(options: dict[str, Any]) -> None:
    sources = [adapter(*(m for m in kinds(seed=s, ranks=4) if m.lora_bias is None)) for s in (0, 40, 80)]
    gpu, cpu = (adaptertools.stack(sources, [0.7, -1.0, 0.3], device=name, **options) for name in ("cuda", "cpu"))
    assert [m.rank for m in gpu.adapter.modules] == [m.rank for m in cpu.adapter.modules]
    assert {t.device.type for t in gpu.adapter.named_tensors.values()} == {"cpu"}
    assert_is_weighted_sum(gpu.adapter, [cpu.adapter], [1.0], 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"rank": 2}, {"method": "ties"}])
def test_adapters_on_the_gpu_are_stacked_there(options: dict[str, Any]) -> None:
    sources = [adapter(*(m for m in kinds(seed=s, ranks=2) if m.lora_bias is None)) for s in (0, 40)]
    there = [one.map_modules(lambda m: replace(m, lora_A=m.lora_A.cuda(), lora_B=m.lora_B.cuda())) for one in sources]
    gpu, cpu = (adaptertools.stack(some, [0.7, -1.0], device="cuda", **options) for some in (there, sources))
    assert {t.device.type for t in gpu.adapter.named_tensors.values()} == {"cuda"}
    back = gpu.adapter.map_modules(lambda m: replace(m, lora_A=m.lora_A.cpu(), lora_B=m.lora_B.cpu()))
    assert_is_weighted_sum(back, [cpu.adapter], [1.0], 1e-4)


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor):
                self.largest = max(self.largest, made.numel())
        return result


@pytest.mark.parametrize("options", [{}, {"weights": [0.7, -1.0]}, {"rank": 3}, {"method": "ties"}])
def test_no_delta_weight_is_ever_formed(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("combine", "spectra", "truncate"):  # a mode sees its own thread alone
        monkeypatch.setattr(f"adaptertools.operations.{name}.in_parallel", map)
    n_in, n_out, chunks = 3000, 2000, 3 * (1 << 15)
    sources = [adapter(module(rank=4, seed=s, n_in=n_in, n_out=n_out)) for s in (0, 1)]
    with Sizes() as sizes:
        adaptertools.stack(sources, **options)
    assert 8 * n_in <= sizes.largest <= max(2 * 8 * n_in, chunks)
    with Sizes() as sizes:
        sources[0].modules[0].delta_weight()
    assert sizes.largest == n_in * n_out
