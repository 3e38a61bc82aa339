"""Torch files: every hostile or damaged one is refused by name, and what is written loads in torch both ways."""

import os
import pickle
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import container_cases as cases
import pytest
import torch

from adaptertools import containers
from adaptertools.errors import (
    AdapterToolsError,
    DamagedFileError,
    EmptyFileError,
    UnsafeFileError,
    UnsupportedFeatureError,
)
from adaptertools.tensors import Deferred


class RunsCode:
    """Would create the file `path` when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A state dict as torch.save writes it."""
    path = tmp_path / "saved.bin"
    torch.save({"a.lora_A": torch.arange(10.0), "a.lora_B": torch.arange(6.0).view(2, 3)}, path)
    return path


def save(path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_a_wrapped_state_dict_joins_its_keys_and_keeps_what_is_no_tensor(zipped: bool, tmp_path: Path) -> None:
    content = {
        "model_state_dict": OrderedDict({"layers.0.lora_A": torch.ones(2, 3), "b": torch.nn.Parameter(torch.zeros(2))}),
        "epoch": 3,
        "lr": 0.1,
        "name": "run",
        "none": None,
        "optimizer": {"state": {0: {"mu": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]},
    }
    read = containers.read(save(tmp_path / "x.bin", content, _use_new_zipfile_serialization=zipped))
    assert set(read.tensors) == {"model_state_dict/layers.0.lora_A", "model_state_dict/b", "optimizer/state/0/mu"}
    assert not any(tensor.requires_grad for tensor in read.tensors.values())
    assert read.metadata == {
        "epoch": "3",
        "lr": "0.1",
        "name": "run",
        "none": "None",
        "optimizer/param_groups/0/lr": "0.0001",
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_shared_storages_views_and_strides_are_read(zipped: bool, tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    content = {"a": whole[:6], "b": whole[6:].view(2, 3), "c": whole, "t": whole.view(3, 4).t(), "same": whole}
    read = containers.read(save(tmp_path / "x.bin", content, _use_new_zipfile_serialization=zipped))
    assert cases.same(read.tensors, content)


@pytest.mark.parametrize("mapped", [True, False])
def test_torch_loads_what_is_written_mapped_or_not(mapped: bool, tmp_path: Path) -> None:
    tensors = {
        f"layers.{n}.x": cases.random_tensor((n, 3), dtype) for n, dtype in enumerate(cases.DTYPES + cases.FLOAT8)
    }
    path = cases.write("torch", tmp_path, tensors)
    loaded = torch.load(path, weights_only=True, mmap=mapped)
    assert isinstance(loaded, OrderedDict)
    assert list(loaded) == list(tensors)
    assert cases.same(loaded, tensors)


def test_a_module_loads_the_written_state_dict(tmp_path: Path) -> None:
    module, other = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    path = cases.write("torch", tmp_path, module.state_dict())
    other.load_state_dict(torch.load(path))
    assert torch.equal(other.weight, module.weight)


@pytest.mark.skipif(not shutil.which("unzip"), reason="needs the unzip command")
def test_unzip_finds_no_fault_in_what_is_written(tmp_path: Path) -> None:
    path = cases.write("torch", tmp_path, {f"t{n}": torch.randn(n, 7) for n in range(20)})
    ran = subprocess.run(["unzip", "-t", path], capture_output=True, text=True, check=True)
    assert "No errors detected" in ran.stdout


def test_the_storages_of_a_written_file_are_aligned_and_its_checksums_right(tmp_path: Path) -> None:
    path = cases.write("torch", tmp_path, {f"t{n}": torch.randn(n, 7) for n in range(20)})
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = [info.filename for info in archive.infolist()]
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"
    assert names[:3] == ["archive/data.pkl", "archive/byteorder", "archive/version"]
    raw = path.read_bytes()
    for name in names:
        stop = raw.index(name.encode()) + len(name)
        start = stop + int.from_bytes(raw[stop - len(name) - 2 : stop - len(name)], "little")
        assert start % 64 == 0


@pytest.mark.slow
def test_a_tensor_beyond_four_gigabytes_needs_zip64_and_loads(tmp_path: Path) -> None:
    size = (1 << 32) + 5
    big = Deferred(shape=(size,), dtype=torch.uint8, compute=lambda: torch.ones(size, dtype=torch.uint8))
    path = cases.write("torch", tmp_path, {"big": big, "after": torch.arange(3)})
    try:
        for tensors in (containers.read(path).tensors, torch.load(path, weights_only=True, mmap=True)):
            assert tensors["big"].shape == big.shape
            assert int(tensors["big"][-1]) == 1
            assert tensors["after"].tolist() == [0, 1, 2]
    finally:
        path.unlink()


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(options: dict[str, Any], tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = save(tmp_path / "x.bin", {"w": torch.ones(1), "x": RunsCode(mark)}, **options)
    with pytest.raises(UnsafeFileError, match=r"wants to call (posix|os|nt)\.mkdir.*sandbox"):
        containers.read(path)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_bare_pickle_that_wants_to_run_code_is_refused(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps({"x": RunsCode(mark)}, protocol=protocol))
    with pytest.raises(UnsafeFileError, match=r"wants to call \w+\.mkdir"):
        containers.read(path)
    assert not mark.exists()


def test_a_bare_pickle_without_code_is_no_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps({"x": [1, 2]}))
    with pytest.raises(DamagedFileError, match=r"other means than torch\.save"):
        containers.read(path)


def test_a_whole_module_is_refused_with_its_class(tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError, match=r"torch\.nn\.modules\.linear\.Linear"):
        containers.read(save(tmp_path / "x.bin", torch.nn.Linear(2, 2)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    with pytest.raises(UnsafeFileError, match="TorchScript"):
        containers.read(path)


def test_a_tar_as_early_torch_wrote_is_refused_by_name(tmp_path: Path, saved: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(saved, "pickle")
    with pytest.raises(UnsafeFileError, match=r"a tar file as torch wrote before 0\.1\.10"):
        containers.read(tmp_path / "x.tar")


def test_a_compressed_zip_is_refused_before_it_expands(tmp_path: Path, saved: Path) -> None:
    path = cases.rewrite_zip(saved, tmp_path / "x.bin", lambda _, data: data, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsafeFileError, match=r"compressed.*zip -0"):
        containers.read(path)


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "big.bin", {"w": torch.zeros(1 << 25)})
    bomb = cases.rewrite_zip(path, tmp_path / "x.bin", lambda _, data: data, compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 18
    with pytest.raises(UnsafeFileError, match="claim to expand to"):
        containers.read(bomb)


def test_members_that_overlap_are_refused(tmp_path: Path, saved: Path) -> None:
    raw = bytearray(saved.read_bytes())
    directory = raw.rindex(b"PK\x05\x06")
    first = int.from_bytes(raw[directory + 16 : directory + 20], "little")
    entries = [at for at in range(first, directory) if raw[at : at + 4] == b"PK\x01\x02"]
    for at in entries:  # every member claims most of the file
        raw[at + 20 : at + 28] = struct.pack("<II", 700, 700)
    path = tmp_path / "x.bin"
    path.write_bytes(raw)
    with pytest.raises(AdapterToolsError):
        containers.read(path)


def test_a_member_that_stands_twice_is_refused(tmp_path: Path, saved: Path) -> None:
    path = cases.rewrite_zip(saved, tmp_path / "x.bin", lambda _, data: data)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("saved/data/0", bytes(40))
    with pytest.raises(DamagedFileError, match=r"two members are named saved/data/0"):
        containers.read(path)


def test_an_encrypted_member_is_refused(tmp_path: Path, saved: Path) -> None:
    raw = bytearray(saved.read_bytes())
    entry = raw.index(b"PK\x01\x02")
    raw[entry + 8] |= 1
    path = tmp_path / "x.bin"
    path.write_bytes(raw)
    with pytest.raises(UnsafeFileError, match="encrypted"):
        containers.read(path)


def edit_pickle(saved: Path, old: bytes, new: bytes) -> Path:
    """The saved file with bytes of its pickle replaced."""

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        assert data.count(old) == 1
        return data.replace(old, new)

    return cases.rewrite_zip(saved, saved.with_name("edited.bin"), change)


STORAGE_OF_TEN = b"cpuq\x06K\ntq"
SHAPE_OF_TEN = b"QK\x00K\n\x85"


@pytest.mark.parametrize("size", [1, 9, 11, 12, 1000, 1 << 30])
def test_a_pickle_that_lies_about_a_storage_is_damaged(size: int, saved: Path) -> None:
    lie = b"cpuq\x06J" + struct.pack("<i", size) + b"tq"
    with pytest.raises(DamagedFileError):
        containers.read(edit_pickle(saved, STORAGE_OF_TEN, lie))


def test_a_pickle_that_names_the_wrong_storage_is_damaged(saved: Path) -> None:
    with pytest.raises(DamagedFileError, match="not those of the data beside it"):
        containers.read(edit_pickle(saved, b"X\x01\x00\x00\x000q\x05", b"X\x01\x00\x00\x001q\x05"))


def test_a_shape_beyond_its_storage_is_damaged(saved: Path) -> None:
    lie = b"QK\x00J" + struct.pack("<i", 1 << 30) + b"\x85"
    with pytest.raises(DamagedFileError):
        containers.read(edit_pickle(saved, SHAPE_OF_TEN, lie))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_that_repeats_one_number_beyond_the_file_is_refused(zipped: bool, tmp_path: Path) -> None:
    content = {"w": torch.zeros(1).expand(1 << 40)}
    path = save(tmp_path / "x.bin", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeFileError, match=r"w claims shape \(1099511627776,\)"):
        containers.read(path)


@pytest.mark.parametrize(
    "content",
    [
        {"w": torch.eye(3).to_sparse()},
        {"w": torch.empty(3, device="meta")},
    ],
)
def test_tensors_that_are_not_dense_are_refused(content: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="expected a dense tensor"):
        containers.read(save(tmp_path / "x.bin", content))


def test_endless_nesting_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {"w": torch.ones(1)}
    content["self"] = content
    with pytest.raises(UnsafeFileError, match="nested deeper than 64"):
        containers.read(save(tmp_path / "x.bin", content))


def test_a_structure_that_doubles_at_every_level_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(40):
        content = {"a": content, "b": content}
    with pytest.raises(UnsafeFileError, match="more than the 1000000"):
        containers.read(save(tmp_path / "x.bin", content))


def test_two_tensors_that_get_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match="two values are named a/b"):
        containers.read(save(tmp_path / "x.bin", {"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}))


@pytest.mark.parametrize(
    ("content", "error"), [({}, EmptyFileError), ({"epoch": 3}, EmptyFileError), ([torch.ones(2)], DamagedFileError)]
)
def test_a_file_without_named_tensors_is_refused(content: object, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error, match=r"no tensor|expected a dict"):
        containers.read(save(tmp_path / "x.bin", content))


def test_a_zip_of_other_things_is_no_torch_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(DamagedFileError, match=r"expected a zip file with one data\.pkl"):
        containers.read(tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "y.zip", "w"):
        pass
    with pytest.raises(EmptyFileError, match="without any member"):
        containers.read(tmp_path / "y.zip")
