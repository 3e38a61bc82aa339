"""The msgpack container against flax.serialization, and damaged Flax files."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import serialization
from flax_oracle import write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adaptertools
from adaptertools.adapter import Adapter
from adaptertools.containers import msgpack

ARRAYS: dict[str, np.ndarray] = {
    "f32": np.arange(30, dtype=np.float32).reshape(5, 6),
    "f16": np.arange(6, dtype=np.float16).reshape(2, 3),
    "bf16": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
    "f64": np.arange(4, dtype=np.float64),
    "i32": np.arange(4, dtype=np.int32),
    "bool": np.array([True, False]),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "strided": np.arange(12, dtype=np.float32).reshape(3, 4).T,
}


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_equal(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        other = as_numpy(found[name]) if isinstance(found[name], torch.Tensor) else np.asarray(found[name])
        assert other.dtype == array.dtype, name
        assert other.shape == array.shape, name
        assert np.array_equal(other.astype(np.float64), array.astype(np.float64)), name


@pytest.mark.parametrize("chunk", [1 << 30, 64])
@pytest.mark.parametrize("save", ["to_bytes", "msgpack_serialize"])
def test_every_array_that_flax_writes_is_read(
    save: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    tree = {"layers": {0: dict(ARRAYS)}, "step": 3, "name": "tiny", "of_jax": jnp.ones((2, 2), jnp.bfloat16)}
    if save == "msgpack_serialize":
        tree["of_numpy"] = np.float32(2.5)
    path = tmp_path / "tree.msgpack"
    path.write_bytes(getattr(serialization, save)(tree))
    file = msgpack.read(path)
    prefix = "layers/0/"
    found = {name.removeprefix(prefix): t for name, t in file.tensors.items() if name.startswith(prefix)}
    assert_equal(found, ARRAYS)
    assert file.metadata["step"] == "3"
    assert file.metadata["name"] == "tiny"
    assert file.tensors["of_jax"].dtype is torch.bfloat16


@pytest.mark.parametrize("chunk", [1 << 30, 64])
def test_flax_restores_every_tensor_that_we_write(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msgpack, "MAX_CHUNK_BYTES", chunk)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    tensors = {
        f"layers/0/{name}": torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
        if name == "bf16"
        else torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)
        for name, array in sorted(ARRAYS.items())
    }
    path = tmp_path / "tree.msgpack"
    msgpack.write(path, tensors, {})
    restored = serialization.msgpack_restore(path.read_bytes())
    assert_equal(restored["layers"]["0"], ARRAYS)
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in sorted(ARRAYS.items())}
    assert path.read_bytes() == serialization.to_bytes({"layers": {"0": contiguous}})


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("container", ["msgpack", "npz", "safetensors"])
def test_damaged_bytes_raise_nothing_but_our_errors(
    container: str, data: st.DataObject, plain: Adapter, tmp_path: Path
) -> None:
    original = tmp_path / "original"
    if not original.exists():
        write(plain, original, "flax-qwix", container=container)
    raw = bytearray((original / f"flax_adapter.{container}").read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip", "insert", "repeat"]))
    place = data.draw(st.integers(0, min(len(raw) - 1, 400)))
    match kind:
        case "cut":
            del raw[place:]
        case "flip":
            raw[place] ^= data.draw(st.integers(1, 255))
        case "insert":
            raw[place:place] = data.draw(st.binary(min_size=1, max_size=9))
        case "repeat":
            raw[place:place] = raw[place : place + 50]
    path = tmp_path / f"damaged.{container}"
    path.write_bytes(raw)
    try:
        adapter = adaptertools.read(path, format="flax-qwix", alpha=1)
    except adaptertools.AdapterToolsError:
        return
    assert adapter.modules
