"""A place that an adapter is read from: a file, a folder, or tensors in memory."""

import os
from pathlib import Path
from typing import Any

import container_cases as cases
import pytest
import torch

import adaptertools
from adaptertools import containers
from adaptertools.containers.source import Source
from adaptertools.errors import EmptyFileError, OptionError, SourceNotFoundError, UnknownFormatError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cases.write("safetensors", tmp_path, {"x": torch.ones(2)}, "weights")
    cases.write("orbax", tmp_path, {"y": torch.ones(3)}, "checkpoint")
    (tmp_path / "config.json").write_text('{"r": 8}')
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "other").mkdir()
    cases.write("msgpack", tmp_path / "other", {"z": torch.ones(4)}, "weights")
    return tmp_path


@pytest.mark.parametrize("given", [None, 3, ["a"]])
def test_what_is_no_path_is_an_error_of_ours(given: Any) -> None:
    for call in (adaptertools.read, Source):
        with pytest.raises(OptionError, match=r"expected a path: a string or a pathlib\.Path"):
            call(given)


def test_a_folder_offers_what_stands_in_it(folder: Path) -> None:
    source = Source(folder)
    assert source.is_folder
    assert source.file_names == ("checkpoint.orbax", "config.json", "other", "weights.safetensors")
    assert source.folders == ("checkpoint.orbax", "other")
    assert [source.container(name) for name in source.file_names] == ["orbax", None, None, "safetensors"]
    assert source.has("config.json")
    assert not source.has("absent")
    assert source.document("config.json") == {"r": 8}
    assert source.document("absent.json") is None
    assert source.tensors("weights.safetensors").tensors["x"].shape == (2,)
    assert source.tensors("weights.safetensors") is source.tensors("weights.safetensors")
    assert source.tensors("checkpoint.orbax").tensors["y"].shape == (3,)
    assert source.sub("other").tensors("weights.msgpack").tensors["z"].shape == (4,)


def test_a_file_offers_itself_and_the_documents_beside_it(folder: Path) -> None:
    source = Source(folder / "weights.safetensors")
    assert not source.is_folder
    assert source.file_names == ("weights.safetensors",)
    assert source.folders == ()
    assert source.document("config.json") == {"r": 8}


def test_an_orbax_folder_is_one_file_of_tensors(folder: Path) -> None:
    source = Source(folder / "checkpoint.orbax")
    assert not source.is_folder
    assert source.file_names == ("checkpoint.orbax",)
    assert source.container("checkpoint.orbax") == "orbax"
    assert source.document("config.json") == {"r": 8}


def test_tensors_in_memory_are_a_source_too() -> None:
    source = Source.in_memory({"x": torch.ones(2)}, {"config.json": {"r": 8}})
    assert not source.is_folder
    (name,) = source.file_names
    assert source.tensors(name).tensors["x"].tolist() == [1, 1]
    assert source.container(name) == "memory"
    assert source.document("config.json") == {"r": 8}
    assert source.document("absent.json") is None
    with pytest.raises(EmptyFileError, match="no tensor"):
        Source.in_memory({}, {})


def test_a_place_that_is_not_there_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="no such file or folder"):
        Source(tmp_path / "absent")
    with pytest.raises(SourceNotFoundError, match="cannot be read: File name too long"):
        Source(tmp_path / ("x" * 300))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SourceNotFoundError):
        Source(tmp_path / "loop")


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cases.write("safetensors", tmp_path, {"x": torch.ones(2)})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SourceNotFoundError, match="cannot be read: Permission denied"):
        containers.read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_file_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnknownFormatError, match="not a tensor file"):
        containers.read(tmp_path / "pipe")
    assert Source(tmp_path).container("pipe") is None
