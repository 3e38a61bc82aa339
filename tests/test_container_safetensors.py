"""safetensors: every way a header can be wrong is a named error; what MLX does differently is read."""

import json
from pathlib import Path
from typing import Any

import container_cases as cases
import pytest
import safetensors
import torch

from adaptertools import containers
from adaptertools.errors import DamagedFileError, EmptyFileError, UnsafeFileError, UnsupportedFeatureError


def put(folder: Path, header: object, data: bytes = bytes(8), pad: int = 0) -> Path:
    path = folder / "x.safetensors"
    text = (header if isinstance(header, str) else json.dumps(header)).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_metadata_is_kept_and_written_first(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    containers.get("safetensors").write(path, {"x": torch.ones(2)}, {"format": "pt", "note": "é"}, lambda _: None)
    assert containers.read(path).metadata == {"format": "pt", "note": "é"}
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}


def test_what_mlx_writes_is_read(tmp_path: Path) -> None:
    """A null `__metadata__`, a header out of offset order, data that is not aligned."""
    header = {"__metadata__": None, "b": entry(offsets=(8, 16)), "a": entry()}
    values = torch.arange(4.0)
    for pad in range(9):
        read = containers.read(put(tmp_path, header, values.numpy().tobytes(), pad))
        assert read.metadata == {}
        assert read.tensors["a"].tolist() == [0, 1]
        assert read.tensors["b"].tolist() == [2, 3]


@pytest.mark.parametrize("dtype", cases.FLOATS)
@pytest.mark.parametrize("shift", [1, 3, 6])
def test_unaligned_tensors_compute_like_aligned_ones(dtype: torch.dtype, shift: int, tmp_path: Path) -> None:
    """They are views of the file at any byte, and torch's kernels must take them."""
    wanted = torch.randn(33, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    raw = wanted.view(torch.uint8).numpy().tobytes()
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    header = {"x": entry(names[dtype], (33, 33), (0, len(raw)))}
    pad = shift + (-len(json.dumps(header))) % 8
    found = containers.read(put(tmp_path, header, raw, pad)).tensors["x"]
    assert found.data_ptr() % 8 == shift
    assert torch.equal(found, wanted)
    assert torch.equal(torch.stack(found.aminmax()), torch.stack(wanted.aminmax()))
    assert torch.equal((found.double() * 3).to(dtype), (wanted.double() * 3).to(dtype))
    assert torch.equal(torch.cat([found, found.T.contiguous()]), torch.cat([wanted, wanted.T]))
    torch.testing.assert_close(found @ found.T, wanted @ wanted.T)  # MKL sums in another order where it is unaligned
    torch.testing.assert_close(torch.linalg.svdvals(found.double()), torch.linalg.svdvals(wanted.double()))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "not valid JSON"),
        ("{}}", "not valid JSON"),
        ("{" * 5000, "not valid JSON"),
        ('{"x": NaN}', "expected dtype, shape and data_offsets"),
        ("[]", "expected a JSON object"),
        ('{"a": 1, "a": 2}', "duplicate keys 'a'"),
        ({"x": 3}, "expected dtype, shape and data_offsets"),
        ({"x": {"dtype": "F32"}}, "expected dtype, shape and data_offsets"),
        ({"x": entry() | {"more": 1}}, "expected dtype, shape and data_offsets"),
        ({"x": entry("F31")}, "unknown dtype 'F31'"),
        ({"x": entry(["F32"])}, r"unknown dtype \['F32'\]"),
        ({"x": entry(shape=3)}, "impossible"),
        ({"x": entry(shape=(-2,))}, "impossible"),
        ({"x": entry(shape=(2.0,))}, "impossible"),
        ({"x": entry(shape=(True, 2))}, "impossible"),
        ({"x": entry(shape=(0, 1 << 60), offsets=(0, 0))}, "impossible"),
        ({"x": entry(shape=(0,) * 100, offsets=(0, 0))}, "impossible"),
        ({"x": entry(offsets=8)}, "impossible"),
        ({"x": entry(offsets=(0,))}, "impossible"),
        ({"x": entry(offsets=(-4, 4))}, "impossible"),
        ({"x": entry(offsets=(0, 4))}, "takes 8 bytes"),
        ({"x": entry(offsets=(8, 0))}, "takes 8 bytes"),
        ({"x": entry(shape=(1 << 40,))}, "takes"),
        ({"x": entry(offsets=(8, 16))}, "leaves a gap"),
        ({"x": entry(), "y": entry()}, "overlaps the tensor before it"),
        ({"x": entry(), "y": entry(offsets=(4, 12))}, "overlaps the tensor before it"),
        ({"x": entry(), "y": entry(offsets=(8, 16))}, "was cut off"),
        ({"x": entry(shape=(1,), offsets=(0, 4))}, "bytes after its last tensor"),
        ({"": entry()}, "expected text"),
        ({"\ud800": entry()}, "half a surrogate pair"),
        ({"__metadata__": [], "x": entry()}, None),
        ({"__metadata__": [1], "x": entry()}, "__metadata__ is no object"),
    ],
)
def test_every_way_a_header_can_be_wrong_is_named(header: object, message: str | None, tmp_path: Path) -> None:
    path = put(tmp_path, header)
    if message is None:
        assert containers.get("safetensors").read(path).metadata == {}
        return
    with pytest.raises(DamagedFileError, match=message) as raised:
        containers.get("safetensors").read(path)
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("name", ["../../x\0", "a\nb", "\x1b]0;x"])
def test_names_that_are_no_plain_text_are_unsafe(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError, match="control characters") as raised:
        containers.read(put(tmp_path, {name: entry()}))
    assert name not in str(raised.value)


def test_a_header_longer_than_any_adapter_needs_is_unsafe(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((30_000_000).to_bytes(8, "little") + b"{")
        file.truncate(40_000_000)
    with pytest.raises(UnsafeFileError, match="at most 25000000"):
        containers.read(path)


def test_a_length_beyond_the_file_says_that_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((1000).to_bytes(8, "little") + b'{"x": ')
    with pytest.raises(DamagedFileError, match=r"claims 1000 bytes, the file has 14\. It was cut off"):
        containers.read(path)


def test_a_file_without_tensors_is_empty(tmp_path: Path) -> None:
    with pytest.raises(EmptyFileError, match="holds no tensor"):
        containers.read(put(tmp_path, {"__metadata__": {"format": "pt"}}, b""))


def test_the_name_of_the_metadata_is_no_tensor_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="__metadata__"):
        cases.write("safetensors", tmp_path, {"__metadata__": torch.ones(1)})


def test_wide_dtypes_stand_first_so_that_all_are_aligned(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(1, dtype=torch.bool), "b": torch.ones(3).half(), "c": torch.ones(1).double()}
    read = containers.read(cases.write("safetensors", tmp_path, tensors))
    assert cases.same(read.tensors, tensors)
    assert all(tensor.data_ptr() % 8 == 0 for name, tensor in read.tensors.items() if name == "c")
    assert all(tensor.data_ptr() % tensor.dtype.itemsize == 0 for tensor in read.tensors.values())


def test_a_header_of_very_many_keys_with_one_twice_is_refused_at_once(tmp_path: Path) -> None:
    keys = ",".join(f'"{number}":1' for number in range(500_000))
    with pytest.raises(DamagedFileError, match="duplicate keys '7'"):
        containers.get("safetensors").read(put(tmp_path, f'{{{keys},"7":1}}'))
