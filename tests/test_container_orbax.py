"""Orbax folders: read as Orbax writes them in all its ways, written so that Orbax restores them, without jax."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import container_cases as cases
import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptertools import containers
from adaptertools.containers import orbax
from adaptertools.errors import (
    AdapterToolsError,
    AmbiguousFormatError,
    DamagedFileError,
    EmptyFileError,
    MissingExtraError,
    UnsafeFileError,
    UnsupportedFeatureError,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*[Ss]harding.*:UserWarning")

TENSORS = {
    "layers/0/attn/lora_a": torch.arange(12.0).reshape(3, 4),
    "layers/0/attn/lora_b": torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "layers/10/half": torch.ones(5).half(),
    "zeros": torch.zeros(2, 3),
    "step": torch.tensor(7, dtype=torch.int32),
}
TREE = cases.nest({name: cases.to_numpy(tensor) for name, tensor in TENSORS.items()})


def jax_tree() -> dict[str, Any]:
    return jax.tree.map(jax.numpy.asarray, TREE)


def save_standard(path: Path) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, jax_tree())
    return path


def save_pytree(path: Path, **options: Any) -> Path:
    with ocp.PyTreeCheckpointer(**options) as checkpointer:
        checkpointer.save(path, jax_tree())
    return path


def save_managed(path: Path) -> Path:
    with ocp.CheckpointManager(path) as manager:
        manager.save(3, args=ocp.args.StandardSave(jax_tree()), custom_metadata={"lora": {"rank": 4}, "name": "x"})
        manager.wait_until_finished()
    return path


def save_items(path: Path) -> Path:
    with ocp.CheckpointManager(path, item_names=("model_params", "optimizer_state")) as manager:
        state = {"mu": jax.numpy.ones(2)}
        arguments = ocp.args.Composite(
            model_params=ocp.args.PyTreeSave(jax_tree()), optimizer_state=ocp.args.PyTreeSave(state)
        )
        manager.save(0, args=arguments)
        manager.wait_until_finished()
    return path


def save_v1(path: Path) -> Path:
    ocp_v1.save_pytree(path, jax_tree())
    return path


SAVERS = {
    "standard": save_standard,
    "pytree": save_pytree,
    "pytree in folders": lambda path: save_pytree(path, use_ocdbt=False),
    "pytree zarr3": lambda path: save_pytree(path, use_zarr3=True),
    "pytree zarr3 in folders": lambda path: save_pytree(path, use_ocdbt=False, use_zarr3=True),
    "manager": save_managed,
    "manager with items": save_items,
    "v1": save_v1,
}


@pytest.mark.parametrize("saver", SAVERS)
def test_whatever_way_orbax_saved_it_the_arrays_are_read(saver: str, tmp_path: Path) -> None:
    read = containers.read(SAVERS[saver](tmp_path / "checkpoint"))
    assert read.container == "orbax"
    assert cases.same(read.tensors, TENSORS)


def restore_standard(path: Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def restore_standard_to_a_target(path: Path) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, jax.tree.map(ocp.utils.to_shape_dtype_struct, jax_tree()))


def restore_pytree(path: Path) -> Any:
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def restore_v1(path: Path) -> Any:
    return ocp_v1.load_pytree(path)


RESTORERS = {
    "standard": restore_standard,
    "standard to a target": restore_standard_to_a_target,
    "pytree": restore_pytree,
    "v1": restore_v1,
}


@pytest.mark.parametrize("restorer", RESTORERS)
def test_orbax_restores_what_is_written_bfloat16_included(restorer: str, tmp_path: Path) -> None:
    path = cases.write("orbax", tmp_path, TENSORS)
    restored = RESTORERS[restorer](path)
    found = {name: cases.from_numpy(np.asarray(array)) for name, array in cases.unnest(restored).items()}
    assert cases.same(found, TENSORS)


@settings(deadline=None, max_examples=20)
@given(tensors=cases.named_tensors(empty=False))
def test_reading_gives_back_what_was_written_bit_for_bit(
    tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = cases.write("orbax", tmp_path_factory.mktemp("orbax"), tensors)
    assert cases.same(containers.read(path).tensors, tensors)


def test_metadata_is_written_as_custom_metadata_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    orbax.write(path, TENSORS, {"lora_alpha": "16"})
    assert containers.read(path).metadata == {"lora_alpha": "16"}
    with ocp.StandardCheckpointer() as checkpointer:
        assert checkpointer.metadata(path).custom_metadata == {"lora_alpha": "16"}


def test_custom_metadata_of_a_step_is_read_for_its_item(tmp_path: Path) -> None:
    path = save_managed(tmp_path / "run")
    expected = {"lora": '{"rank": 4}', "name": "x"}
    for place in (path, path / "3", path / "3" / "default"):
        assert containers.read(place).metadata == expected


def test_scalars_and_texts_become_metadata_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = {"w": np.ones(2, np.float32), "step": 3, "lr": 0.5, "name": "x", "none": None, "empty": {}}
        checkpointer.save(
            path, tree | {"list": [np.zeros(1, np.float32), np.ones(1, np.float32)], "layers": {7: np.ones(3)}}
        )
    read = containers.read(path)
    assert set(read.tensors) == {"w", "list/0", "list/1", "layers/7"}
    assert read.metadata == {"step": "3", "lr": "0.5", "name": "x"}


def test_a_trailing_value_key_is_kept_for_the_dialects(tmp_path: Path) -> None:
    path = cases.write("orbax", tmp_path, {"layers/0/lora_a/value": torch.ones(2)})
    assert list(containers.read(path).tensors) == ["layers/0/lora_a/value"]


def test_several_steps_are_ambiguous_and_named(tmp_path: Path) -> None:
    orbax.write(tmp_path / "1", {"x": torch.ones(1)}, {})
    (tmp_path / "12").mkdir()
    orbax.write(tmp_path / "12" / "items", {"x": torch.ones(1)}, {})
    with pytest.raises(AmbiguousFormatError, match=r"1, 12/items\. Give the path of one"):
        containers.read(tmp_path)
    assert containers.read(tmp_path / "12").tensors.keys() == {"x"}


def test_a_folder_of_other_things_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "state").mkdir()
    assert containers.identify(tmp_path) is None


def test_reading_imports_neither_jax_nor_orbax(tmp_path: Path) -> None:
    path = save_standard(tmp_path / "checkpoint")
    script = (
        "import sys; from pathlib import Path; from adaptertools import containers\n"
        f"assert len(containers.read(Path({str(path)!r})).tensors) == {len(TENSORS)}\n"
        "assert not {'jax', 'jaxlib', 'orbax', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_writing_needs_no_tensorstore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    path = cases.write("orbax", tmp_path, TENSORS)
    with pytest.raises(MissingExtraError, match=r"pip install adaptertools\[orbax\]"):
        containers.read(path)


def edited(folder: Path, name: str, change: Any) -> Path:
    """A checkpoint with one of its JSON documents changed."""
    path = cases.write("orbax", folder, TENSORS)
    document = json.loads((path / name).read_text())
    change(document)
    (path / name).write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("key", ["../../etc", "..", ".", "a/b", "a\0b", ""])
def test_keys_that_lead_out_of_the_folder_are_refused(key: str, tmp_path: Path) -> None:
    def change(tree: Any) -> None:
        entry = next(iter(tree["tree_metadata"].values()))
        entry["key_metadata"][0]["key"] = key

    with pytest.raises(UnsafeFileError, match="out of the folder"):
        containers.read(edited(tmp_path, "_METADATA", change))


def test_an_array_that_is_missing_is_no_array_of_zeros(tmp_path: Path) -> None:
    path = cases.write("orbax", tmp_path, TENSORS)
    (path / "zeros" / "0.0").unlink()
    with pytest.raises(DamagedFileError):
        containers.read(path)
    shutil.rmtree(path / "zeros")
    with pytest.raises(DamagedFileError):
        containers.read(path)


def test_a_short_chunk_is_damage(tmp_path: Path) -> None:
    path = cases.write("orbax", tmp_path, TENSORS)
    chunk = path / "zeros" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(DamagedFileError):
        containers.read(path)


@pytest.mark.parametrize("field", ["shape", "chunks"])
def test_a_shape_far_beyond_the_folder_is_refused_before_it_is_read(field: str, tmp_path: Path) -> None:
    path = cases.write("orbax", tmp_path, TENSORS)
    description = path / "zeros" / ".zarray"
    document = json.loads(description.read_text())
    document[field] = [1 << 20, 1 << 20]
    description.write_text(json.dumps(document))
    with pytest.raises(UnsafeFileError, match="claim to expand"):
        containers.read(path)


def test_a_checkpoint_without_arrays_is_empty(tmp_path: Path) -> None:
    with pytest.raises(EmptyFileError, match="holds no array"):
        containers.read(edited(tmp_path, "_METADATA", lambda tree: tree["tree_metadata"].clear()))


@pytest.mark.parametrize("tree", [{}, {"tree_metadata": []}, {"tree_metadata": {"a": 3}}, {"tree_metadata": {"a": {}}}])
def test_a_malformed_tree_is_damage(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "_METADATA").write_text(json.dumps(tree))
    with pytest.raises(DamagedFileError):
        containers.read(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.empty(0, 2)},
        {"a/../b": torch.ones(1)},
        {"a.b": torch.ones(1), "a/b": torch.ones(1)},
    ],
)
def test_what_orbax_cannot_hold_is_refused(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="Orbax cannot store"):
        cases.write("orbax", tmp_path, tensors)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_damaged_bytes_raise_nothing_but_our_errors(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = cases.write("orbax", tmp_path_factory.mktemp("damaged"), TENSORS)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    victim = data.draw(st.sampled_from(files))
    victim.write_bytes(data.draw(cases.damage(victim.read_bytes())))
    try:
        read = containers.read(path)
    except AdapterToolsError:
        return
    assert all(tensor.numel() < 1 << 24 for tensor in read.tensors.values())
