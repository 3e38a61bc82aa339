"""GGUF as a container: the gguf package reads what we write, and we read what it writes."""

import json
import sys
from pathlib import Path

import container_cases as cases
import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptertools import containers
from adaptertools.containers import gguf as ours
from adaptertools.containers import gguf_header
from adaptertools.containers.tensorfile import TensorFile
from adaptertools.errors import AdapterToolsError, MissingExtraError, UnsafeFileError, UnsupportedFeatureError

DTYPES = (*cases.FLOATS, torch.int8, torch.int16, torch.int32, torch.int64)
METADATA = {"general.architecture": "llama", "adapter.lora.alpha": "16.0", "general.name": "é\n漢"}


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    ours.write(path, tensors, METADATA if metadata is None else metadata)
    return path


def write_theirs(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_float32("adapter.lora.alpha", 16.0)
    writer.add_array("adapter.alora.invocation_tokens", [3, 4])
    writer.add_array("tokens", ["a", "é"])
    writer.add_bool("flag", True)
    writer.add_uint64("large", 1 << 60)
    for name, tensor in tensors.items():
        if tensor.dtype is torch.bfloat16:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sample() -> dict[str, torch.Tensor]:
    return {f"t{n}": cases.random_tensor((3, n + 1), dtype, seed=n) for n, dtype in enumerate(DTYPES)}


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_reading_gives_back_what_was_written_bit_for_bit(tmp_path: Path, data: st.DataObject) -> None:
    tensors = data.draw(cases.named_tensors(dtypes=DTYPES))
    read = containers.read(write(tmp_path / "x.gguf", tensors))
    assert (read.container, read.metadata) == ("gguf", METADATA)
    assert cases.same(read.tensors, tensors)


def test_the_gguf_package_reads_what_is_written(tmp_path: Path) -> None:
    metadata = {**METADATA, "adapter.alora.invocation_tokens": "[5, 6]", "general.base_model.count": "1"}
    reader = gguf.GGUFReader(write(tmp_path / "x.gguf", sample(), metadata))
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == sample().keys()
    for name, tensor in sample().items():
        assert tuple(int(size) for size in reversed(found[name].shape)) == tuple(tensor.shape)
        assert found[name].data.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert found[name].data_offset % 32 == 0
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert {key: field.contents() for key, field in fields.items()} == {
        **METADATA,
        "adapter.lora.alpha": 16.0,
        "adapter.alora.invocation_tokens": [5, 6],
        "general.base_model.count": 1,
    }
    assert fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    assert fields["adapter.alora.invocation_tokens"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    assert fields["general.base_model.count"].types == [gguf.GGUFValueType.UINT32]


def test_what_the_gguf_package_wrote_is_read(tmp_path: Path) -> None:
    read = containers.read(write_theirs(tmp_path / "x.gguf", sample()))
    assert cases.same(read.tensors, sample())
    assert {key: read.metadata[key] for key in ("adapter.lora.alpha", "flag", "large", "general.architecture")} == {
        "adapter.lora.alpha": "16.0",
        "flag": "true",
        "large": str(1 << 60),
        "general.architecture": "llama",
    }
    assert json.loads(read.metadata["tokens"]) == ["a", "é"]
    assert json.loads(read.metadata["adapter.alora.invocation_tokens"]) == [3, 4]


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0])
def test_quantised_tensors_are_those_that_the_gguf_package_makes_of_them(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    blocks = gguf.quants.quantize(values, kind)
    writer.add_tensor("q", blocks, raw_dtype=kind)
    writer.add_tensor("f", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = containers.read(tmp_path / "q.gguf").tensors
    assert read["q"].dtype is torch.float32
    assert np.array_equal(read["q"].numpy(), gguf.quants.dequantize(blocks, kind))
    assert 0 < np.abs(read["q"].numpy() - values).max() < 0.5
    assert np.array_equal(read["f"].numpy(), values)
    assert read["q"] is read["q"], "it is dequantised once"


def test_quantised_tensors_without_the_gguf_package_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.gguf", {"x": torch.ones(2, 32)})
    data = path.read_bytes().replace(
        (32).to_bytes(8, "little") + (2).to_bytes(8, "little") + bytes(4),
        (32).to_bytes(8, "little") + (2).to_bytes(8, "little") + (8).to_bytes(4, "little"),
    )
    path.write_bytes(data)
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(MissingExtraError, match=r"adaptertools\[gguf\]"):
        containers.read(path)


def test_plain_tensors_need_no_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gguf", "gguf.constants", "gguf.quants"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cases.same(containers.read(write(tmp_path / "x.gguf", sample())).tensors, sample())


def test_reading_looks_at_no_value(tmp_path: Path) -> None:
    """Values are holes of a file far larger than what is read of it."""
    path = tmp_path / "x.gguf"
    shape = (1 << 20, 1 << 12)
    head = gguf_header.build("x", {"x": (shape, 0, 1 << 34)}, METADATA)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + (1 << 34))
    read: TensorFile = containers.read(path)
    assert read.tensors["x"].shape == shape
    assert float(read.tensors["x"][-1, -1]) == 0.0


def test_a_wider_alignment_is_followed(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(128)
    writer.add_tensor("a", np.ones(3, np.float32))
    writer.add_tensor("b", np.full(2, 7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = containers.read(tmp_path / "x.gguf")
    assert read.tensors["b"].tolist() == [7, 7]
    assert read.offsets["b"] - read.offsets["a"] == 128


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({"x": torch.ones(2, dtype=torch.bool)}, {}, "cannot store x"),
        ({"x": torch.ones(1, 1, 1, 1, 1)}, {}, "5 axes"),
        ({"x": torch.ones(2)}, {"adapter.alora.invocation_tokens": "[-1]"}, "invocation_tokens"),
        ({"x": torch.ones(2)}, {"adapter.lora.alpha": "1e300"}, "alpha"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_by_name(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedFeatureError, match=said):
        write(tmp_path / "x.gguf", tensors, metadata)


def test_a_key_with_control_characters_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError, match="control"):
        write(tmp_path / "x.gguf", sample(), {"a\x1b": "b"})


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_read_whole_or_raise_an_error_of_ours(tmp_path: Path, data: st.DataObject) -> None:
    sound = tmp_path / "sound.gguf"
    if not sound.exists():
        write_theirs(sound, sample())
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data.draw(cases.damage(sound.read_bytes())))
    try:
        read = containers.read(damaged)
        for name in read.tensors:
            read.tensors[name].sum()
    except AdapterToolsError:
        pass
