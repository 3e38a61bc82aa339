"""msgpack: byte for byte what flax writes, and nothing that flax would not write."""

from pathlib import Path
from typing import Any

import container_cases as cases
import flax.serialization
import msgpack as msgpack_library
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from adaptertools import containers
from adaptertools.containers import msgpack
from adaptertools.errors import AdapterToolsError, DamagedFileError, EmptyFileError, UnsafeFileError
from adaptertools.tensors import Deferred

ONE = np.ones(2, np.float32)


def put(folder: Path, content: object) -> Path:
    path = folder / "file.msgpack"
    path.write_bytes(content if isinstance(content, bytes) else flax.serialization.msgpack_serialize(content))
    return path


def array(shape: object, dtype: object, raw: bytes, code: int = 1) -> msgpack_library.ExtType:
    """An array as flax encodes it, of anything."""
    return msgpack_library.ExtType(code, msgpack_library.packb((shape, dtype, raw)))


@settings(deadline=None, max_examples=100)
@given(tensors=cases.named_tensors(dtypes=(*cases.DTYPES, *cases.FLOAT8)))
def test_the_written_bytes_are_those_of_flax(
    tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    written = cases.write("msgpack", tmp_path_factory.mktemp("msgpack"), tensors).read_bytes()
    tree = cases.nest({name: cases.to_numpy(tensors[name]) for name in sorted(tensors, key=lambda n: n.split("/"))})
    assert written == flax.serialization.msgpack_serialize(tree)
    assert written == flax.serialization.to_bytes(tree)


@pytest.mark.parametrize("nbytes", [0, 1, 3, 4, 200, 240, 250, 256, 65000, 65500, 65536, 70000])
def test_every_width_of_length_is_written_as_flax_writes_it(nbytes: int, tmp_path: Path) -> None:
    tensors = {"x": torch.zeros(nbytes, dtype=torch.uint8)}
    written = cases.write("msgpack", tmp_path, tensors)
    assert written.read_bytes() == flax.serialization.msgpack_serialize({"x": np.zeros(nbytes, np.uint8)})
    assert cases.same(containers.read(written).tensors, tensors)


def test_large_arrays_are_chunked_as_flax_chunks_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
    monkeypatch.setattr(msgpack, "MAX_CHUNK_BYTES", 64)
    tensors = {
        "a/w": torch.arange(100.0).reshape(4, 25),
        "b": torch.arange(16.0),
        "c": torch.arange(17.0),
        "d": torch.randn(3, 5, 7).bfloat16(),
        "e": torch.arange(9, dtype=torch.float64),
    }
    path = cases.write("msgpack", tmp_path, tensors)
    tree = cases.nest({name: cases.to_numpy(tensor) for name, tensor in tensors.items()})
    assert path.read_bytes() == flax.serialization.msgpack_serialize(tree)
    assert cases.same(containers.read(path).tensors, tensors)


@pytest.mark.slow
def test_an_array_beyond_two_to_the_thirty_bytes_comes_back_from_flax(tmp_path: Path) -> None:
    size = (1 << 30) + 12
    big = Deferred(shape=(2, size // 2), dtype=torch.uint8, compute=lambda: torch.arange(size).byte().reshape(2, -1))
    path = cases.write("msgpack", tmp_path, {"big": big, "z": torch.ones(2)})
    restored = flax.serialization.msgpack_restore(path.read_bytes())["big"]
    read = containers.read(path).tensors["big"]
    path.unlink()
    assert restored.shape == read.shape == (2, size // 2)
    assert np.array_equal(restored, read.numpy())


def test_whole_numbers_as_keys_and_lists_become_names(tmp_path: Path) -> None:
    path = put(tmp_path, {0: {"w": ONE}, 10: {"w": ONE}})
    assert set(containers.read(path).tensors) == {"0/w", "10/w"}
    path = put(tmp_path, {"l": [ONE, {"x": ONE}]})
    assert set(containers.read(path).tensors) == {"l/0", "l/1/x"}


def test_what_is_no_array_becomes_metadata(tmp_path: Path) -> None:
    tree = {"w": ONE, "step": 3, "lr": 0.5, "neg": -7, "big": 1 << 40, "name": "é", "flag": True, "none": None}
    read = containers.read(put(tmp_path, tree | {"complex": 1 + 2j, "nested": {"rank": 4}, "raw": b"bytes"}))
    assert set(read.tensors) == {"w"}
    assert read.metadata == {
        "step": "3",
        "lr": "0.5",
        "neg": "-7",
        "big": str(1 << 40),
        "name": "é",
        "flag": "True",
        "none": "None",
        "complex": "(1+2j)",
        "nested/rank": "4",
        "raw": "bytes",
    }


def test_numpy_scalars_become_tensors_without_dimensions(tmp_path: Path) -> None:
    read = containers.read(put(tmp_path, {"alpha": np.float32(16), "step": np.int64(3)}))
    assert cases.same(read.tensors, {"alpha": torch.tensor(16.0), "step": torch.tensor(3)})


def test_to_bytes_of_a_train_state_like_tree_is_read(tmp_path: Path) -> None:
    tree = {"params": {"Dense_0": {"kernel": ONE, "bias": ONE}}, "opt_state": ({"mu": ONE}, ())}
    path = tmp_path / "checkpoint_0"
    path.write_bytes(flax.serialization.to_bytes(tree))
    assert set(containers.read(path).tensors) == {"params/Dense_0/kernel", "params/Dense_0/bias", "opt_state/0/mu"}


PACK = msgpack_library.packb
MARK = "__msgpack_chunked_array__"
CHUNK = array((2,), "float32", bytes(8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PACK({"x": array((3,), "float32", bytes(8))}), r"8 bytes for shape \(3,\) in float32; expected 12"),
        (PACK({"x": array((-1,), "float32", bytes(8))}), r"shape \[-1\]"),
        (PACK({"x": array((0, 1 << 60), "float32", b"")}), "shape"),
        (PACK({"x": array((1.5,), "float32", bytes(4))}), "shape"),
        (PACK({"x": array((True,), "float32", bytes(4))}), "shape"),
        (PACK({"x": array((2,), "V2", bytes(4))}), "dtype 'V2'"),
        (PACK({"x": array((2,), "object", bytes(16))}), "dtype 'object'"),
        (PACK({"x": array((2,), "complex64", bytes(16))}), "dtype 'complex64'"),
        (PACK({"x": array((2,), 3, bytes(4))}), "array of unknown make"),
        (PACK({"x": array("ab", "int8", bytes(2))}), "array of unknown make"),
        (PACK({"x": msgpack_library.ExtType(1, PACK([1]))}), "array of unknown make"),
        (PACK({"x": msgpack_library.ExtType(1, PACK([[1], "int8", b"1"]) + b"\x00")}), "follow the end"),
        (PACK({"x": msgpack_library.ExtType(2, PACK([1, "a"]))}), "array of unknown make"),
        (PACK({"x": array((2,), "int8", bytes(2), code=7)}), "extension type 7"),
        (PACK({"x": msgpack_library.Timestamp(1)}), "extension type -1"),
        (PACK({"x": {MARK: True, "shape": {"0": 4}}}), "without shape or chunks"),
        (PACK({"x": {MARK: True, "shape": {"0": 5}, "chunks": {"0": CHUNK, "1": CHUNK}}}), "4 elements"),
        (PACK({"x": {MARK: True, "shape": {"0": 4}, "chunks": {"0": CHUNK, "2": CHUNK}}}), "numbered"),
        (PACK({"x": {MARK: True, "shape": {"0": 4}, "chunks": {}}}), "several kinds"),
        (PACK({"x": {MARK: True, "shape": {"0": 4}, "chunks": {"0": CHUNK, "1": 3}}}), "several kinds"),
        (b"\x82\xa1a\x01\xa1a\x02", "'a' stands twice"),
        (b"\x81\xa1x\xc1", "byte 0xc1 begins no value"),
        (b"\x82\xa1x\x01\x92\x01\x02\x01", r"a key is \[1, 2\]"),
        (b"\x81\xa2\xff\xfe\x01", "not UTF-8"),
        (b"\x81\xa1x\xdd\xff\xff\xff\xff", "announced"),
        (b"\xdf\xff\xff\xff\xff\xa1x\x01", "announced"),
        (b"\x81\xa1x\xc6\xff\xff\xff\xff", "announced"),
    ],
)
def test_what_flax_would_not_write_is_damage(content: bytes, message: str, tmp_path: Path) -> None:
    path = put(tmp_path, content)
    with pytest.raises(DamagedFileError, match=message):
        msgpack.read(path)


def test_a_number_and_a_text_of_the_same_name_are_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match="two values are named 0"):
        msgpack.read(put(tmp_path, PACK({0: CHUNK, "0": CHUNK})))


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1x"])
def test_endless_nesting_is_refused(opening: bytes, tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError, match="nested deeper than 64"):
        msgpack.read(put(tmp_path, b"\x81\xa1x" + opening * 100_000 + b"\x01"))


def test_a_document_without_arrays_or_without_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmptyFileError, match="holds no array"):
        msgpack.read(put(tmp_path, {"a": 1}))
    with pytest.raises(DamagedFileError, match="expected a map of arrays, found list"):
        msgpack.read(put(tmp_path, [ONE]))


def test_a_big_endian_array_that_flax_itself_corrupts_is_not_told_apart(tmp_path: Path) -> None:
    """flax drops the byte order from the dtype's name; we read what flax reads."""
    path = put(tmp_path, {"x": np.arange(3, dtype=">f4")})
    restored = flax.serialization.msgpack_restore(path.read_bytes())["x"]
    assert cases.same_bits(containers.read(path).tensors["x"], torch.from_numpy(restored.copy()))


@settings(deadline=None, max_examples=200)
@given(content=cases.binary_documents())
def test_any_bytes_at_all_raise_nothing_but_our_errors(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_bytes(content)
    try:
        msgpack.read(path)
    except AdapterToolsError:
        return
    assert isinstance(unpacked(content), dict)


def unpacked(content: bytes) -> Any:
    return msgpack_library.unpackb(content, strict_map_key=False, raw=False)
