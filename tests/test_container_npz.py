"""npz: what numpy writes in all its ways, big-endian and Fortran order among them, and nothing that unpickles."""

import zipfile
from io import BytesIO
from pathlib import Path

import container_cases as cases
import ml_dtypes
import numpy as np
import pytest
import torch

from adaptertools import containers
from adaptertools.containers import npz
from adaptertools.errors import DamagedFileError, EmptyFileError, UnsafeFileError


def npy(array: np.ndarray, **options: bool) -> bytes:
    stream = BytesIO()
    np.lib.format.write_array(stream, array, **options)
    return stream.getvalue()


def put(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", ">f4", ">f2", ">i8", ">i2", "<u4", ">u2", "|i1", "|b1"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (0, 3), (1,)])
def test_byte_orders_memory_orders_and_compression_are_read(
    save: object, dtype: str, order: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    values = np.arange(np.prod(shape)).reshape(shape)
    array = np.asarray(values.astype(dtype), order=order)
    save(tmp_path / "x.npz", **{"layers/0/lora_a": array})  # type: ignore[operator]
    read = containers.read(tmp_path / "x.npz").tensors["layers/0/lora_a"]
    native = array.astype(array.dtype.newbyteorder("="))
    assert read.shape == shape
    assert np.array_equal(read.numpy(), native)
    assert read.numpy().dtype == native.dtype


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_bfloat16_is_two_void_bytes_in_numpy_and_bfloat16_here(save: object, tmp_path: Path) -> None:
    values = torch.tensor([[1.0, -2.5, float("inf")], [3e38, 1e-40, 0.0]]).bfloat16()
    array = cases.to_numpy(values)
    assert array.dtype == ml_dtypes.bfloat16
    save(tmp_path / "x.npz", w=array)  # type: ignore[operator]
    assert cases.same(containers.read(tmp_path / "x.npz").tensors, {"w": values})


def test_numpy_reads_bfloat16_as_two_void_bytes(tmp_path: Path) -> None:
    path = cases.write("npz", tmp_path, {"w": torch.ones(2, 3).bfloat16()})
    with np.load(path) as archive:
        assert archive["w"].dtype == np.dtype("V2")
        assert np.array_equal(archive["w"].view(ml_dtypes.bfloat16), np.ones((2, 3), ml_dtypes.bfloat16))


def test_void_bytes_of_another_size_are_not_guessed(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", w=np.zeros(3, "V1"))
    with pytest.raises(DamagedFileError, match=r"dtype \|V1 is not supported"):
        containers.read(tmp_path / "x.npz")


@pytest.mark.parametrize("dtype", ["complex64", "datetime64[s]", "longdouble"])
def test_dtypes_that_no_adapter_has_are_refused_by_name(dtype: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", w=np.zeros(3, dtype))
    with pytest.raises(DamagedFileError, match=r"x\.npz: w: dtype .* is not supported"):
        containers.read(tmp_path / "x.npz")


def test_texts_become_metadata(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", w=np.ones(2), name="gemma", kinds=np.array(["a", "b"]), swapped=np.array("é", ">U1"))
    read = containers.read(tmp_path / "x.npz")
    assert set(read.tensors) == {"w"}
    assert read.metadata == {"name": "gemma", "kinds": "['a', 'b']", "swapped": "é"}


def test_python_objects_are_refused_and_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", allow_pickle=True, w=np.ones(2), config=np.array({"rank": 4}))
    with pytest.raises(UnsafeFileError, match="config holds pickled Python objects"):
        containers.read(tmp_path / "x.npz")


def test_a_compressed_file_may_grow_a_hundredfold_and_no_further(tmp_path: Path) -> None:
    zeros = np.zeros(1 << 22, np.float32)
    np.savez_compressed(tmp_path / "small.npz", a=zeros)
    assert containers.read(tmp_path / "small.npz").tensors["a"].shape == zeros.shape  # 16 MiB are always allowed
    np.savez_compressed(tmp_path / "bomb.npz", **{f"a{n}": zeros for n in range(5)})
    with pytest.raises(UnsafeFileError, match=r"At most 100 times the size \(or 64 MiB\) is accepted"):
        containers.read(tmp_path / "bomb.npz")


def test_a_header_that_lies_about_the_size_is_damage(tmp_path: Path) -> None:
    content = npy(np.ones((2, 3)))
    for lie in (b"(2, 4)", b"(2, 2)", b"(9, 9)"):
        with pytest.raises(DamagedFileError, match=r"takes \d+ bytes with its header"):
            containers.read(put(tmp_path / "x.npz", w=content.replace(b"(2, 3)", lie)))
    with pytest.raises(DamagedFileError):
        containers.read(put(tmp_path / "x.npz", w=content.replace(b"(2, 3), ", b"(-2,-3),")))


def test_a_member_that_claims_to_expand_further_than_it_does_is_damage(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", w=np.ones(100))
    raw = bytearray((tmp_path / "x.npz").read_bytes())
    entry = raw.rindex(b"PK\x01\x02")
    raw[entry + 24 : entry + 28] = (4096).to_bytes(4, "little")
    (tmp_path / "x.npz").write_bytes(raw)
    with pytest.raises(DamagedFileError):
        containers.read(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["readme", "w"])
def test_a_member_that_is_no_array_is_damage(name: str, tmp_path: Path) -> None:
    path = put(tmp_path / "x.npz", a=npy(np.ones(2)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}{'.npy' if name == 'w' else ''}", b"text")
    with pytest.raises(DamagedFileError, match=name):
        containers.read(path)


def test_a_member_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "x.npz", w=npy(np.ones(2)))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("w.npy", npy(np.zeros(2)))
    with pytest.raises(DamagedFileError, match=r"two members are named w\.npy"):
        containers.read(path)


def test_a_structured_array_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", w=np.zeros(2, [("a", "f4"), ("b", "f4")]))
    with pytest.raises(DamagedFileError, match="is not supported"):
        containers.read(tmp_path / "x.npz")


def test_an_npz_without_arrays_is_empty(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz")
    with pytest.raises(EmptyFileError):
        containers.read(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", name="x")
    with pytest.raises(EmptyFileError, match="no numeric array"):
        containers.read(tmp_path / "y.npz")


def test_a_long_first_name_is_still_told_from_a_torch_file(tmp_path: Path) -> None:
    path = cases.write("npz", tmp_path, {"layers." * 200 + "w": torch.ones(1)})
    assert containers.identify(path) is npz
