"""One harness for every format in the folder: write, read back, compare; nothing is listed by name."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proof import assert_diff_proves, needed, proven
from safetensors.torch import save_file
from strategies import adapters

import adaptertools
from adaptertools import formats
from adaptertools.adapter import Adapter, Feature, LoraModule
from adaptertools.api import WriteReport
from adaptertools.containers.source import Source
from adaptertools.errors import DestinationExistsError, OptionError, UnknownFormatError, UnsupportedFeatureError

WRITABLE = [name for name in formats.names() if formats.get(name).CONTAINERS]
PAIRS = list(itertools.permutations(WRITABLE, 2))
COMBINATIONS = [(name, container) for name in WRITABLE for container in formats.get(name).CONTAINERS]


def by_target(adapter: Adapter) -> dict[str, LoraModule]:
    """Modules by parameter; the slots of a fused projection count as the one parameter that they change together."""
    return {str(module.target): module for module in adapter.modules}


def delta_weights(adapter: Adapter) -> dict[str, torch.Tensor]:
    """ΔW of every parameter in float64, in the (out, in) orientation that formats without a transposition state."""
    deltas: dict[str, torch.Tensor] = {}
    for module in adapter.modules:
        plain = module.lora_B.double() @ module.lora_A.double() * module.scaling
        if module.target.rows:
            whole = plain.new_zeros(module.target.rows.total, module.in_features)
            whole[module.target.rows.start : module.target.rows.stop] = plain
            plain = whole
        name = module.target.parameter
        plain = plain.reshape(module.shape) if module.shape else plain
        deltas[name] = deltas[name] + plain if name in deltas else plain
    return deltas


def assert_same_meaning(before: Adapter, after: Adapter, report: WriteReport) -> None:
    """ΔW, bias, magnitude and stored weights agree: exactly where exactness was reported, else within the error."""
    allowed = report.max_relative_error
    one, other = delta_weights(before), delta_weights(after)
    assert one.keys() == other.keys()
    scales = dict.fromkeys(one, 0.0)
    for module in before.modules:
        product = module.lora_B.double().abs() @ module.lora_A.double().abs() * abs(module.scaling)
        scales[module.target.parameter] = max(scales[module.target.parameter], float(product.max()))
    for name, delta in one.items():
        error = float((delta - other[name]).abs().max())
        assert error <= (allowed + 1e-15) * 2 * scales[name] + 1e-300, f"{name}: {error} beyond {allowed}"
    for name, weight in before.full_weights.items():
        assert torch.equal(weight.weight, after.full_weights[name].weight), name
    assert before.full_weights.keys() == after.full_weights.keys()
    assert before.row_weights.keys() == after.row_weights.keys()
    for name, rows in before.row_weights.items():
        assert rows.indices == after.row_weights[name].indices
        assert torch.equal(rows.rows, after.row_weights[name].rows)
    magnitudes = {str(m.target): m.magnitude for m in before.modules if m.magnitude is not None}
    for module in after.modules:
        if module.magnitude is not None:
            assert torch.equal(module.magnitude, magnitudes[str(module.target)])
        if module.lora_bias is not None and str(module.target) in by_target(before):
            original = by_target(before)[str(module.target)]
            expected = original.lora_bias.double() * original.scaling
            assert torch.allclose(module.lora_bias.double() * module.scaling, expected, rtol=2 * allowed + 1e-15)
    assert sum(m.magnitude is not None for m in after.modules) == len(magnitudes)
    assert after.bases.get("", before.bases[""]).change == before.bases[""].change
    assert after.bases.get("", before.bases[""]).layer_replication == before.bases[""].layer_replication
    assert after.invocation_tokens == before.invocation_tokens


@pytest.mark.parametrize(("name", "container"), COMBINATIONS)
@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_a_format_writes_it_reads_back(name: str, container: str, data: st.DataObject, tmp_path: Path) -> None:
    adapter = data.draw(adapters(formats.get(name).CARRIES))
    snapshot = {key: tensor.clone() for key, tensor in adapter.named_tensors.items()}
    dst = tmp_path / "out" if formats.get(name).FOLDER else tmp_path / "out.bin"
    try:
        report = adaptertools.write(
            adapter, dst, format=name, container=container, overwrite=dst.exists(), **needed(name)
        )
    except UnsupportedFeatureError:
        if adapter.features:  # some combinations, and PEFT's convolutions in loralib; never plain linear modules
            return
        raise
    assert formats.detect(Source(dst)) == name
    again = adaptertools.read(dst)
    assert_same_meaning(adapter, again, report)
    assert_diff_proves(adapter, again, report)
    for key, tensor in adapter.named_tensors.items():
        assert torch.equal(tensor, snapshot[key]), f"writing changed {key}"


@pytest.mark.parametrize(("one", "other"), PAIRS)
@given(data=st.data())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_adapter_is_the_same_in_every_two_formats_that_carry_it(
    one: str, other: str, data: st.DataObject, tmp_path: Path
) -> None:
    carried = formats.get(one).CARRIES & formats.get(other).CARRIES
    adapter = data.draw(adapters(carried))
    paths = [tmp_path / name if formats.get(name).FOLDER else tmp_path / f"{name}.bin" for name in (one, other)]
    try:
        first = adaptertools.write(adapter, paths[0], format=one, overwrite=paths[0].exists(), **needed(one))
        second = adaptertools.convert(paths[0], paths[1], to=other, overwrite=paths[1].exists(), **needed(other))
    except UnsupportedFeatureError:
        if adapter.features:
            return
        raise
    between, after = (adaptertools.read(path) for path in paths)
    assert_diff_proves(adapter, after, first, second)
    assert_diff_proves(between, after, second)


def test_a_conversion_that_changes_the_adapter_is_caught(plain: Adapter, tmp_path: Path) -> None:
    """The fixture `every_conversion_is_proven` would notice."""
    strength = 1.0

    def convert(src: Path, dst: Path, *, to: str) -> WriteReport:
        stronger = adaptertools.read(src).map_modules(lambda module: replace(module, alpha=module.alpha * strength))
        return adaptertools.write(stronger, dst, format=to, overwrite=True)

    src = adaptertools.write(plain, tmp_path / "src", format="peft").path
    proven(convert)(src, tmp_path / "dst", to="loralib")
    strength = 1 + 2.0**-40
    with pytest.raises(AssertionError):
        proven(convert)(src, tmp_path / "dst", to="loralib")


@pytest.mark.parametrize("name", WRITABLE)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_tensors_in_memory_say_the_same_as_a_file(name: str, data: st.DataObject) -> None:
    adapter = data.draw(adapters())
    tensors, config = adapter.to_state_dict(format=name, **needed(name))
    again = adaptertools.from_state_dict(tensors, config, format=name)
    one, other = delta_weights(adapter), delta_weights(again)
    assert one.keys() == other.keys()
    for key, delta in one.items():
        assert torch.allclose(delta, other[key], rtol=1e-2, atol=1e-2 * float(delta.abs().max()))


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("feature", list(Feature))
def test_a_writer_refuses_by_name_what_it_cannot_carry(name: str, feature: Feature, tmp_path: Path) -> None:
    if feature in formats.get(name).CARRIES:
        return
    adapter = sample(feature)
    with pytest.raises(UnsupportedFeatureError, match=feature.value):
        adaptertools.write(adapter, tmp_path / "out", format=name)
    assert not (tmp_path / "out").exists()
    if feature is not Feature.PARAMETER:
        drop = [feature.value, *other_drops(adapter, name)]
        adaptertools.write(adapter, tmp_path / "out", format=name, drop=drop, **needed(name))
        assert (tmp_path / "out").exists()


def other_drops(adapter: Adapter, name: str) -> list[str]:
    return sorted(adapter.features - formats.get(name).CARRIES)


@settings(max_examples=1, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def _draw(found: list[Adapter], feature: Feature, data: st.DataObject) -> None:
    adapter = data.draw(adapters({feature}).filter(lambda adapter: feature in adapter.features))
    found.append(adapter)


def sample(feature: Feature) -> Adapter:
    """Some adapter that holds the feature."""
    found: list[Adapter] = []
    _draw(found, feature)
    return found[-1]


def test_overwriting_a_folder_leaves_what_belongs_to_other_adapters(tmp_path: Path) -> None:
    adapter = sample(Feature.LORA_BIAS).without(Feature.LORA_BIAS)
    adaptertools.write(adapter, tmp_path / "peft", format="peft")
    adaptertools.write(adapter, tmp_path / "peft" / "other.bin", format="loralib")
    adaptertools.write(adapter, tmp_path / "peft", format="peft", overwrite=True)
    assert adaptertools.read(tmp_path / "peft" / "other.bin").modules


def test_a_folder_of_adapters_is_no_adapter_to_overwrite(tmp_path: Path) -> None:
    adapter = sample(Feature.LORA_BIAS).without(Feature.LORA_BIAS)
    adaptertools.write(adapter, tmp_path / "many" / "one", format="peft")
    with pytest.raises(DestinationExistsError, match="no file of an adapter"):
        adaptertools.write(adapter, tmp_path / "many", format="peft", overwrite=True)
    assert [entry.name for entry in (tmp_path / "many").iterdir()] == ["one"]


@pytest.mark.parametrize("name", [".", ".."])
def test_the_current_folder_is_never_swapped(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = sample(Feature.LORA_BIAS).without(Feature.LORA_BIAS)
    adaptertools.write(adapter, tmp_path / "here" / "below", format="peft")
    monkeypatch.chdir(tmp_path / "here" / "below")
    with pytest.raises(DestinationExistsError, match="the current folder"):
        adaptertools.write(adapter, name, format="peft", overwrite=True)


@pytest.mark.parametrize("format", ["peft", "loralib"])
@pytest.mark.parametrize("target", ["gone", "link"], ids=["nothing", "itself"])
@pytest.mark.parametrize("below", ["", "below"])
def test_a_link_that_leads_nowhere_is_told(
    format: str, target: str, below: str, peft_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(DestinationExistsError, match=rf"is a link to {target}, which leads nowhere: remove the link"):
        adaptertools.write(adaptertools.read(peft_folder), tmp_path / "link" / below, format=format, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != peft_folder.name] == ["link"]


def test_a_whole_model_in_the_place_of_an_adapter_is_called_that(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(
        UnknownFormatError, match=r"a whole model, it seems \(.*model\.norm\.weight\), and an adapter is"
    ):
        adaptertools.read(tmp_path)


@pytest.mark.parametrize("command", ["rescale", "truncate", "convert", "stack"])
def test_a_folder_inside_the_one_that_it_is_made_from_is_refused(command: str, peft_folder: Path, run: Any) -> None:
    options = {"rescale": ("--alpha", "8"), "truncate": ("--rank", "2"), "convert": ("--to", "flax-qwix"), "stack": ()}
    sources = [peft_folder] * (2 if command == "stack" else 1)
    ran = run(command, *sources, peft_folder / "below" / "sub", *options[command])
    assert ran.code == 1
    assert f"sub lies inside {peft_folder}, the adapter that it is made from" in ran.err
    assert not (peft_folder / "below").exists()
    beside = run(command, *sources, peft_folder.with_name("beside"), *options[command])
    assert beside.code == 0


def test_a_folder_beside_others_of_the_same_parent_is_no_folder_inside(plain: Adapter, tmp_path: Path) -> None:
    adaptertools.write(plain, tmp_path / "many" / "one", format="peft")
    only = adaptertools.read(tmp_path / "many")
    assert adaptertools.write(only, tmp_path / "many" / "two", format="peft").modules == len(plain.modules)


def test_what_stands_beside_an_adapter_and_is_not_carried_along_is_named(
    peft_folder: Path, tmp_path: Path, run: Any
) -> None:
    assert run("rescale", peft_folder, tmp_path / "bare", "--alpha", "8", "--json").json["notes"] == []
    for name in ("README.md", "a.txt", "tokenizer.json", "vocab.json", ".gitattributes"):
        (peft_folder / name).write_text("{}")
    (peft_folder / "checkpoint-5").mkdir()
    note = f"not carried along from {peft_folder}: README.md, a.txt, tokenizer.json and 2 more"
    for command, *options in (("rescale", "--alpha", "8"), ("truncate", "--rank", "2"), ("convert", "--to", "peft")):
        ran = run(command, peft_folder, tmp_path / command, *options, "--json")
        assert ran.json["notes"] == [note]
    assert note in run("convert", peft_folder, tmp_path / "x.pt", "--to", "loralib", "--json").json["notes"]
    ran = run("rescale", peft_folder, peft_folder, "--alpha", "8", "--overwrite", "--json")
    assert ran.json["notes"] == []
    assert (peft_folder / "README.md").read_text() == "{}"


def test_an_empty_path_is_wrong_usage(peft_folder: Path, tmp_path: Path, run: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(peft_folder)
    dst = tmp_path / "new"
    for arguments in (
        ("inspect", ""),
        ("convert", "", dst, "--to", "peft"),
        ("convert", ".", "", "--to", "peft"),
        ("convert", ".", dst, "--to", "peft", "--base", ""),
        ("rescale", "", dst, "--alpha", "8"),
        ("rescale", ".", "", "--alpha", "8"),
        ("truncate", "", dst, "--rank", "2"),
        ("truncate", ".", "", "--rank", "2"),
        ("stack", ".", "", dst),
        ("stack", ".", ".", ""),
        ("diff", ".", ""),
        ("estimate", "", "--rank", "8"),
    ):
        ran = run(*arguments)
        assert (ran.code, "empty" in ran.err) == (2, True), arguments
        assert not dst.exists()
    with pytest.raises(OptionError, match="an empty path"):
        adaptertools.read("")
    with pytest.raises(OptionError, match="an empty path"):
        adaptertools.write(sample(Feature.LORA_BIAS), "", format="peft")


def test_the_name_of_a_file_chooses_its_container(tmp_path: Path) -> None:
    adapter = sample(Feature.LORA_BIAS).without(Feature.LORA_BIAS)
    report = adaptertools.write(adapter, tmp_path / "lora.safetensors", format="loralib")
    assert report.container == "safetensors"


def test_what_was_not_there_is_not_said_to_be_dropped(tmp_path: Path) -> None:
    adapter = sample(Feature.LORA_BIAS).without(Feature.LORA_BIAS)
    report = adaptertools.write(adapter, tmp_path / "out", format="peft", drop=["dora"])
    assert report.dropped == ()
    assert "nothing to drop: the adapter holds no dora" in report.notes
    assert not adaptertools.read(tmp_path / "out").history


def test_tensors_in_memory_must_be_tensors() -> None:
    with pytest.raises(OptionError, match="expected a torch"):
        adaptertools.from_state_dict({"a": [1.0]}, {"peft_type": "LORA"}, format="peft")  # type: ignore[dict-item]
