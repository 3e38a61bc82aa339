"""`adaptertools diff`: what it says, and the exit code that a script goes by."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran

import adaptertools
from adaptertools.adapter import Adapter, Base, FullWeight, RowWeights

Run = Callable[..., Ran]
FIXTURES = Path(__file__).parents[1] / "fixtures"


def lines(ran: Ran) -> list[str]:
    return [" ".join(line.split()) for line in ran.out.splitlines()]


@pytest.fixture
def other_folder(plain: Adapter, tmp_path: Path) -> Path:
    """Half of the plain adapter twice as strong, one module less, one under another name, and a head."""
    first, second, third, last = plain.modules
    changed = Adapter(
        modules=(
            replace(first, alpha=32.0),
            second,
            third,
            replace(last, target=replace(last.target, parameter="model.layers.1.self_attn.o_proj")),
        ),
        full_weights={"classifier.weight": FullWeight(weight=torch.ones(2, 8))},
        bases={"": Base(id="tiny/other")},
    )
    return adaptertools.write(changed, tmp_path / "other", format="peft").path


def test_a_converted_adapter_is_the_same(run: Run, peft_folder: Path, tmp_path: Path) -> None:
    adaptertools.convert(peft_folder, tmp_path / "lora.bin", to="loralib")
    ran = run("diff", peft_folder, tmp_path / "lora.bin")
    assert ran.code == 0
    assert lines(ran) == [
        f"The same within 1e-06: A = {peft_folder}, B = {tmp_path / 'lora.bin'}",
        "distance 0",
        "cosine 1",
        "modules 4 in both, 4 of them equal bit for bit",
    ]


def test_what_differs_is_listed_and_the_exit_code_is_four(run: Run, peft_folder: Path, other_folder: Path) -> None:
    ran = run("diff", peft_folder, other_folder)
    assert (ran.code, ran.err) == (4, "")
    found = adaptertools.diff(adaptertools.read(peft_folder), adaptertools.read(other_folder))
    assert lines(ran) == [
        f"Not the same within 1e-06: A = {peft_folder}, B = {other_folder}",
        f"distance {found.relative_distance:.4g} of the norm of A, {found.norm:.6g}; that of B is "
        f"{found.other_norm:.6g}",
        f"cosine {found.cosine:.6g}",
        "modules 3 in both, 2 of them equal bit for bit",
        "only in A 1 module: model.layers.1.self_attn.v_proj",
        "only in B 1 module: model.layers.1.self_attn.o_proj",
        "full weight classifier.weight: only in B",
        "note base model: tiny/llama in A, tiny/other in B; that does not count",
    ]


def test_the_document_says_the_same(run: Run, peft_folder: Path, other_folder: Path) -> None:
    ran = run("diff", peft_folder, other_folder, "--json")
    found = adaptertools.diff(adaptertools.read(peft_folder), adaptertools.read(other_folder))
    assert (ran.code, ran.err) == (4, "")
    document = ran.json
    assert "error" not in document
    assert document == {
        "a": str(peft_folder),
        "b": str(other_folder),
        "same": False,
        "tolerance": 1e-6,
        "relative_distance": found.relative_distance,
        "distance": found.distance,
        "cosine": found.cosine,
        "norm_a": found.norm,
        "norm_b": found.other_norm,
        "modules": {
            "in_both": 3,
            "identical": 2,
            "only_in_a": ["model.layers.1.self_attn.v_proj"],
            "only_in_b": ["model.layers.1.self_attn.o_proj"],
        },
        "weights": [
            {
                "name": "classifier.weight",
                "kind": "full weight",
                "relative_distance": None,
                "max_abs": None,
                "only_in": "B",
                "note": "",
            }
        ],
        "dora": {"on_base": [], "in_parts": [], "base_lacks": []},
        "others": [],
        "notes": ["base model: tiny/llama in A, tiny/other in B"],
    }


def test_modules_gives_a_line_for_each(run: Run, peft_folder: Path, other_folder: Path) -> None:
    rows = adaptertools.diff(adaptertools.read(peft_folder), adaptertools.read(other_folder), norms=True).modules
    norms = [f"{row.norm:.6g} {row.other_norm:.6g}" for row in rows]
    ran = run("diff", peft_folder, other_folder, "--modules")
    assert lines(ran)[-6:] == [
        "MODULE DISTANCE COSINE NORM IN A NORM IN B",
        f"model.layers.0.self_attn.q_proj 1 1 {norms[0]}",
        f"model.layers.0.self_attn.v_proj 0 1 {norms[1]} equal bit for bit",
        f"model.layers.1.self_attn.q_proj 0 1 {norms[2]} equal bit for bit",
        f"model.layers.1.self_attn.v_proj 1 - {norms[3]} only in A",
        f"model.layers.1.self_attn.o_proj infinite - {norms[4]} only in B",
    ]
    document = run("diff", peft_folder, other_folder, "--modules", "--json").json["per_module"]
    assert [row["target"] for row in document] == [str(row.target) for row in rows]
    assert [row["norm_a"] for row in document] == [row.norm for row in rows]
    assert [row["relative_distance"] for row in document] == pytest.approx([1.0, 0.0, 0.0, 1.0, None])
    assert [row["only_in"] for row in document] == [None, None, None, "A", "B"]


def test_modules_measures_what_is_equal_too(run: Run, peft_folder: Path) -> None:
    ran = run("diff", peft_folder, peft_folder, "--modules", "--json")
    assert (ran.code, ran.json["same"]) == (0, True)
    assert all(row["norm_a"] > 0 for row in ran.json["per_module"])
    assert run("diff", peft_folder, peft_folder, "--json").json["norm_a"] is None


def test_the_tolerance_decides(run: Run, plain: Adapter, peft_folder: Path, tmp_path: Path) -> None:
    near = plain.map_modules(lambda module: replace(module, alpha=16.0 * 1.001))
    adaptertools.write(near, tmp_path / "near", format="peft")
    ran = run("diff", peft_folder, tmp_path / "near", "--tolerance", "0.002")
    assert (ran.code, lines(ran)[0].split(":")[0]) == (0, "The same within 0.002")
    assert "distance 1.0e-03 of the norm of A" in lines(ran)[1]
    assert run("diff", peft_folder, tmp_path / "near", "--tolerance", "0.0005").code == 4
    assert run("diff", peft_folder, peft_folder, "--tolerance", "0").code == 0


@pytest.mark.parametrize("tolerance", ["-1", "nan", "inf"])
def test_a_tolerance_that_makes_no_sense_is_wrong_usage(tolerance: str, run: Run, peft_folder: Path) -> None:
    ran = run("diff", peft_folder, peft_folder, f"--tolerance={tolerance}")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("Error: tolerance is ")


def test_nothing_is_written_so_that_nothing_can_be_carried_along(run: Run, peft_folder: Path) -> None:
    ran = run("diff", peft_folder, peft_folder, "--allow-nonfinite")
    assert ran.code == 2
    assert "No such option" in ran.err


def test_quiet_leaves_the_exit_code(run: Run, peft_folder: Path, other_folder: Path) -> None:
    for pair, code in (((peft_folder, peft_folder), 0), ((peft_folder, other_folder), 4)):
        ran = run("diff", *pair, "-q")
        assert (ran.code, ran.out, ran.err) == (code, "", "")


def test_failures_are_not_taken_for_differences(run: Run, peft_folder: Path, tmp_path: Path) -> None:
    ran = run("diff", peft_folder, tmp_path / "none", "--json")
    assert ran.code == 1
    assert ran.json["error"]["type"] == "SourceNotFoundError"


def test_other_shapes_are_an_error_that_names_both(run: Run, plain: Adapter, peft_folder: Path, tmp_path: Path) -> None:
    other = plain.map_modules(lambda module: replace(module, lora_A=torch.ones(4, 10)))
    adaptertools.write(other, tmp_path / "other", format="peft")
    ran = run("diff", peft_folder, tmp_path / "other")
    assert ran.code == 1
    assert "model.layers.0.self_attn.q_proj: the delta weight has shape (8, 12) in A and (8, 10) in B" in ran.err


def test_values_that_are_not_finite_are_named_with_their_side(
    run: Run, plain: Adapter, peft_folder: Path, tmp_path: Path
) -> None:
    bad = plain.modules[1].lora_B.clone()
    bad[0, 0] = math.nan
    spoiled = replace(plain, modules=(plain.modules[0], replace(plain.modules[1], lora_B=bad), *plain.modules[2:]))
    adaptertools.write(spoiled, tmp_path / "bad", format="peft", allow_nonfinite=True)
    ran = run("diff", peft_folder, tmp_path / "bad")
    assert ran.code == 1
    assert ran.err.startswith("Error: B: model.layers.0.self_attn.v_proj.lora_B: 1 NaN and 0 infinite of 32 values")
    assert run("diff", tmp_path / "bad", tmp_path / "bad").code == 0


def test_a_file_without_alpha_takes_the_one_that_is_given(run: Run, peft_folder: Path, tmp_path: Path) -> None:
    adaptertools.convert(peft_folder, tmp_path / "lora.bin", to="loralib")
    (tmp_path / "lora.bin.adaptertools.json").unlink()
    assert run("diff", peft_folder, tmp_path / "lora.bin").code == 1
    assert run("diff", peft_folder, tmp_path / "lora.bin", "--source-alpha", "16").code == 0
    ran = run("diff", peft_folder, tmp_path / "lora.bin", "--source-alpha", "8", "--json")
    assert (ran.code, ran.json["relative_distance"]) == (4, pytest.approx(0.5))


def test_all_that_is_no_factor_has_a_line(run: Run, plain: Adapter, tmp_path: Path) -> None:
    first = replace(plain.modules[0], magnitude=torch.ones(8), lora_bias=None)

    def stored(name: str, **fields: Any) -> Path:
        return adaptertools.write(replace(plain, modules=(first,), **fields), tmp_path / name, format="peft").path

    one = stored(
        "one",
        full_weights={"head.weight": FullWeight(weight=torch.ones(2, 8))},
        row_weights={"model.embed_tokens.weight": RowWeights(indices=(1, 2), rows=torch.ones(2, 8))},
        bases={"": Base(id="tiny/llama", change="pissa")},
    )
    first = replace(first, magnitude=torch.full((8,), 1.5))
    other = stored(
        "other",
        full_weights={"head.weight": FullWeight(weight=torch.full((2, 8), 1.25))},
        row_weights={"model.embed_tokens.weight": RowWeights(indices=(1, 3), rows=torch.ones(2, 8))},
    )
    ran = run("diff", one, other)
    assert ran.code == 4
    name = "model.layers.0.self_attn.q_proj"
    assert lines(ran)[1:] == [
        "distance 0",
        "cosine 1",
        "modules 1 in both, 1 of them equal bit for bit",
        "DoRA 1 module compared by direction and magnitude alone, without the base weight: --base BASE, weights and "
        f"all, compares what it adds: {name}",
        f"magnitude {name}.magnitude: relative distance 0.5, largest difference 0.5",
        "full weight head.weight: relative distance 0.25, largest difference 0.25",
        "token rows model.embed_tokens.weight: rows 1, 2 in A, 1, 3 in B",
        "differs base: changed by pissa in A, unchanged in B",
    ]


def test_from_zero_the_distance_is_infinite_in_words(
    run: Run, plain: Adapter, peft_folder: Path, tmp_path: Path
) -> None:
    idle = plain.map_modules(lambda module: replace(module, lora_B=torch.zeros(8, 4)))
    adaptertools.write(idle, tmp_path / "idle", format="peft")
    ran = run("diff", tmp_path / "idle", peft_folder)
    assert ran.code == 4
    assert lines(ran)[1].startswith("distance infinite: the delta weights of A are zero")
    assert lines(ran)[2] == "cosine -"
    document = run("diff", tmp_path / "idle", peft_folder, "--json").json
    assert (document["relative_distance"], document["cosine"], document["same"]) == (None, None, False)
    back = run("diff", peft_folder, tmp_path / "idle")
    assert lines(back)[1].startswith("distance 1 of the norm of A")


def test_where_no_name_meets_another_the_way_to_turn_flat_ones_back_is_named(
    run: Run, peft_folder: Path, other_folder: Path, tmp_path: Path
) -> None:
    hint = "note no name stands in both: flat ones (kohya, GGUF) become module paths with --base"
    flat = "fixtures/kohya/unet_and_text_encoder/adapter.safetensors"
    assert hint in lines(run("diff", peft_folder, Path(__file__).parents[1] / flat))
    assert hint not in lines(run("diff", peft_folder, other_folder))


def test_with_its_base_what_dora_adds_is_compared(run: Run, tmp_path: Path) -> None:
    dora = FIXTURES / "peft" / "dora"
    base = dora / "base.safetensors"
    fixed = run("check", dora, "--for", "vllm", "--max-rank", "1", "--base", base, "--fix", tmp_path / "lora", "--json")
    ran = run("diff", dora, tmp_path / "lora", "--base", base, "--json")
    assert ran.code == 4
    assert ran.json["relative_distance"] == pytest.approx(fixed.json["relative_error"], rel=1e-5)
    assert ran.json["weights"] == []
    assert ran.json["dora"] == {"on_base": ["embed", "lin0", "lin1"], "in_parts": [], "base_lacks": []}
    ran = run("diff", dora, tmp_path / "lora", "--base", base, "--tolerance", "1")
    assert ran.code == 0
    assert "DoRA 3 modules compared by what they add to the base model" in lines(ran)


def test_a_base_of_a_configuration_alone_leaves_dora_in_parts(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    dora = FIXTURES / "peft" / "dora"
    adaptertools.convert(dora, tmp_path / "lora", to="peft", drop=["dora"])
    ran = run("diff", dora, tmp_path / "lora", "--base", tmp_path)
    assert (ran.code, ran.err) == (4, "")
    (said,) = [line for line in lines(ran) if line.startswith("DoRA")]
    assert "compared by direction and magnitude alone, without the base weight: " in said
    assert f"{tmp_path} has a config.json alone" in said
    assert any(line.startswith("magnitude lin0.magnitude: only in A") for line in lines(ran))


def test_a_base_that_lacks_the_weights_of_dora_is_named_and_not_asked_for_again(run: Run, tmp_path: Path) -> None:
    dora, base = FIXTURES / "peft" / "dora", FIXTURES / "base" / "llama_tiny"
    adaptertools.convert(dora, tmp_path / "lora", to="peft", drop=["dora"])
    ran = run("diff", dora, tmp_path / "lora", "--base", base)
    assert (ran.code, ran.err) == (4, "")
    (said,) = [line for line in lines(ran) if line.startswith("DoRA")]
    assert f"embed: the base model has no such weight, and DoRA renormalises it. Is {base} the right" in said
    assert said.endswith("; so for 2 more")
    assert "--base" not in said
    lacking = run("diff", dora, tmp_path / "lora", "--base", base, "--json").json["dora"]["base_lacks"]
    assert [line.partition(":")[0] for line in lacking] == ["embed", "lin0", "lin1"]


def test_names_of_gguf_take_a_base_of_a_configuration_alone(run: Run, tmp_path: Path) -> None:
    """Beside sources of other formats too, whose readers ask for no names."""
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(FIXTURES / "base" / "llama_tiny" / "config.json", alone)
    source = FIXTURES / "base" / "llama_tiny_lora"
    adaptertools.convert(source, tmp_path / "adapter.gguf", to="gguf", read_options={"base": alone})
    for name, to in (("a.safetensors", "kohya"), ("b.safetensors", "diffusers"), ("c", "mlx")):
        adaptertools.convert(source, tmp_path / name, to=to)
        ran = run("diff", tmp_path / "adapter.gguf", tmp_path / name, "--base", alone)
        assert (ran.code, ran.err) == (0, "")


def test_flat_names_say_why_a_configuration_is_not_enough(run: Run, peft_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ran = run("diff", FIXTURES / "kohya" / "unet_and_text_encoder", peft_folder, "--base", tmp_path)
    assert ran.code == 2
    assert "by the names of the base model's weights" in ran.err
    assert "has a config.json alone. Give the folder with its weights" in ran.err
