"""`adaptertools check`: what it says, the exit codes that a script goes by, and the file that --fix writes."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Ran

import adaptertools
from adaptertools.adapter import Adapter, ScaleRule
from adaptertools.cli.check import CONSUMERS

Run = Callable[..., Ran]
FIXTURES = Path(__file__).parents[1] / "fixtures"


def lines(ran: Ran) -> list[str]:
    return [" ".join(line.split()) for line in ran.out.splitlines()]


@pytest.fixture
def rslora_folder(plain: Adapter, tmp_path: Path) -> Path:
    """The plain adapter as one of rsLoRA."""
    made = plain.map_modules(lambda module: replace(module, scale_rule=ScaleRule.ALPHA_OVER_SQRT_RANK))
    return Path(str(adaptertools.write(made, tmp_path / "rslora", format="peft").path))


def test_what_loads_exits_with_zero_and_lists_every_rule(run: Run, peft_folder: Path) -> None:
    ran = run("check", peft_folder, "--for", "vllm")
    assert (ran.code, ran.err) == (0, "")
    said = lines(ran)
    assert (
        said[0]
        == f"{peft_folder} (peft) loads and means the same, as far as it was checked: vLLM 0.33.0, ranks up to 16"
    )
    assert said[2] == "RULE VERDICT REASON"
    assert said[3] == "format ok vLLM loads peft"
    assert said[-2:] == [f"{what} in the base not checked needs --base" for what in ("names", "sizes")]
    assert len(said) - 3 == len(adaptertools.check(peft_folder, "vllm").findings)


def test_what_means_something_else_exits_with_four_and_names_the_command_that_helps(
    run: Run, rslora_folder: Path
) -> None:
    ran = run("check", rslora_folder, "--for", "sglang")
    assert (ran.code, ran.err) == (4, "")
    assert (
        "rsLoRA changes meaning use_rslora is unread: the scaling is lora_alpha / r: "
        "model.layers.0.self_attn.q_proj is scaled by 8, not 4 and 3 more modules"
    ) in lines(ran)
    assert lines(ran)[-1] == f"The file that does: adaptertools check {rslora_folder} --for sglang --fix DST"


def test_the_version_chooses_the_rules_and_says_when_it_was_not_read(run: Run, rslora_folder: Path) -> None:
    assert run("check", rslora_folder, "--for", "vllm").code == 0
    ran = run("check", rslora_folder, "--for", "vllm", "--version", "0.7.3")
    assert ran.code == 4
    assert "rsLoRA fails refused:" in "\n".join(lines(ran))
    assert lines(ran)[1].startswith("note 0.7.3 itself was not read: its rules are those of 0.6.6. Read were 0.6.6,")


def test_the_one_state_that_was_read_counts_for_every_version(run: Run, peft_folder: Path) -> None:
    ran = run("check", peft_folder, "--for", "tensorrt-llm", "--version", "0.21")
    assert lines(ran)[1] == (
        "note 2 states of TensorRT-LLM were read, 037d4ba, 007e181: their rules count for every version"
    )


@pytest.mark.parametrize(("consumer", "version"), [("ollama", "01cf744"), ("vllm", "v0.11.0"), ("vllm", "0.11")])
def test_a_version_that_was_read_needs_no_note(run: Run, peft_folder: Path, consumer: str, version: str) -> None:
    assert run("check", peft_folder, "--for", consumer, "--version", version, "--json").json["notes"] == []


def test_the_notes_of_the_reader_are_shown_by_check_and_by_fix(run: Run, tmp_path: Path) -> None:
    place = FIXTURES / "torchtune" / "qwen2_exported" / "epoch_0"
    notes = adaptertools.read(place).notes
    assert any("is not the adapter that was trained" in note for note in notes)
    ran = run("check", place, "--for", "vllm")
    assert [f"note {note}" for note in notes] == lines(ran)[1 : 1 + len(notes)]
    assert run("check", place, "--for", "vllm", "--json").json["notes"] == list(notes)
    ran = run("check", place, "--for", "vllm", "--fix", tmp_path / "fixed")
    assert {f"note {note}" for note in notes} <= set(lines(ran))
    ran = run("check", place, "--for", "vllm", "--fix", tmp_path / "again", "--json")
    assert set(notes) <= set(ran.json["notes"])


def test_the_error_of_a_fix_is_said_to_be_beside_what_was_dropped(run: Run, plain: Adapter, tmp_path: Path) -> None:
    held = plain.map_modules(lambda m: replace(m, magnitude=torch.ones(m.out_features)))
    place = adaptertools.write(held, tmp_path / "dora", format="peft").path
    given = ("check", place, "--for", "vllm", "--drop", "dora")
    assert "error 0, beside what was dropped: dora" in lines(run(*given, "--fix", tmp_path / "fixed"))
    document = run(*given, "--fix", tmp_path / "again", "--json").json
    assert (document["relative_error"], document["error_is_beside"], document["exact"]) == (0, ["dora"], False)


def test_the_command_that_helps_has_the_options_that_were_given(run: Run, rslora_folder: Path, tmp_path: Path) -> None:
    place = rslora_folder.rename(tmp_path / "two words")
    given = ["--for", "vllm", "--version", "0.6.6", "--max-rank", "16", "--from", "peft"]
    ran = run("check", place, *given)
    said = lines(ran)[-1].removeprefix("The file that does: ")
    assert shlex.split(said) == ["adaptertools", "check", str(place), *given, "--fix", "DST"]
    assert run(*shlex.split(said)[1:-1], tmp_path / "fixed").code == 0


def test_no_command_is_named_where_no_fix_is_known(run: Run) -> None:
    ran = run("check", FIXTURES / "peft" / "gpt2", "--for", "tensorrt-llm")
    assert ran.code == 4
    assert lines(ran)[-1] == "--fix cannot mend list of modules: no way known"
    assert "--fix DST" not in ran.out


def test_a_rank_over_the_cap_is_shown_with_both_numbers(run: Run, peft_folder: Path) -> None:
    ran = run("check", peft_folder, "--for", "vllm", "--max-rank", "1")
    assert ran.code == 4
    assert any("has rank 4 > 1" in line for line in lines(ran))
    assert lines(ran)[-1].endswith("--for vllm --max-rank 1 --fix DST")


def test_fix_writes_the_file_and_says_what_was_done_and_what_it_cost(
    run: Run, rslora_folder: Path, tmp_path: Path
) -> None:
    ran = run("check", rslora_folder, "--for", "sglang", "--fix", tmp_path / "fixed")
    assert (ran.code, ran.err) == (0, "")
    said = lines(ran)
    assert said[0] == f"Fixed {rslora_folder} (peft) to {tmp_path / 'fixed'} (peft) for SGLang 0.5.23"
    assert said[1:4] == [
        "mended rsLoRA",
        "done alpha is the rank, 4, and the scaling stands in the factors",
        "error 0: the delta weights are the same",
    ]
    assert run("check", tmp_path / "fixed", "--for", "sglang").code == 0
    assert run("diff", rslora_folder, tmp_path / "fixed", "--tolerance", "0").code == 0


def test_fix_says_the_error_of_truncation(run: Run, peft_folder: Path, tmp_path: Path) -> None:
    ran = run("check", peft_folder, "--for", "sglang", "--max-rank", "2", "--fix", tmp_path / "fixed")
    assert ran.code == 0
    found = adaptertools.diff(adaptertools.read(peft_folder), adaptertools.read(tmp_path / "fixed"))
    assert f"error {found.relative_distance:.4g} of the norm of the delta weights" in lines(ran)
    assert "done 4 modules were truncated to rank 2" in lines(ran)


def test_json_has_every_rule_with_its_source(run: Run, rslora_folder: Path) -> None:
    ran = run("check", rslora_folder, "--for", "sglang", "--json")
    assert ran.code == 4
    document = ran.json
    assert (document["for"], document["version"], document["passes"]) == ("sglang", "0.5.23", False)
    (broken,) = [rule for rule in document["rules"] if rule["verdict"] == "changes meaning"]
    assert (broken["rule"], broken["source"]) == ("rsLoRA", "sglang/srt/lora/lora.py")
    assert len(broken["found"]) == 4
    assert document["fix"].endswith("--for sglang --fix DST")


def test_json_of_a_fix_has_the_check_of_the_result(run: Run, rslora_folder: Path, tmp_path: Path) -> None:
    document = run("check", rslora_folder, "--for", "sglang", "--fix", tmp_path / "fixed", "--json").json
    assert document["mended"] == ["rsLoRA"]
    assert document["relative_error"] == 0
    assert document["check"]["passes"] is True
    assert document["destination"]["format"] == "peft"


def test_what_cannot_be_mended_exits_with_one_and_the_way_out(run: Run, plain: Adapter, tmp_path: Path) -> None:
    place = adaptertools.write(replace(plain, invocation_tokens=(3,)), tmp_path / "alora", format="peft").path
    ran = run("check", place, "--for", "vllm", "--fix", tmp_path / "fixed")
    assert ran.code == 1
    assert "aLoRA (invocation tokens): --drop alora lets it act on every token" in ran.err
    ran = run("check", place, "--for", "vllm")
    assert lines(ran)[-1] == "--fix cannot mend aLoRA: --drop alora lets it act on every token"


def test_an_existing_destination_is_refused_unless_it_may_be_replaced(
    run: Run, rslora_folder: Path, tmp_path: Path
) -> None:
    assert run("check", rslora_folder, "--for", "sglang", "--fix", tmp_path / "fixed").code == 0
    assert run("check", rslora_folder, "--for", "sglang", "--fix", tmp_path / "fixed").code == 1
    assert run("check", rslora_folder, "--for", "sglang", "--fix", tmp_path / "fixed", "--overwrite").code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--for", "tgi"), "'tgi' is not one of"),
        (("--for", "vllm", "--version", "new"), "expected numbers"),
        (("--for", "vllm", "--max-rank", "48"), "start it with 64"),
        ((), "Missing option '--for'"),
    ],
)
def test_wrong_usage_exits_with_two(run: Run, peft_folder: Path, arguments: tuple[str, ...], said: str) -> None:
    ran = run("check", peft_folder, *arguments)
    assert ran.code == 2
    assert said in ran.err


def test_a_file_of_another_format_breaks_no_rule_about_the_files_of_the_consumer(
    run: Run, plain: Adapter, tmp_path: Path
) -> None:
    adaptertools.write(plain, tmp_path / "lora.pt", format="loralib")
    ran = run("check", tmp_path / "lora.pt", "--for", "vllm", "--source-alpha", "16")
    assert ran.code == 4
    (broken,) = [line for line in lines(ran) if " fails " in line]
    assert broken == (
        "format fails vLLM loads peft; this is loralib, so convert it first: adaptertools convert SRC DST --to peft"
    )
    ran = run("check", tmp_path / "lora.pt", "--for", "vllm", "--fix", tmp_path / "fixed")
    assert ran.code == 0
    assert run("diff", tmp_path / "lora.pt", tmp_path / "fixed").code == 0


def test_what_vllm_was_given_as_torch_file_it_takes_and_lorax_does_not(
    run: Run, plain: Adapter, tmp_path: Path
) -> None:
    high = adaptertools.convert(
        adaptertools.write(plain, tmp_path / "safe", format="peft").path, tmp_path / "bin", to="peft", container="torch"
    )
    assert run("check", high.path, "--for", "vllm").code == 0
    ran = run("check", high.path, "--for", "lorax", "--json")
    assert "file names" in {rule["rule"] for rule in ran.json["rules"] if rule["verdict"] == "fails"}


def test_an_error_of_the_source_is_no_verdict(run: Run, tmp_path: Path) -> None:
    ran = run("check", tmp_path / "nothing", "--for", "vllm", "--json")
    assert ran.code == 1
    assert json.loads(ran.out)["error"]["type"] == "SourceNotFoundError"


def test_what_passes_is_said_to_be_written_unchanged(run: Run, peft_folder: Path, tmp_path: Path) -> None:
    ran = run("check", peft_folder, "--for", "vllm", "--fix", tmp_path / "fixed")
    assert (ran.code, ran.err) == (0, "")
    assert lines(ran)[:2] == [
        f"{peft_folder} (peft) passes as it is, vLLM 0.33.0; written unchanged to {tmp_path / 'fixed'} (peft)",
        "error 0: the delta weights are the same",
    ]
    config = [(place / "adapter_config.json").read_text() for place in (peft_folder, tmp_path / "fixed")]
    assert config[0] == config[1]
    document = run("check", peft_folder, "--for", "vllm", "--fix", tmp_path / "again", "--json").json
    assert (document["unchanged"], document["mended"], document["done"], document["exact"]) == (True, [], [], True)


def test_what_could_not_be_written_is_said_instead_of_a_command_that_fails(run: Run, peft_folder: Path) -> None:
    ran = run("check", peft_folder, "--for", "llama.cpp")
    assert ran.code == 4
    assert lines(ran)[-1].startswith(
        "--fix cannot write gguf as it is: model.layers.0.self_attn.q_proj: GGUF calls it by"
    )
    document = run("check", peft_folder, "--for", "llama.cpp", "--json").json
    assert (document["fix"], document["refused"].count("--base DIR")) == (None, 1)


FORMATS = sorted(place for place in FIXTURES.iterdir() if place.is_dir() and place.name not in ("base", "malformed"))
CASES = [case for place in FORMATS for case in sorted(place.iterdir())]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.name}")
def test_every_fixture_has_a_verdict_for_every_consumer_and_the_command_that_helps_does(
    case: Path, run: Run, tmp_path: Path
) -> None:
    src = next((case / name for name in ("final", "epoch_0") if (case / name).is_dir()), case)
    for consumer in CONSUMERS:
        found = run("check", src, "--for", consumer, "--json")
        if found.code in (1, 2):
            assert found.json["error"]["message"]
            continue
        assert found.code == (0 if found.json["passes"] else 4)
        if found.json["passes"] or found.json["fix"]:
            fixed = run("check", src, "--for", consumer, "--fix", tmp_path / consumer, "--json")
            assert (fixed.code, fixed.json["check"]["passes"]) == (0, True), consumer
        else:
            assert found.json["ways_out"] or found.json["refused"]


def test_an_adapter_that_holds_nan_does_not_pass(run: Run, plain: Adapter, tmp_path: Path) -> None:
    first = plain.modules[0]
    values = first.lora_A.clone()
    values[0, 0] = float("nan")
    damaged = replace(plain, modules=(replace(first, lora_A=values), *plain.modules[1:]))
    adaptertools.write(damaged, tmp_path / "src", format="peft", allow_nonfinite=True)
    ran = run("check", tmp_path / "src", "--for", "vllm")
    assert ran.code == 4
    assert f"finite changes meaning NaN or infinity makes every output NaN: {first.target}.lora_A" in lines(ran)
    ran = run("check", tmp_path / "src", "--for", "vllm", "--fix", tmp_path / "dst")
    assert (ran.code, (tmp_path / "dst").exists()) == (1, False)
    assert "take an earlier checkpoint" in ran.err


def test_values_of_a_large_adapter_are_not_read(run: Run, peft_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptertools.api.case.READ_AT_ONCE", 10)
    assert "finite not checked too large to be read for this" in lines(run("check", peft_folder, "--for", "vllm"))


@pytest.mark.parametrize("consumer", ["comfyui", "diffusers"])
def test_an_adapter_of_a_language_model_passes_in_no_program_for_images(
    run: Run, consumer: str, tmp_path: Path
) -> None:
    adapter = adaptertools.read(FIXTURES / "base" / "llama_tiny_lora")
    adaptertools.write(adapter, tmp_path / "c.safetensors", format="kohya")
    ran = run("check", tmp_path / "c.safetensors", "--for", consumer)
    assert ran.code == 4
    assert "model.layers.0.mlp.down_proj and 5 more modules" in ran.out
    assert "a program for language models" in ran.out


def test_a_version_before_the_first_that_was_read_is_said_to_be_unchecked(run: Run, peft_folder: Path) -> None:
    ran = run("check", peft_folder, "--for", "vllm", "--version", "0.1")
    assert "as far as it was checked" in lines(ran)[0]
    said = "version not checked 0.1 is older than any that was read: its rules are not known, those of 0.6.6 follow"
    assert said in lines(ran)
    assert "version not checked" not in " ".join(lines(run("check", peft_folder, "--for", "vllm", "--version", "0.7")))


def test_the_advice_to_convert_names_the_base_that_the_format_needs(run: Run) -> None:
    src, base = FIXTURES / "base" / "llama_tiny_lora", FIXTURES / "base" / "llama_tiny"
    assert "convert SRC DST --to gguf --base BASE" in run("check", src, "--for", "llama.cpp").out
    assert f"convert SRC DST --to gguf --base {base}" in run("check", src, "--for", "llama.cpp", "--base", base).out
    assert "--base BASE" not in run("check", src, "--for", "comfyui").out
