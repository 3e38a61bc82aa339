"""`adaptertools estimate`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import adaptertools


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two layers of 1024 with a vocabulary of 2000, in bf16."""
    shapes = {"model.embed_tokens.weight": (2000, 1024), "lm_head.weight": (2000, 1024)}
    for layer in (0, 1):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (1024, 1024)
        shapes[f"model.layers.{layer}.self_attn.v_proj.weight"] = (256, 1024)
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_ranks_stand_side_by_side(base: Path, run: Callable[..., Any]) -> None:
    ran = run("estimate", base, "--rank", "8,16")
    assert ran.code == 0, ran.err
    assert ran.out == (
        f"{base}: 6,717,440 parameters in bf16\n"
        "  targets      4 modules\n"
        "\n"
        "TARGET  MODULES  SHAPE      RANK 8  SHARE  F32       F16, BF16  RANK 16  SHARE  F32       F16, BF16\n"
        "q_proj  2        1024x1024  32,768  0.49%  131.1 kB  65.5 kB    65,536   0.98%  262.1 kB  131.1 kB\n"
        "v_proj  2        256x1024   20,480  0.30%  81.9 kB   41.0 kB    40,960   0.61%  163.8 kB  81.9 kB\n"
        "total   4                   53,248  0.79%  213.0 kB  106.5 kB   106,496  1.59%  426.0 kB  213.0 kB\n"
    )


def test_json_says_the_same_as_python(base: Path, run: Callable[..., Any]) -> None:
    ran = run("estimate", base, "--rank", "8", "--rank", "300,8", "--targets", "q_proj, lm_head", "--json")
    assert ran.code == 0, ran.err
    found = adaptertools.estimate(base, ranks=[8, 300], targets=["q_proj", "lm_head"])
    assert ran.json == found.to_json()
    assert [entry["rank"] for entry in ran.json["total"]["ranks"]] == [8, 300]
    assert ran.json["total"]["ranks"][0]["parameters"] == 8 * (2 * 2048 + 3024)
    assert {row["name"]: row["kind"] for row in ran.json["targets"]} == {"lm_head": "head", "q_proj": "linear"}
    assert run("estimate", base, "--rank", "8", "-q").out == ""


def test_notes_are_shown_below_the_table(base: Path, run: Callable[..., Any]) -> None:
    ran = run("estimate", base, "--rank", "300", "--targets", "v_proj")
    assert ran.out.endswith(
        "\n\n  note         rank 300 is beyond the full rank of v_proj (from 256 on): PEFT allows it, and nothing is "
        "gained\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rank", "0"), "rank is 0, expected a whole number from 1 on"),
        (("--rank", "8,x"), "--rank 'x': expected a whole number"),
        (("--rank", "8,"), "--rank '8,': a part is empty"),
        (("--rank", "1.5"), "--rank '1.5': expected a whole number"),
        (("--rank", "8", "--targets", "q_proj,,v_proj"), "a part is empty"),
        (("--rank", "8", "--targets", "q_porj"), "the target 'q_porj' matches no weight"),
        ((), "Missing option '--rank'"),
    ],
)
def test_options_that_make_no_sense_are_wrong_usage(
    arguments: tuple[str, ...], said: str, base: Path, run: Callable[..., Any]
) -> None:
    ran = run("estimate", base, *arguments)
    assert ran.code == 2
    assert said in ran.err
    assert ran.out == ""


def test_what_can_be_no_name_on_the_hub_is_a_path_and_the_error_says_so(
    tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("../model", "./model", "model", "a/b/c", tmp_path / "org" / "none"):
        ran = run("estimate", path, "--rank", "8")
        assert ran.code == 1
        assert "there is no such base model\n" in ran.err


def test_a_base_that_is_none_fails_in_one_line(tmp_path: Path, peft_folder: Path, run: Callable[..., Any]) -> None:
    for path, said in ((tmp_path / "missing", "no such base model"), (peft_folder, "belongs to an adapter")):
        ran = run("estimate", path, "--rank", "8")
        assert ran.code == 1
        assert said in ran.err
        assert ran.err.count("\n") == 1
