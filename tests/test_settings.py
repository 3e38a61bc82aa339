"""What training said beyond the factors: in the file that is written, or named in a note. Nothing vanishes between."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from proof import needed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stack_cases import module

import adaptertools
from adaptertools import formats
from adaptertools.adapter import Adapter
from adaptertools.errors import AdapterToolsError, count

FIXTURES = Path(__file__).parents[1] / "fixtures"
Run = Callable[..., Any]

MLX = {
    "model": "org/tiny",
    "fine_tune_type": "lora",
    "num_layers": 8,
    "lora_parameters": {"rank": 3, "scale": 20.0, "dropout": 0.05},
    "data": "prose",
    "iters": 600,
    "learning_rate": 1e-5,
    "seed": 7,
}
LORA_CONFIG = {"unet.r": 2, "unet.lora_alpha": 2, "unet.lora_dropout": 0.25, "unet.task_type": "STYLE"}
WRITTEN = [name for name in formats.names() if formats.get(name).CONTAINERS]


def factors(pattern: str, *parts: str, swap: bool = False) -> dict[str, torch.Tensor]:
    one = module("x", rank=2 if "lora_" in parts[0] else 3)
    pair = (one.lora_A.T, one.lora_B.T) if swap else (one.lora_A, one.lora_B)
    return {pattern.format(part): tensor.contiguous() for part, tensor in zip(parts, pair, strict=True)}


def mlx(folder: Path) -> Path:
    folder.mkdir()
    save_file(factors("model.layers.0.self_attn.q_proj.{}", "a", "b", swap=True), folder / "x")
    named = {key.replace(".a", ".lora_a").replace(".b", ".lora_b"): t for key, t in load_file(folder / "x").items()}
    (folder / "x").unlink()
    save_file(named, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(MLX))
    return folder


def kohya(folder: Path) -> Path:
    folder.mkdir()
    tensors = factors("lora_unet_a.{}.weight", "lora_down", "lora_up") | {"lora_unet_a.alpha": torch.tensor(2.0)}
    save_file(tensors, folder / "a.safetensors", {"ss_learning_rate": "1e-4", "modelspec.title": "a"})
    return folder / "a.safetensors"


def diffusers(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "pytorch_lora_weights.safetensors"
    said = {"lora_adapter_metadata": json.dumps(LORA_CONFIG), "author": "me", "format": "pt"}
    save_file(factors("unet.down.to_q.{}.weight", "lora_A", "lora_B"), path, said)
    return path


def peft(folder: Path) -> Path:
    folder.mkdir()
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "task_type": "CAUSAL_LM"}
    further = {"lora_dropout": 0.125, "auto_mapping": {"base_model_class": "Net", "parent_library": "net"}}
    save_file(factors("base_model.model.q.{}.weight", "lora_A", "lora_B"), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**said, **further}))
    return folder


def litgpt(folder: Path) -> Path:
    return FIXTURES / "litgpt" / "llama_all" / "final"


SOURCES = {"mlx": mlx, "kohya": kohya, "diffusers": diffusers, "peft": peft, "litgpt": litgpt}
SAID: dict[str, tuple[str, ...]] = {
    "mlx": ("data", "iters", "learning_rate", "seed", "dropout"),
    "kohya": ("ss_learning_rate", "modelspec.title"),
    "diffusers": ("unet.lora_dropout", "unet.task_type", "author"),
    "peft": ("lora_dropout", "task_type", "auto_mapping"),
    "litgpt": ("lora_dropout", "checkpoint_dir", "train"),
}


def named_as_modules(adapter: Adapter) -> Adapter:
    """The adapter without a component and opaque names, so that every format takes it."""
    bare = {"component": "", "opaque": False}
    return adapter.map_modules(lambda m: replace(m, target=replace(m.target, **bare)))


def stored_words(path: Path) -> str:
    """All JSON and header strings of the files that were written."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    files += [file for file in (path.with_name(path.name + ".adaptertools.json"),) if file.is_file()]
    return "\n".join(words for file in files for words in _words(file)).replace("\\", "")


def _words(file: Path) -> Iterator[str]:
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            yield json.dumps(opened.metadata())
    elif file.suffix == ".json":
        yield file.read_text()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("to", [name for name in WRITTEN if name not in ("gguf", "flax-gemma", "flax-qwix")])
def test_what_a_file_says_is_in_the_one_that_is_written_or_named(source: str, to: str, tmp_path: Path) -> None:
    adapter = named_as_modules(adaptertools.read(SOURCES[source](tmp_path / "source")))
    suffix = {"loralib": ".pt", "flax": ".safetensors"}.get(to, "" if formats.get(to).FOLDER else ".safetensors")
    path = tmp_path / f"out{suffix}"
    report = adaptertools.write(adapter, path, format=to, **needed(to))
    kept, notes = stored_words(path), "\n".join((*report.notes, *adapter.notes))
    assert [word for word in SAID[source] if f'"{word}"' not in kept and word not in notes] == []


@pytest.mark.parametrize("source", ["mlx", "kohya", "peft"])
@pytest.mark.parametrize("through", ["peft", "mlx", "kohya", "diffusers", "flax"])
def test_it_comes_back_through_another_format(source: str, through: str, tmp_path: Path) -> None:
    adapter = named_as_modules(adaptertools.read(SOURCES[source](tmp_path / "source")))
    between, back = tmp_path / f"between{'' if formats.get(through).FOLDER else '.safetensors'}", tmp_path / "back"
    adaptertools.write(adapter, between, format=through)
    again = adaptertools.read(between)
    if source != through:
        one, other = ({key: said for key, said in a.metadata[source].items() if said} for a in (adapter, again))
        assert other == one
    if source != "kohya":
        adaptertools.write(again, back, format=source)
        config = json.loads((back / "adapter_config.json").read_text())
        assert {key: config.get(key) for key in SAID[source] if key != "dropout"} == {
            key: json.loads((tmp_path / "source" / "adapter_config.json").read_text())[key]
            for key in SAID[source]
            if key != "dropout"
        }


def test_the_dropout_of_a_training_has_a_place_of_its_own(tmp_path: Path) -> None:
    adaptertools.convert(mlx(tmp_path / "mlx"), tmp_path / "peft", to="peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["lora_dropout"] == 0.05
    adaptertools.convert(peft(tmp_path / "other"), tmp_path / "back", to="mlx")
    stated = json.loads((tmp_path / "back" / "adapter_config.json").read_text())["lora_parameters"]
    assert stated["dropout"] == 0.125


def test_further_fields_of_a_lora_config_stay_in_the_metadata_or_are_named(tmp_path: Path) -> None:
    path = diffusers(tmp_path / "source")
    kept = adaptertools.convert(path, tmp_path / "kept.safetensors", to="diffusers", scale="metadata")
    assert not [note for note in kept.notes if "not carried" in note]
    with safe_open(tmp_path / "kept.safetensors", "pt") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (fields["unet.lora_dropout"], fields["unet.task_type"]) == (0.25, "STYLE")
    folded = adaptertools.convert(path, tmp_path / "folded.safetensors", to="diffusers")
    named = "metadata of diffusers not carried: 2 entries (unet.lora_dropout, unet.task_type)"
    assert named in folded.notes


@pytest.mark.parametrize(
    ("entry", "word"),
    [({"eva_config": {"rho": 2.0}}, "eva_config"), ({"init_lora_weights": "orthogonal"}, "init_lora_weights")],
)
def test_what_counted_for_training_alone_is_named(entry: dict[str, Any], word: str, tmp_path: Path) -> None:
    path = peft(tmp_path / "peft")
    config = path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **entry}))
    (note,) = adaptertools.read(path).notes
    assert note.endswith(f"{word} counted for training alone and are not kept")


@pytest.mark.parametrize("home", ["loralib", "flax", "mlx", "peft"])
def test_header_entries_that_a_format_does_not_know_are_named(home: str, tmp_path: Path) -> None:
    one = Adapter(modules=(module("model.layers.0.self_attn.q_proj"),))
    path = tmp_path / ("out" if formats.get(home).FOLDER else "out.safetensors")
    adaptertools.write(one, path, format=home, **({"container": "safetensors"} if home in ("loralib", "flax") else {}))
    file = next(path.glob("*.safetensors")) if path.is_dir() else path
    with safe_open(file, "pt") as opened:
        header = opened.metadata() or {}
    save_file(load_file(file), file, {**header, "author": "me"})
    (note,) = [note for note in adaptertools.read(path).notes if "header entries" in note]
    assert note.endswith("not carried: author")


def test_a_record_of_other_formats_that_is_malformed_is_an_error(tmp_path: Path) -> None:
    path = peft(tmp_path / "peft") / "adapter_model.safetensors"
    save_file(load_file(path), path, {"adaptertools": json.dumps({"metadata": ["no", "object"]})})
    with pytest.raises(AdapterToolsError, match="what other formats say"):
        adaptertools.read(path)


def test_numbers_and_nouns_agree() -> None:
    assert [count(n, "module") for n in (0, 1, 2, 1234)] == ["0 modules", "1 module", "2 modules", "1,234 modules"]
    assert [count(n, "module", ("has", "have")) for n in (1, 2)] == ["1 module has", "2 modules have"]


def test_what_torchtune_says_of_the_training_is_kept_in_the_words_of_peft(tmp_path: Path) -> None:
    home = tmp_path / "epoch_0"
    home.mkdir()
    for file in (FIXTURES / "torchtune" / "llama" / "epoch_0").iterdir():
        (home / file.name).write_bytes(file.read_bytes())
    config = home / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_dropout": 0.5, "task_type": "CAUSAL_LM"}))
    adaptertools.convert(home, tmp_path / "peft", to="peft")
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (written["lora_dropout"], written["task_type"]) == (0.5, "CAUSAL_LM")


def test_arguments_of_litgpt_that_json_cannot_say_are_named(tmp_path: Path) -> None:
    for file in (FIXTURES / "litgpt" / "llama_all" / "final").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "hyperparameters.yaml").open("a") as run:
        run.write("started: 2026-01-02\n")
    adapter = adaptertools.read(tmp_path)
    assert any("started cannot be kept" in note for note in adapter.notes)
    assert adapter.metadata["litgpt"]["train"] == {"epochs": 1}
