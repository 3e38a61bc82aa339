"""Flax adapters in Orbax folders: what real Orbax saved is read, without jax; what we write real Orbax restores."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from flax import nnx
from flax_oracle import assert_identical, delta, modules_of, write

import adaptertools
from adaptertools.adapter import Adapter, LoraModule, Target


class Model(nnx.Module):
    """Two nnx.LoRA layers, of which one is in bfloat16."""

    def __init__(self) -> None:
        self.layers = nnx.List(
            [
                nnx.LoRA(6, 2, 5, rngs=nnx.Rngs(i), param_dtype=dtype)
                for i, dtype in enumerate((jnp.float32, jnp.bfloat16))
            ]
        )
        for layer in self.layers:
            layer.lora_b[...] = jax.random.normal(jax.random.key(1), (2, 5), layer.lora_b.dtype)


def of_state(model: Model) -> Any:
    return nnx.state(model, nnx.LoRAParam)


def of_dict(model: Model) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))


def by_standard(tree: Any, folder: Path) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def by_pytree(tree: Any, folder: Path, **options: Any) -> Path:
    with ocp.PyTreeCheckpointer(**options) as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def by_zarr3(tree: Any, folder: Path) -> Path:
    return by_pytree(tree, folder, use_zarr3=True)


def by_plain_folders(tree: Any, folder: Path) -> Path:
    return by_pytree(tree, folder, use_ocdbt=False)


def by_manager(tree: Any, folder: Path) -> Path:
    with ocp.CheckpointManager(folder) as manager:
        manager.save(7, args=ocp.args.Composite(model_params=ocp.args.StandardSave(tree)))
    return folder


SAVERS = [by_standard, by_pytree, by_zarr3, by_plain_folders, by_manager]


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize("tree_of", [of_state, of_dict])
def test_what_orbax_saved_of_nnx_is_read_in_its_dtypes(
    save: Callable[[Any, Path], Path], tree_of: Callable[[Model], Any], tmp_path: Path
) -> None:
    model = Model()
    adapter = adaptertools.read(save(tree_of(model), tmp_path / "checkpoint"))
    assert adapter.origin is not None
    assert (adapter.origin.format, adapter.origin.container) == ("flax", "orbax")
    assert list(modules_of(adapter)) == ["layers.0", "layers.1"]
    assert [module.lora_A.dtype for module in adapter.modules] == [torch.float32, torch.bfloat16]
    for index, layer in enumerate(model.layers):
        product = np.asarray(layer.lora_a[...], np.float64) @ np.asarray(layer.lora_b[...], np.float64)
        np.testing.assert_allclose(delta(adapter, f"layers.{index}"), product, rtol=1e-12)


def sample() -> Adapter:
    generator = torch.Generator().manual_seed(0)
    return Adapter(
        modules=tuple(
            LoraModule(
                target=Target(parameter=f"model.layers.{index}.fc"),
                lora_A=torch.randn(2, 6, generator=generator).to(dtype),
                lora_B=torch.randn(5, 2, generator=generator).to(dtype),
                alpha=4,
            )
            for index, dtype in enumerate((torch.float32, torch.bfloat16))
        )
    )


def restored_by_standard(folder: Path) -> Any:
    return ocp.StandardCheckpointer().restore(folder)


def restored_by_pytree(folder: Path) -> Any:
    return ocp.PyTreeCheckpointer().restore(folder)


def restored_by_version_1(folder: Path) -> Any:
    return ocp.v1.load(folder)


@pytest.mark.filterwarnings("ignore:.*[Ss]harding:UserWarning")
@pytest.mark.parametrize("restore", [restored_by_standard, restored_by_pytree, restored_by_version_1])
@pytest.mark.parametrize(
    ("format", "leaves"), [("flax", ("lora_a", "lora_b")), ("flax-qwix", ("kernel_lora_a", "kernel_lora_b"))]
)
def test_orbax_restores_what_we_write(
    restore: Callable[[Path], Any], format: str, leaves: tuple[str, str], tmp_path: Path
) -> None:
    adapter = sample()
    folder = write(adapter, tmp_path / "flax", format, container="orbax")
    assert_identical(adapter, adaptertools.read(folder))
    assert_identical(adapter, adaptertools.read(folder / "flax_adapter.orbax"))
    layers = restore(folder / "flax_adapter.orbax")["model"]["layers"]
    scale = 2.0 if format == "flax" else 1.0
    for index, module in enumerate(adapter.modules):
        a, b = (np.asarray(layers[str(index)]["fc"][leaf], np.float32) for leaf in leaves)
        np.testing.assert_array_equal(a, module.lora_A.T.float().numpy())
        np.testing.assert_array_equal(b, scale * module.lora_B.T.float().numpy())
    assert str(layers["1"]["fc"][leaves[0]].dtype) == "bfloat16"


@pytest.mark.parametrize("container", ["msgpack", "npz", "safetensors", "orbax"])
def test_reading_needs_neither_flax_nor_jax(container: str, tmp_path: Path) -> None:
    folder = write(sample(), tmp_path / "flax", "flax-qwix", container=container)
    program = (
        "import sys, json, adaptertools\n"
        f"adapter = adaptertools.read({str(folder)!r})\n"
        "adaptertools.write(adapter, sys.argv[1], format='flax')\n"
        "print(json.dumps([sorted({'jax', 'flax', 'orbax', 'qwix'} & set(sys.modules)), len(adapter.modules)]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "again")], capture_output=True, text=True, check=True
    )
    assert json.loads(ran.stdout) == [[], 2]
