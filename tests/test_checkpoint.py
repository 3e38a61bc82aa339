"""A base model by its headers, in each of the ways that models are stored."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.errors import (
    AmbiguousFormatError,
    DamagedFileError,
    ShapeError,
    SourceNotFoundError,
    UnknownFormatError,
    UnsafeFileError,
)

WEIGHTS = {
    "model.q_proj.weight": torch.zeros(6, 4),
    "model.experts.gate_up_proj": torch.zeros(2, 4, 6).bfloat16(),
    "lm_head.bias": torch.zeros(3).half(),
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=16, head_dim=4
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("shard", ["5GB", "2KB"])
def test_a_folder_that_transformers_saved_is_known_by_its_headers(
    shard: str, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard == "5GB"
    checkpoint = Checkpoint.open(tmp_path)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert dict(checkpoint.shapes) == expected
    assert set(checkpoint.dtypes.values()) == {torch.float32}
    assert checkpoint.config["hidden_size"] == 8
    assert checkpoint.label == str(tmp_path)


def write_torch_shards(folder: Path) -> None:
    names = list(WEIGHTS)
    torch.save({name: WEIGHTS[name] for name in names[:2]}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({names[2]: WEIGHTS[names[2]]}, folder / "pytorch_model-00002-of-00002.bin")
    write_index(
        folder / "pytorch_model.bin.index.json",
        {name: f"pytorch_model-0000{1 if name in names[:2] else 2}-of-00002.bin" for name in names},
    )


def write_index(path: Path, weight_map: object) -> None:
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


WAYS = {
    "one safetensors file": lambda folder: save_file(WEIGHTS, folder / "model.safetensors"),
    "one torch file": lambda folder: torch.save(WEIGHTS, folder / "pytorch_model.bin"),
    "torch shards": write_torch_shards,
    "a file of another name": lambda folder: save_file(WEIGHTS, folder / "weights.safetensors"),
}


@pytest.mark.parametrize("way", WAYS)
def test_shapes_and_dtypes_are_read_however_they_are_stored(way: str, tmp_path: Path) -> None:
    WAYS[way](tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert dict(checkpoint.shapes) == {name: tuple(weight.shape) for name, weight in WEIGHTS.items()}
    assert dict(checkpoint.dtypes) == {name: weight.dtype for name, weight in WEIGHTS.items()}
    assert checkpoint.config == {}


def test_one_file_or_one_index_may_be_named(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    checkpoint = Checkpoint.open(tmp_path / "a.safetensors")
    assert checkpoint.shapes.keys() == WEIGHTS.keys()
    assert checkpoint.config == {"model_type": "x"}
    with pytest.raises(AmbiguousFormatError, match=r"a\.safetensors, b\.safetensors"):
        Checkpoint.open(tmp_path)
    write_torch_shards(tmp_path)
    assert Checkpoint.open(tmp_path / "pytorch_model.bin.index.json").shapes.keys() == WEIGHTS.keys()


@pytest.mark.parametrize("shards", [(1,), (1, 2, 3)])
def test_shards_without_their_index_are_no_model(shards: tuple[int, ...], tmp_path: Path) -> None:
    for number in shards:
        save_file({f"x{number}": torch.zeros(1)}, tmp_path / f"model-0000{number}-of-00003.safetensors")
    with pytest.raises(AmbiguousFormatError, match=r"model\.safetensors\.index\.json, is missing: download it too"):
        Checkpoint.open(tmp_path)


def test_the_only_shard_of_one_needs_no_index(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model-00001-of-00001.safetensors")
    assert Checkpoint.open(tmp_path).shapes.keys() == WEIGHTS.keys()


def test_safetensors_are_preferred_to_torch_files(tmp_path: Path) -> None:
    torch.save({"old": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert Checkpoint.open(tmp_path).shapes.keys() == WEIGHTS.keys()


def test_a_parameter_is_found_with_or_without_its_weight(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.shape_of("model.q_proj") == (6, 4)
    assert checkpoint.shape_of("model.experts.gate_up_proj") == (2, 4, 6)
    assert checkpoint.shape_of("lm_head.bias") == (3,)
    with pytest.raises(ShapeError, match=r"no parameter model\.k_proj; the nearest are model\.q_proj\.weight"):
        checkpoint.shape_of("model.k_proj")
    with pytest.raises(ShapeError, match="right base model"):
        checkpoint.shape_of("zzzz")


def test_what_is_no_base_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="no such base model"):
        Checkpoint.open(tmp_path / "missing")
    with pytest.raises(UnknownFormatError, match="no weights of a base model"):
        Checkpoint.open(tmp_path)
    (tmp_path / "readme.txt").write_text("text")
    with pytest.raises(UnknownFormatError, match="expected the weights of a base model"):
        Checkpoint.open(tmp_path / "readme.txt")


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}])
def test_an_index_without_a_map_is_damage(weight_map: object, tmp_path: Path) -> None:
    write_index(tmp_path / "model.safetensors.index.json", weight_map)
    with pytest.raises(DamagedFileError, match="no weight_map"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_may_not_lead_out_of_its_folder(shard: str, tmp_path: Path) -> None:
    write_index(tmp_path / "model.safetensors.index.json", {"x": shard})
    with pytest.raises(UnsafeFileError, match="outside the folder"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_and_one_that_disagrees_with_its_index_are_named(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    write_index(index, {"x": "one.safetensors", "y": "two.safetensors"})
    save_file({"x": torch.zeros(1)}, tmp_path / "one.safetensors")
    with pytest.raises(SourceNotFoundError, match=r"two\.safetensors: the shard is missing"):
        Checkpoint.open(tmp_path)
    save_file({"z": torch.zeros(1)}, tmp_path / "two.safetensors")
    with pytest.raises(DamagedFileError, match=r"two\.safetensors.*disagree about y, z"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("shard", ["5GB", "2KB"])
def test_every_weight_has_its_place_and_its_value(shard: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size=shard)
    checkpoint = Checkpoint.open(tmp_path)
    assert [file.name for file in checkpoint.files] == list(checkpoint.tensors_of)
    assert sorted(name for names in checkpoint.tensors_of.values() for name in names) == sorted(checkpoint.shapes)
    for file in checkpoint.files:
        header = checkpoint.header(file)
        end = len(header)
        assert int.from_bytes(header[:8], "little") == end - 8
        for name in checkpoint.tensors_of[file.name]:
            place = checkpoint.places[name]
            assert place is not None
            assert (place.path, place.offset) == (file, end), "the tensors follow one another in the file's order"
            end += place.nbytes
            data = file.read_bytes()[place.offset : place.offset + place.nbytes]
            assert data == model.state_dict()[name].numpy().tobytes()
            assert torch.equal(checkpoint.tensor(name), model.state_dict()[name])
        assert end == file.stat().st_size


def test_torch_shards_are_mapped_and_have_places(tmp_path: Path) -> None:
    write_torch_shards(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.container == "torch"
    for name, weight in WEIGHTS.items():
        place = checkpoint.places[name]
        assert place is not None
        data = bytearray(place.path.read_bytes()[place.offset : place.offset + place.nbytes])
        assert torch.equal(torch.frombuffer(data, dtype=weight.dtype).reshape(weight.shape), weight)
    assert checkpoint.index == tmp_path / "pytorch_model.bin.index.json"
    assert checkpoint.folder == tmp_path
    for name, weight in WEIGHTS.items():
        assert torch.equal(checkpoint.tensor(name), weight)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_torch_tensor_has_a_place_only_where_it_is_sure_to_lie_in_one_piece(legacy: bool, tmp_path: Path) -> None:
    rows = torch.arange(12.0).reshape(3, 4)
    path = tmp_path / "pytorch_model.bin"
    tensors = {"whole": rows, "part": rows[1:], "turned": rows.T, "again": torch.ones(3), "empty": torch.ones(0)}
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    checkpoint = Checkpoint.open(tmp_path)
    for name, place in checkpoint.places.items():
        assert (place is None) == (legacy or name in ("turned", "empty"))
        if place is not None:
            assert path.read_bytes()[place.offset : place.offset + place.nbytes] == tensors[name].numpy().tobytes()


def test_shards_of_two_kinds_are_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "one.bin")
    save_file({"y": torch.zeros(1)}, tmp_path / "two.safetensors")
    write_index(tmp_path / "model.safetensors.index.json", {"x": "one.bin", "y": "two.safetensors"})
    with pytest.raises(DamagedFileError, match="some of its shards"):
        Checkpoint.open(tmp_path)
