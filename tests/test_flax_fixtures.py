"""Adapters that real nnx, qwix and gemma made: read by their content alone, they give the delta weights those apply."""

import json
from pathlib import Path

import pytest
import torch
from flax_oracle import modules_of
from safetensors.torch import load_file

import adaptertools
from adaptertools.containers.source import Source
from adaptertools.formats import detect

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = sorted(
    case.parent for name in ("flax", "flax_qwix", "flax_gemma") for case in (FIXTURES / name).glob("*/case.json")
)


def test_every_dialect_and_container_has_a_case() -> None:
    assert len(CASES) >= 12
    assert {case.parent.name for case in CASES} == {"flax", "flax_qwix", "flax_gemma"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.name}")
def test_a_file_of_the_real_library_is_read_with_the_delta_weights_it_applies(case: Path) -> None:
    description = json.loads((case / "case.json").read_text())
    path = case / description["file"]
    assert detect(Source(path)) == case.parent.name.replace("_", "-")
    modules = modules_of(adaptertools.read(path, **description["read"]))
    expected = load_file(case / "expected.safetensors")
    assert modules.keys() == expected.keys()
    for name, delta in expected.items():
        assert delta.abs().max() > 0.01
        # the library ran in float32, and on bfloat16 factors where it keeps those
        torch.testing.assert_close(
            modules[name].delta_weight(), delta, atol=2e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.name}")
def test_it_is_written_back_in_the_layout_it_was_read_in(case: Path, tmp_path: Path) -> None:
    description = json.loads((case / "case.json").read_text())
    adapter = adaptertools.read(case / description["file"], **description["read"])
    assert adapter.origin is not None
    folder = tmp_path / "again"
    adaptertools.write(
        adapter, folder, format=adapter.origin.format, container=adapter.origin.container, **adapter.origin.options
    )
    again = adaptertools.read(folder)
    assert again.origin is not None
    assert again.origin.options == adapter.origin.options
    before, after = modules_of(adapter), modules_of(again)
    assert before.keys() == after.keys()
    for name, module in before.items():
        for factor in ("lora_A", "lora_B"):
            assert torch.equal(getattr(module, factor).float(), getattr(after[name], factor).float()), (
                f"{name}.{factor}"
            )
        assert module.scaling == after[name].scaling
