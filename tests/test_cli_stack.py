"""`adaptertools stack`: what it writes, says and refuses."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stack_cases import adapter, assert_is_weighted_sum, dense, module

import adaptertools
from adaptertools.adapter import Adapter, Base, FullWeight

Run = Callable[..., Any]


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two PEFT adapters for one base model: ranks 3 and 4, the second with a module of its own."""
    made = [
        adapter(module("model.q_proj"), module("model.v_proj", seed=3)),
        adapter(module("model.q_proj", rank=4, seed=1, alpha=4.0), module("model.k_proj", rank=4, seed=2, alpha=4.0)),
    ]
    return [
        adaptertools.write(one, tmp_path / "sources" / name, format="peft").path
        for name, one in zip(("a", "b"), made, strict=True)
    ]


def read(*paths: Path) -> list[Adapter]:
    return [adaptertools.read(path) for path in paths]


def test_the_sum_is_written_and_said_to_be_exact(pair: list[Path], tmp_path: Path, run: Run) -> None:
    ran = run("stack", *pair, tmp_path / "out", "--weights", "2,-4")
    assert ran.code == 0, ran.err
    assert f"Stacked 2 adapters into {tmp_path / 'out'} (peft): sum\n" in ran.out
    assert f"  source       2 × {pair[0]}\n  source       -4 × {pair[1]}\n" in ran.out
    assert "  rank         3 to 4 -> 3 to 7\n" in ran.out
    assert "  delta weight exact, checked bit by bit\n" in ran.out
    assert "  modules      3\n" in ran.out
    assert_is_weighted_sum(adaptertools.read(tmp_path / "out"), read(*pair), [2.0, -4.0], 0.0)


def test_what_was_rounded_is_said_with_its_error(pair: list[Path], tmp_path: Path, run: Run) -> None:
    ran = run("stack", *pair, tmp_path / "out", "--weights", "0.7,0.3", "--json")
    error = ran.json["stack"]["max_element_error"]
    assert ran.json["exact"] is ran.json["stack"]["exact"] is False
    assert 0 < error < 1e-7
    off = ran.json["stack"]["max_delta_error"]
    assert 0 < off < 1e-7
    assert ran.json["stack"]["modules"][0]["delta_error"] == off
    assert "max_relative_error" not in ran.json  # of the tensors of a file, it would be taken for that of the sum
    assert_is_weighted_sum(adaptertools.read(tmp_path / "out"), read(*pair), [0.7, 0.3], error)
    assert [row["target"] for row in ran.json["stack"]["modules"]] == ["model.q_proj", "model.v_proj", "model.k_proj"]
    assert ran.json["stack"]["modules"][0]["ranks"] == [3, 4]
    shown = run("stack", *pair, tmp_path / "again", "--weights", "0.7,0.3")
    line = f"  delta weight off by {off:.1e} of a module's norm at most; elements rounded to within {error:.1e}\n"
    assert line in shown.out


FOLDING = {"diffusers": ".safetensors", "kohya": ".safetensors", "mlx": "", "flax": ".safetensors", "loralib": ".pt"}


@pytest.fixture
def awkward(tmp_path: Path) -> list[Path]:
    """Two PEFT adapters whose sum is exact, and whose scalings no float32 times lora_B holds."""
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
    made = [adapter(module(names[0]), module(names[1], seed=3, alpha=5.3)), adapter(module(names[0], alpha=3.7))]
    return [
        adaptertools.write(one, tmp_path / "sources" / str(number), format="peft").path
        for number, one in enumerate(made)
    ]


@pytest.mark.parametrize("to", FOLDING)
def test_the_error_is_that_of_the_file_where_writing_folds_the_scaling(
    to: str, awkward: list[Path], tmp_path: Path, run: Run
) -> None:
    out = tmp_path / f"out{FOLDING[to]}"
    same = [awkward[0], awkward[0]]
    ran = run("stack", *same, out, "--to", to, "--json")
    assert ran.code == 0, ran.err
    said = ran.json
    read_back = adaptertools.read(out)
    wanted = [2 * dense(one) for one in adaptertools.read(awkward[0]).modules]
    found = [dense(one) for one in read_back.modules]
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(wanted, found, strict=True)]
    assert said["stack"]["exact"] is True
    assert said["exact"] is said["writing"]["exact"] is (max(errors) == 0)
    assert said["max_delta_error"] == said["writing"]["max_delta_error"]
    assert abs(said["max_delta_error"] - max(errors)) <= 1e-3 * max(errors)
    shown = run("stack", *same, out, "--to", to, "--overwrite").out
    off = f"off by {said['max_delta_error']:.1e} of a module's norm at most"
    if said["exact"]:
        assert "  delta weight exact, checked bit by bit\n" in shown
        return
    assert f"  delta weight {off}, in the file\n  stacking     exact, checked bit by bit\n" in shown
    assert f"  writing      {off}, read back from the file\n" in shown
    stack, write = (entry.details for entry in read_back.history[-2:])
    assert (stack["exact"], write["exact"]) == (True, False)


def test_most_formats_of_those_do_fold(awkward: list[Path], tmp_path: Path, run: Run) -> None:
    inexact = [
        to
        for to, suffix in FOLDING.items()
        if not run("stack", awkward[0], awkward[0], tmp_path / f"{to}{suffix}", "--to", to, "--json").json["exact"]
    ]
    assert {"diffusers", "kohya", "mlx"} <= set(inexact)


def test_errors_of_stacking_and_of_writing_come_together(awkward: list[Path], tmp_path: Path, run: Run) -> None:
    ran = run("stack", *awkward, tmp_path / "out", "--weights", "0.7,0.3", "--to", "mlx", "--json")
    assert ran.code == 0, ran.err
    meant, off = ran.json["stack"]["max_delta_error"], ran.json["writing"]["max_delta_error"]
    assert 0 < max(meant, off) <= ran.json["max_delta_error"] <= (meant + off) * (1 + 1e-6)
    read_back = {str(one.target): dense(one) for one in adaptertools.read(tmp_path / "out").modules}
    one, other = ({str(m.target): dense(m) for m in adapter.modules} for adapter in read(*awkward))
    for name, found in read_back.items():
        wanted = 0.7 * one[name] + (0.3 * other[name] if name in other else 0)
        assert float((found - wanted).norm() / wanted.norm()) <= ran.json["max_delta_error"] * (1 + 1e-6)


def test_writing_after_a_truncation_has_a_line_of_its_own(awkward: list[Path], tmp_path: Path, run: Run) -> None:
    ran = run("stack", *awkward, tmp_path / "out", "--weights", "0.7,0.3", "--to", "mlx", "--rank", "2")
    assert ran.code == 0, ran.err
    labels = [line[2:15].strip() for line in ran.out.splitlines()]
    assert labels[3:9] == ["rank", "stacking", "truncated", "error", "rounding", "writing"]
    document = run("stack", *awkward, tmp_path / "two", "--to", "mlx", "--rank", "2", "--json").json
    assert document["max_delta_error"] is None  # the truncation's is of the norm of all modules together
    assert document["writing"]["max_delta_error"] > 0


def test_a_base_model_counts_for_writing_too(awkward: list[Path], tmp_path: Path, run: Run) -> None:
    from safetensors.torch import save_file

    base = tmp_path / "base"
    base.mkdir()
    names = [f"prefix.model.layers.0.self_attn.{leaf}.weight" for leaf in ("q_proj", "v_proj")]
    save_file({name: torch.zeros(8, 10) for name in names}, base / "model.safetensors", metadata={"format": "mlx"})
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ran = run("stack", *awkward, tmp_path / "out", "--to", "mlx", "--base", base)
    assert ran.code == 1, "names that the base lacks are refused only by a writer that was given the base"
    assert "there is no such module in" in ran.err


def test_terms_that_cancel_are_said_with_the_error_of_what_is_left(pair: list[Path], tmp_path: Path, run: Run) -> None:
    one = adaptertools.read(pair[0])
    near = one.map_modules(lambda m: replace(m, lora_A=m.lora_A * 1.01, lora_B=m.lora_B * 1.3, alpha=m.alpha / 1.3))
    other = adaptertools.write(near, tmp_path / "near", format="peft").path
    ran = run("stack", pair[0], other, tmp_path / "out", "--weights", "0.9,-0.891", "--dtype", "bf16")
    assert ran.code == 0, ran.err
    found = adaptertools.stack(read(pair[0], other), [0.9, -0.891], dtype="bf16")
    assert found.max_delta_error > 1
    assert f"  delta weight off by {found.max_delta_error:.4g} of a module's norm at most; elements" in ran.out
    assert "  note         the sources nearly cancel one another in 2 modules" in ran.out
    gone = run("stack", pair[0], pair[0], tmp_path / "gone", "--weights", "1,-1")
    assert "  note         the sources cancel one another in all modules: the delta weight is zero there\n" in gone.out


def test_an_estimate_is_called_one(tmp_path: Path, run: Run) -> None:
    large = [adapter(module("x.q_proj", rank=80, seed=seed, n_in=170, n_out=180)) for seed in (0, 1)]
    paths = [adaptertools.write(one, tmp_path / f"large{i}", format="peft").path for i, one in enumerate(large)]
    ran = run("stack", *paths, tmp_path / "out", "--weights", "0.7,0.3")
    assert "  delta weight off by about " in ran.out
    assert adaptertools.read(tmp_path / "out").history[-1].details["estimated"] is True


def test_half_precision_that_became_float32_has_a_line(tmp_path: Path, run: Run) -> None:
    halves = [adapter(module("a", seed=s, dtype=torch.bfloat16), module("b", dtype=torch.bfloat16)) for s in (0, 1)]
    paths = [adaptertools.write(one, tmp_path / f"half{i}", format="peft").path for i, one in enumerate(halves)]
    ran = run("stack", *paths, tmp_path / "out", "--weights", "0.7,0.4")
    assert ran.code == 0, ran.err
    assert "  promoted     1 tensor to f32\n" in ran.out
    assert run("stack", *paths, tmp_path / "two", "--weights", "0.7,0.4", "--json").json["stack"]["promoted"] == {
        "a.lora_B": "f32"  # b is the same in both, so that alpha takes the weights
    }
    for options in (["--rank", "2"], ["--dtype", "bf16"]):
        ran = run("stack", *paths, tmp_path / "again", "--weights", "0.7,0.4", "--overwrite", *options)
        assert "promoted" not in ran.out
        assert {t.dtype for t in adaptertools.read(tmp_path / "again").named_tensors.values()} == {torch.bfloat16}


def test_writing_in_another_dtype_rounds_once(pair: list[Path], tmp_path: Path, run: Run) -> None:
    ran = run("stack", *pair, tmp_path / "out", "--weights", "0.7,0.3", "--dtype", "bf16", "--json")
    assert ran.json["losses"] == []
    assert {m.lora_B.dtype for m in adaptertools.read(tmp_path / "out").modules} == {torch.bfloat16}
    assert_is_weighted_sum(
        adaptertools.read(tmp_path / "out"), read(*pair), [0.7, 0.3], ran.json["stack"]["max_element_error"]
    )


@pytest.mark.parametrize("weights", [["--weights=-1,0.5"], ["--weights", "-1,0.5"], ["--weights", " -1 , 0.5"]])
def test_weights_may_be_negative(weights: list[str], pair: list[Path], tmp_path: Path, run: Run) -> None:
    ran = run("stack", *pair, tmp_path / "out", *weights, "--json")
    assert ran.code == 0, ran.err
    assert [source["weight"] for source in ran.json["stack"]["sources"]] == [-1.0, 0.5]


def test_a_rank_option_truncates_the_sum_and_says_how_near_it_stays(pair: list[Path], tmp_path: Path, run: Run) -> None:
    ran = run("stack", *pair, tmp_path / "out", "--rank", "2", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert "  truncated    rank 3 to 7 -> 2 by rank 2, energy kept 0." in ran.out
    assert {m.rank for m in adaptertools.read(tmp_path / "out").modules} == {2}
    said = run("stack", *pair, tmp_path / "again", "--rank", "2", "--json").json
    assert 0 < said["stack"]["truncation"]["relative_error"] < 1
    assert said["exact"] is False
    assert f"  error        {said['stack']['truncation']['relative_error']:.4g} of the norm" in ran.out


def test_a_size_is_that_of_the_files(pair: list[Path], tmp_path: Path, run: Run) -> None:
    large = [adapter(module("x.q_proj", rank=8, seed=seed, n_in=300, n_out=200)) for seed in (0, 1)]
    paths = [adaptertools.write(one, tmp_path / f"large{i}", format="peft").path for i, one in enumerate(large)]
    ran = run("stack", *paths, tmp_path / "out", "--size", "20kB")
    assert ran.code == 0, ran.err
    assert 0.8 * 20_000 < sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) <= 20_000


@pytest.mark.parametrize("method", ["ties", "dare-linear", "dare-ties", "knots-ties"])
def test_other_methods_are_said_with_their_settings(method: str, pair: list[Path], tmp_path: Path, run: Run) -> None:
    seed = ["--seed", "3"] if method.startswith("dare") else []
    ran = run("stack", *pair, tmp_path / "out", "--method", method, "--density", "0.4", *seed)
    assert ran.code == 0, ran.err
    assert f"(peft): {method}, density 0.4{', seed 3' if seed else ''}\n" in ran.out
    assert re.search(r"^  delta weight off by \d\.\de-08 of a module's norm at most$", ran.out, flags=re.MULTILINE)
    entry = adaptertools.read(tmp_path / "out").history[0]
    assert entry.details["density"] == 0.4
    assert entry.details.get("seed") == (3 if seed else None)


def test_dst_has_the_format_of_the_first_source_unless_it_is_named(pair: list[Path], tmp_path: Path, run: Run) -> None:
    flax = adaptertools.write(adaptertools.read(pair[1]), tmp_path / "flax.npz", format="flax", container="npz").path
    ran = run("stack", flax, pair[0], tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["destination"]["format"], ran.json["destination"]["container"]) == ("flax", "npz")
    ran = run("stack", flax, pair[0], tmp_path / "out.pt", "--to", "loralib", "--json")
    assert ran.json["destination"]["format"] == "loralib"
    assert_is_weighted_sum(adaptertools.read(tmp_path / "out.pt"), read(*pair), [1.0, 1.0], 1e-7)


def with_head(path: Path, value: float, to: Path, base: str = "org/model") -> Path:
    head = {"head.weight": FullWeight(weight=torch.full((2, 2), value))}
    one = replace(adaptertools.read(path), full_weights=head, bases={"": Base(id=base)})
    return adaptertools.write(one, to, format="peft").path


def test_heads_that_differ_need_a_choice(pair: list[Path], tmp_path: Path, run: Run) -> None:
    heads = [with_head(path, float(i), tmp_path / f"head{i}") for i, path in enumerate(pair)]
    ran = run("stack", *heads, tmp_path / "out")
    assert ran.code == 1
    assert "head.weight" in ran.err
    assert "--full-weights" in ran.err
    assert not (tmp_path / "out").exists()
    ran = run("stack", *heads, tmp_path / "out", "--full-weights", "2")
    assert ran.code == 0, ran.err
    assert "  left out     1: head.weight of source 1 (head0)\n" in ran.out
    assert float(adaptertools.read(tmp_path / "out").full_weights["head.weight"].weight[0, 0]) == 1.0


def test_base_models_that_differ_need_force(pair: list[Path], tmp_path: Path, run: Run) -> None:
    other = with_head(pair[1], 0.0, tmp_path / "other", base="another/model")
    ran = run("stack", pair[0], other, tmp_path / "out")
    assert ran.code == 1
    assert "--force" in ran.err
    assert not (tmp_path / "out").exists()
    ran = run("stack", pair[0], other, tmp_path / "out", "--force")
    assert ran.code == 0, ran.err
    assert "another/model" in ran.out


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--weights", "1"], "1 weight for 2 adapters"),
        (["--weights", "1,2,3"], "3 weights for 2 adapters"),
        (["--weights", "1;2"], "commas"),
        (["--weights", "1,nan"], "finite"),
        (["--weights", ""], "commas"),
        (["--density", "0.5"], "density"),
        (["--seed", "1"], "seed"),
        (["--method", "ties", "--seed", "1"], "seed"),
        (["--method", "ties", "--density", "2"], "density"),
        (["--rank", "0"], "rank"),
        (["--energy", "1.5"], "energy"),
        (["--size", "10"], "size"),
        (["--rank", "2", "--error", "0.1"], "rank"),
        (["--full-weights", "3"], "full_weights"),
        (["--device", "abacus"], "device"),
        (["--source-alpha", "16"], "every source states its alpha"),
        (["--slots", "gpt2"], "--slots"),
        (["--in", "nothing=1"], "--in"),
        (["--from", "peft", "--from", "peft", "--from", "peft"], "3 times for 2 sources"),
        (["--out", "nothing=1"], "--out"),
        (["--method", "median"], "method"),
        (["--container", "cardboard"], "cardboard"),
    ],
)
def test_options_that_make_no_sense_exit_with_2_and_write_nothing(
    options: list[str], word: str, pair: list[Path], tmp_path: Path, run: Run
) -> None:
    ran = run("stack", *pair, tmp_path / "out", *options)
    assert ran.code == 2, ran.err
    assert word in ran.err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["sources"]


def test_two_sources_and_a_destination_are_asked_for(pair: list[Path], run: Run) -> None:
    for paths in ([], pair[:1], pair):
        ran = run("stack", *paths)
        assert ran.code == 2
        assert "two sources at least" in ran.err


def test_a_destination_that_stands_is_refused_before_anything_is_computed(
    pair: list[Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptertools.operations.stack.stack", lambda *_, **__: pytest.fail("computed"))
    before = (pair[1] / "adapter_config.json").read_bytes()
    ran = run("stack", *pair, pair[1])
    assert ran.code == 1
    assert "--overwrite" in ran.err
    assert (pair[1] / "adapter_config.json").read_bytes() == before


def test_a_source_may_be_replaced_when_asked_for(pair: list[Path], run: Run) -> None:
    wanted = read(*pair)
    wanted = [one.map_modules(lambda m: replace(m, lora_A=m.lora_A.clone(), lora_B=m.lora_B.clone())) for one in wanted]
    ran = run("stack", *pair, pair[0], "--overwrite")
    assert ran.code == 0, ran.err
    assert_is_weighted_sum(adaptertools.read(pair[0]), wanted, [1.0, 1.0], 0.0)


def test_nothing_is_written_when_a_value_is_not_finite(pair: list[Path], tmp_path: Path, run: Run) -> None:
    one = adaptertools.read(pair[1])
    bad = one.map_modules(lambda m: replace(m, lora_B=torch.full_like(m.lora_B, float("nan"))))
    adaptertools.write(bad, tmp_path / "bad", format="peft", allow_nonfinite=True)
    for options in ([], ["--weights", "0.7,0.3"], ["--rank", "2"]):
        ran = run("stack", pair[0], tmp_path / "bad", tmp_path / "out", *options)
        assert ran.code == 1
        assert "NaN" in ran.err
        assert not (tmp_path / "out").exists()
    ran = run("stack", pair[0], tmp_path / "bad", tmp_path / "out", "--allow-nonfinite")
    assert ran.code == 0, ran.err


def test_inspect_shows_what_was_stacked(pair: list[Path], tmp_path: Path, run: Run) -> None:
    run("stack", *pair, tmp_path / "out", "--weights", "2,-4")
    shown = run("inspect", tmp_path / "out").out
    assert "method sum, sources [(source a, weight 2), (source b, weight -4)]\n" in shown


# Reading several sources.


@pytest.fixture
def bare(pair: list[Path], tmp_path: Path) -> list[Path]:
    """Two loralib files without a sidecar, so that their alpha is not known."""
    paths = []
    for path in pair:
        made = adaptertools.write(adaptertools.read(path), tmp_path / "made" / f"{path.name}.pt", format="loralib").path
        paths.append(tmp_path / "bare" / made.name)
        paths[-1].parent.mkdir(exist_ok=True)
        shutil.copy(made, paths[-1])
    return paths


def test_alpha_goes_to_the_sources_that_need_one(pair: list[Path], bare: list[Path], tmp_path: Path, run: Run) -> None:
    ran = run("stack", pair[0], bare[1], tmp_path / "none")
    assert ran.code == 1
    assert "--source-alpha" in ran.err
    assert "b.pt" in ran.err
    ran = run("stack", pair[0], bare[1], tmp_path / "one", "--source-alpha", "4", "--json")
    assert ran.code == 0, ran.err
    assert_is_weighted_sum(adaptertools.read(tmp_path / "one"), read(*pair), [1.0, 1.0], 1e-7)
    ran = run("stack", bare[0], pair[1], bare[1], tmp_path / "two.pt", "--source-alpha", "6", "--source-alpha", "4")
    assert ran.code == 0, ran.err
    assert_is_weighted_sum(adaptertools.read(tmp_path / "two.pt"), read(*pair), [1.0, 2.0], 1e-7)


def test_alphas_that_do_not_match_in_number_are_refused(
    pair: list[Path], bare: list[Path], tmp_path: Path, run: Run
) -> None:
    alphas = ["--source-alpha", "1", "--source-alpha", "2"]
    ran = run("stack", pair[0], bare[1], tmp_path / "out", *alphas)
    assert ran.code == 2
    assert "given 2 times" in ran.err
    assert str(bare[1]) in ran.err


def test_formats_are_named_once_for_all_or_once_for_each(
    pair: list[Path], bare: list[Path], tmp_path: Path, run: Run
) -> None:
    ran = run("stack", *pair, tmp_path / "one", "--from", "peft")
    assert ran.code == 0, ran.err
    each = ["--from", "peft", "--from", "loralib", "--source-alpha", "4"]
    ran = run("stack", pair[0], bare[1], tmp_path / "two", *each)
    assert ran.code == 0, ran.err
    ran = run("stack", pair[0], bare[1], tmp_path / "three", "--from", "peft")
    assert ran.code == 1
    assert not (tmp_path / "three").exists()


def test_options_of_a_format_go_to_the_sources_of_that_format(pair: list[Path], tmp_path: Path, run: Run) -> None:
    many = tmp_path / "many"
    shutil.copytree(pair[1], many / "one")
    shutil.copytree(pair[0], many / "two")
    flax = adaptertools.write(adaptertools.read(pair[0]), tmp_path / "flax", format="flax").path
    ran = run("stack", flax, many, tmp_path / "out", "--in", "adapter-name=one")
    assert ran.code == 0, ran.err
    assert_is_weighted_sum(adaptertools.read(tmp_path / "out"), read(*pair), [1.0, 1.0], 1e-7)


def test_slots_and_base_go_to_the_sources_whose_format_takes_them(
    pair: list[Path], bare: list[Path], tmp_path: Path, run: Run
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    from safetensors.torch import save_file

    shapes = {f"model.{name}.weight": torch.zeros(8, 10) for name in ("q_proj", "v_proj", "k_proj")}
    save_file(shapes, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ran = run("stack", pair[0], bare[1], tmp_path / "out", "--base", base, "--source-alpha", "4")
    assert ran.code == 0, ran.err
    ran = run("stack", pair[0], bare[1], tmp_path / "slots", "--slots", "q_proj=TF", "--source-alpha", "4")
    assert ran.code == 1, ran.out  # q_proj of the loralib file became one of two slots: 16 rows beside the other's 8
    assert "source 2" in ran.err


def test_what_is_dropped_is_dropped_before_stacking(run: Run, plain: Adapter, tmp_path: Path) -> None:
    dora = plain.map_modules(lambda module: replace(module, magnitude=torch.ones(module.out_features)))
    one = adaptertools.write(dora, tmp_path / "dora", format="peft").path
    two = adaptertools.write(plain, tmp_path / "plain", format="peft").path
    assert "dora" in run("stack", one, two, tmp_path / "refused").err
    done = run("stack", one, two, tmp_path / "both", "--drop", "dora", "--json")
    assert done.code == 0, done.err
    assert done.json["dropped"] == [f"dora: {module.target}" for module in plain.modules]
    assert adaptertools.diff(adaptertools.stack([plain, plain]).adapter, adaptertools.read(tmp_path / "both")).same
