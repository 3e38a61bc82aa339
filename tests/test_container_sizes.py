"""How large a file will be is known to the byte before it is written, in every container and every format."""

import zipfile
from pathlib import Path

import container_cases as cases
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from proof import needed
from strategies import adapters
from test_formats import COMBINATIONS

import adaptertools
from adaptertools import formats
from adaptertools.adapter import Adapter, Feature
from adaptertools.containers import CONTAINERS
from adaptertools.errors import UnsupportedFeatureError


def on_disk(path: Path) -> int:
    """Every byte of a folder or of a file with what stands beside it under its name."""
    found = [path, *path.parent.glob(f"{path.name}*")] if path.is_file() else list(path.rglob("*"))
    return sum(file.stat().st_size for file in set(found) if file.is_file())


@pytest.mark.parametrize("container", CONTAINERS)
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_size_of_a_container_is_known_before(container: str, tmp_path_factory: object, data: st.DataObject) -> None:
    dtypes = cases.FLOATS if container in ("npz", "orbax", "gguf") else cases.DTYPES
    tensors = data.draw(cases.named_tensors(empty=container != "orbax", dtypes=dtypes))
    folder = tmp_path_factory.mktemp("sized")  # type: ignore[attr-defined]
    path = folder / "file"
    CONTAINERS[container].write(path, tensors, {"said": "é"}, lambda _: None)
    assert CONTAINERS[container].size(tensors, {"said": "é"}) == on_disk(path)


@pytest.mark.parametrize("container", ["npz", "torch"])
@pytest.mark.parametrize("limit", [40, 300, 2000])
def test_the_size_of_a_zip_is_known_where_it_outgrows_the_old_format(
    container: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"t{n}": torch.ones(10 * n + 1) for n in range(8)}
    plain = CONTAINERS[container].size(tensors, {})
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    CONTAINERS[container].write(tmp_path / "file", tensors, {}, lambda _: None)
    assert CONTAINERS[container].size(tensors, {}) == on_disk(tmp_path / "file") > plain


@pytest.mark.parametrize(("name", "container"), COMBINATIONS)
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_size_of_all_files_of_an_adapter_is_known_before_and_reported_after(
    name: str, container: str, data: st.DataObject, tmp_path: Path
) -> None:
    adapter = data.draw(adapters(formats.get(name).CARRIES))
    dtype = data.draw(st.sampled_from((None, "bf16")))
    drop = [feature for feature in (Feature.DORA, Feature.LORA_BIAS) if data.draw(st.booleans())]
    dst = tmp_path / "out" if formats.get(name).FOLDER else tmp_path / "out.bin"
    options = {"format": name, "container": container, "dtype": dtype, "drop": drop, **needed(name)}
    try:
        foreseen = adaptertools.stored_size(adapter, path=dst, **options)
        report = adaptertools.write(adapter, dst, overwrite=dst.exists(), **options)
    except UnsupportedFeatureError:
        assume(not adapter.features)
        raise
    assert foreseen == on_disk(dst) == report.nbytes_on_disk
    assert report.nbytes < report.nbytes_on_disk


def test_a_record_that_is_kept_of_what_is_replaced_counts(plain: Adapter, tmp_path: Path) -> None:
    dst = tmp_path / "a.pt"
    first = adaptertools.write(plain, dst, format="loralib").nbytes_on_disk
    foreseen = adaptertools.stored_size(plain, format="loralib", path=dst)
    assert adaptertools.stored_size(plain, format="loralib") == first < foreseen
    assert adaptertools.write(plain, dst, format="loralib", overwrite=True).nbytes_on_disk == foreseen == on_disk(dst)
