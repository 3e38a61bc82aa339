"""Options of the Flax formats that cannot apply: each is an error that says which option needs what."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flax_oracle import H, assert_identical, decoder, module, write

import adaptertools
from adaptertools.adapter import Adapter
from adaptertools.errors import OptionError


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("flax", {"num_layers": 4}, "num_layers.*needs scan_axis"),
        ("flax", {"num_layers": 0, "scan_axis": 0}, "num_layers is 0"),
        ("flax", {"num_layers": 1, "scan_axis": 0}, "num_layers is 1, but the adapter has a layer 1"),
        ("flax", {"scan_at": "blocks"}, "scan_at.*needs scan_axis"),
        ("flax", {"scan_at": "blocks", "scan_axis": 0}, r"'blocks'.*like model\.layers\.0\.\w+\.\w+\. Give scan_at"),
        ("flax", {"naming": "tunix-llama", "scan_at": "blocks", "scan_axis": 0}, "scan_at needs naming=hf"),
        ("flax", {"layer_prefix": "model.layers"}, "layer_prefix needs a naming.*the naming is hf"),
        ("flax-qwix", {"head_dim": H}, "head_dim needs naming=tunix-llama or tunix-gemma; the naming hf"),
        ("flax-qwix", {"naming": "maxtext", "head_dim": H}, "head_dim needs arch=llama3.1.*two dimensions"),
        ("flax-qwix", {"fuse_qkv": True}, "fuse_qkv needs naming=tunix-gemma"),
        ("flax-qwix", {"naming": "tunix-llama", "head_dim": H, "fuse_qkv": False}, "tunix-llama fuses nothing"),
        ("flax-qwix", {"naming": "tunix-llama", "arch": "llama3.1", "head_dim": H}, "the naming is tunix-llama"),
        ("flax-qwix", {"naming": "maxtext", "arch": "llama3.1"}, "needs head_dim"),
        ("flax-gemma", {"head_dim": H}, "head_dim needs naming=gemma"),
        ("flax-gemma", {"fuse_qkv": True}, "fuse_qkv needs naming=gemma"),
    ],
)
def test_a_writer_option_that_cannot_apply_is_refused(
    format: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        write(decoder(2), tmp_path / "flax", format, **options)
    assert not (tmp_path / "flax").exists()


def test_a_scan_axis_without_any_layer_is_refused(tmp_path: Path) -> None:
    head = Adapter(modules=(module("lm_head", 4, 3),))
    for naming in ("hf", "maxtext"):
        with pytest.raises(OptionError, match=r"scan_axis: no module has a layer index.*lm_head"):
            write(head, tmp_path / "flax", "flax-qwix", naming=naming, scan_axis=1)


@pytest.mark.parametrize(
    ("naming", "options", "message"),
    [
        ("hf", {"scan_axis": 0}, "scan_axis: no leaf stacks layers.*model/layers/0/"),
        ("hf", {"scan_axis": 2}, "expected 0 or 1"),
        ("hf", {"scan_at": "blocks"}, "scan_at: no leaf stacks layers.*'blocks'"),
        ("hf", {"layer_prefix": "layers"}, "layer_prefix needs a naming.*the naming is hf"),
        ("hf", {"head_dim": H}, "head_dim needs arch"),
        ("hf", {"arch": "llama3.1", "head_dim": H}, "needs naming=maxtext, but the naming is hf"),
        ("maxtext", {"scan_at": "layers"}, "scan_at needs naming=hf; the naming maxtext"),
        ("maxtext", {"scan_axis": 1}, "scan_axis: no leaf stacks layers.*decoder/layers_0/"),
        ("maxtext", {"head_dim": H}, "head_dim needs arch"),
        ("maxtext", {"arch": "llama3.1"}, "needs head_dim"),
        ("maxtext", {"arch": "gemma", "head_dim": H}, "only llama3.1 is known"),
    ],
)
def test_a_reader_option_that_cannot_apply_is_refused(
    naming: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write(decoder(1), tmp_path / "flax", "flax-qwix", naming=naming)
    bare = tmp_path / "bare.msgpack"
    bare.write_bytes((folder / "flax_adapter.msgpack").read_bytes())
    assert adaptertools.read(bare, alpha=4).modules
    with pytest.raises(OptionError, match=message):
        adaptertools.read(bare, alpha=4, **options)


def test_an_arch_other_than_the_one_of_the_sidecar_is_refused(tmp_path: Path) -> None:
    arch = {"arch": "llama3.1", "head_dim": H}
    plain = write(decoder(1), tmp_path / "plain", "flax-qwix", naming="maxtext")
    with pytest.raises(OptionError, match=r"arch is 'llama3.1', but .*flax_adapter.json says None"):
        adaptertools.read(plain, **arch)
    turned = write(decoder(1), tmp_path / "turned", "flax-qwix", naming="maxtext", **arch)
    assert_identical(adaptertools.read(turned), adaptertools.read(turned, **arch))
    with pytest.raises(OptionError, match="head_dim is 2, but"):
        adaptertools.read(turned, head_dim=2)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("flax", {}),
        ("flax", {"scan_axis": 0, "num_layers": 4}),
        ("flax", {"naming": "tunix-llama", "scan_axis": 1}),
        ("flax-qwix", {"naming": "tunix-llama", "head_dim": H}),
        ("flax-qwix", {"naming": "tunix-gemma", "head_dim": H, "scan_axis": 0}),
        ("flax-qwix", {"naming": "maxtext", "scan_axis": 1}),
        ("flax-qwix", {"naming": "maxtext", "arch": "llama3.1", "head_dim": H}),
        ("flax-gemma", {"naming": "gemma", "head_dim": H, "fuse_qkv": False, "scan_axis": 0}),
    ],
)
def test_the_options_that_a_reader_finds_are_taken_by_the_writer(
    format: str, options: dict[str, Any], tmp_path: Path
) -> None:
    # in bfloat16, where even the query scale of llama3.1 is folded and undone bit for bit
    first = adaptertools.read(write(decoder(2, dtype=torch.bfloat16), tmp_path / "first", format, **options))
    assert first.origin is not None
    second = adaptertools.read(write(first, tmp_path / "second", format, **first.origin.options))
    assert second.origin is not None
    assert second.origin.options == first.origin.options
    assert_identical(first, second)


def test_stacks_under_another_name_are_replayed_too(tmp_path: Path) -> None:
    blocks = Adapter(modules=tuple(module(f"blocks.{i}.fc", 4, 3) for i in range(3)))
    first = adaptertools.read(write(blocks, tmp_path / "first", "flax", scan_axis=0, scan_at="blocks"))
    assert first.origin is not None
    assert first.origin.options == {"scan_axis": 0, "num_layers": 3, "scan_at": "blocks"}
    assert_identical(blocks, adaptertools.read(write(first, tmp_path / "second", "flax", **first.origin.options)))
