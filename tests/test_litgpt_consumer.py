"""Real LitGPT as the judge: what it merges is what we read, under the names that its own conversion gives."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptertools
from adaptertools.adapter import Adapter
from adaptertools.containers.source import Source
from adaptertools.formats import detect

pytestmark = [
    pytest.mark.consumers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:litgpt"),
]

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {"n_head": 4, "n_query_groups": 2, "intermediate_size": 32},
    "TinyLlama-1.1B-intermediate-step-1431k-3T": {"n_head": 4, "n_query_groups": 1, "intermediate_size": 32},
    "Mistral-7B-v0.1": {"n_head": 4, "n_query_groups": 2, "intermediate_size": 32},
    "Mixtral-8x7B-v0.1": {"n_head": 4, "n_query_groups": 2, "intermediate_size": 32, "n_expert": 3},
    "Gemma-2b": {"n_head": 4, "n_query_groups": 1, "head_size": 8, "intermediate_size": 32},
    "Gemma-2-2b": {"n_head": 4, "n_query_groups": 2, "head_size": 8, "intermediate_size": 32},
    "Gemma-3-1b-it": {"n_head": 4, "n_query_groups": 1, "head_size": 8, "intermediate_size": 32},
    "Qwen2.5-0.5B": {"n_head": 4, "n_query_groups": 2, "intermediate_size": 32},
    "QwQ-32B": {"n_head": 4, "n_query_groups": 2, "intermediate_size": 32},
    "Qwen3-0.6B": {"n_head": 4, "n_query_groups": 2, "head_size": 8, "intermediate_size": 32},
    "Qwen3-30B-A3B": {
        "n_head": 4,
        "n_query_groups": 2,
        "head_size": 8,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "n_expert": 3,
        "n_expert_per_token": 2,
    },
    "OLMo-2-1124-7B": {"n_head": 4, "n_query_groups": 4, "intermediate_size": 32},
    "phi-2": {"n_head": 4, "n_query_groups": 4, "intermediate_size": 32},
    "Phi-3-mini-4k-instruct": {"n_head": 4, "n_query_groups": 4, "intermediate_size": 32},
    "Phi-4-mini-instruct": {"n_head": 4, "n_query_groups": 2, "intermediate_size": 32},
    "pythia-14m": {"n_head": 4, "n_query_groups": 4, "intermediate_size": 32},
    "falcon-7b": {"n_head": 4, "n_query_groups": 1, "intermediate_size": 32},
    "falcon-40b": {"n_head": 4, "n_query_groups": 2, "intermediate_size": 32},
    "Falcon3-1B-Base": {"n_head": 4, "n_query_groups": 2, "head_size": 8, "intermediate_size": 32},
}


@contextmanager
def quietly() -> Iterator[Any]:
    """LitGPT's import and its conversions warn of what is no affair of ours."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import litgpt_models

        yield litgpt_models


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    summed: dict[str, torch.Tensor] = {}
    for module in adapter.modules:
        name = f"{module.target.parameter}.weight"
        summed[name] = summed.get(name, torch.zeros(())) + module.delta_weight(dtype=torch.float64)
    return summed


def assert_read_as_merged(made: Any, tmp_path: Path, *, wrapped: bool = True) -> Adapter:
    with quietly() as litgpt_models:
        model = litgpt_models.trained(made)
        folder = litgpt_models.save(model, tmp_path / "run" / "final", wrapped=wrapped)
        merged = litgpt_models.merged(model)
        expected = litgpt_models.in_hugging_face(merged, made, tmp_path / "scratch")
    if not {"lm_head.weight", "embed_out.weight"} & expected.keys():  # tied, so the conversion leaves it out
        expected["lm_head.weight"] = merged["lm_head.weight"]
    assert detect(Source(folder)) == "litgpt"
    adapter = adaptertools.read(folder)
    found = deltas(adapter)
    assert found.keys() <= expected.keys(), found.keys() - expected.keys()
    for name, weight in expected.items():
        delta = found.get(name)
        if delta is None:
            assert not weight.any(), f"LitGPT changed {name}"
            continue
        assert weight.any(), name
        assert delta.shape == weight.shape, name
        assert float((delta - weight.double()).abs().max()) <= 1e-6, name
    return adapter


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_as_litgpt_merges_and_converts_it(name: str, tmp_path: Path) -> None:
    with quietly() as litgpt_models:
        made = litgpt_models.config(name, **FAMILIES[name])
    adapter = assert_read_as_merged(made, tmp_path)
    assert adapter.bases[""].id == f"{made.hf_config['org']}/{made.hf_config['name']}"


SUBSETS = [flags for flags in itertools.product([True, False], repeat=3) if any(flags)]


@pytest.mark.parametrize("flags", SUBSETS, ids=lambda flags: "".join("T" if flag else "F" for flag in flags))
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", ["Llama-3-8B", "Phi-3-mini-4k-instruct", "falcon-40b"])
def test_every_choice_of_slots_and_groups_is_read(
    name: str, groups: int, flags: tuple[bool, ...], tmp_path: Path
) -> None:
    targets = dict(zip(("query", "key", "value"), flags, strict=True))
    with quietly() as litgpt_models:
        made = litgpt_models.config(
            name, r=3, alpha=5, targets=targets, n_head=4, n_query_groups=groups, intermediate_size=32
        )
    assert_read_as_merged(made, tmp_path, wrapped=groups != 2)


def test_litgpt_itself_merges_the_folder_that_is_read(tmp_path: Path) -> None:
    """So the folder of these tests is one that LitGPT saves."""
    with quietly() as litgpt_models:
        from litgpt.scripts.merge_lora import merge_lora

        made = litgpt_models.config("Llama-3-8B", **FAMILIES["Llama-3-8B"])
        model = litgpt_models.trained(made)
        folder = litgpt_models.save(model, tmp_path / "final")
        base = tmp_path / "base"
        base.mkdir()
        expected = litgpt_models.merged(model)
        torch.save({name: torch.zeros_like(weight) for name, weight in expected.items()}, base / "lit_model.pth")
        litgpt_models.save_base_config(made, base)
        for home in (folder, base):
            (home / "tokenizer_config.json").write_text("{}")
            (home / "tokenizer.json").write_text("{}")
        merge_lora(folder, base)
    merged = torch.load(folder / "lit_model.pth", weights_only=True)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in merged.items())
    assert len(adaptertools.read(folder).modules) == 2 * 7 + 1  # found beside the merged weights, too
