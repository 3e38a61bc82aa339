"""Plans made by hand, on small random bases: the engine is tested apart from how names are matched."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.merging.edits import Edit, Update
from adaptertools.merging.plan import MergePlan, OutputShard

ROWS, COLUMNS, RANK = 24, 16, 3


def make_base(
    folder: Path, *, shards: int = 3, layers: int = 2, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0
) -> Path:
    """A model of `shards` safetensors files in bfloat16, with an index, a configuration and a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {}
        for layer in range(layers):
            place = f"model.layers.{shard * layers + layer}"
            tensors[f"{place}.mlp.weight"] = torch.randn(rows, columns, generator=generator).bfloat16()
            tensors[f"{place}.norm.weight"] = torch.randn(columns + 1, generator=generator)
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    total -= sum(len(Checkpoint.open(path).header(path)) for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "tiny",   "vocab_size": 7}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def update(rows: int, columns: int, *, seed: int, source: int = 0, scale: float = 0.5, rank: int = RANK) -> Update:
    """A random addition to a whole matrix."""
    generator = torch.Generator().manual_seed(seed)
    return Update(
        source=source,
        target=f"target {seed}",
        left=torch.randn(rows, rank, generator=generator),
        right=torch.randn(rank, columns, generator=generator),
        scale=scale,
    )


def make_plan(
    base: Path, *, edits: Mapping[str, Edit] | None = None, sources: Sequence[str] = ("adapter",)
) -> MergePlan:
    """A plan that changes every `mlp` of a base, unless edits are given."""
    opened = Checkpoint.open(base)
    if edits is None:
        edits = {
            name: edit(opened, name, update(*shape, seed=place))
            for place, (name, shape) in enumerate(opened.shapes.items())
            if "mlp" in name
        }
    return MergePlan(
        base=opened,
        sources=tuple(sources),
        recorded=tuple(sources),
        weights=(1.0,) * len(sources),
        edits=edits,
        shards=tuple(
            OutputShard(name=path.name, tensors=opened.tensors_of[path.name], patches=True) for path in opened.files
        ),
        copied=("config.json", "tokenizer.json"),
    )


def edit(base: Checkpoint, name: str, *updates: Update, dtype: torch.dtype | None = None) -> Edit:
    """An edit of a matrix of the base."""
    rows, columns = base.shapes[name]
    return Edit(
        name=name,
        source=name,
        shape=(rows, columns),
        matrix=(rows, columns),
        dtype=dtype or base.dtypes[name],
        updates=updates,
    )


def reshaped(plan: MergePlan, *shards: OutputShard, **changes: object) -> MergePlan:
    """The plan with other files."""
    return replace(plan, shards=shards, **changes)


def dense(base: Tensor, made: Edit) -> Tensor:
    """What an edit of updates alone gives, in float64."""
    whole = base.to(torch.float64).reshape(made.matrix)
    for each in made.updates:
        whole[each.block] += each.scale * (each.left.double() @ each.right.double())
    return whole.reshape(made.shape)


def assert_rounded_once(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """The values are the exact ones to within half a unit of their last place, and the noise of float32 sums."""
    assert found.dtype == dtype
    assert found.shape == exact.shape
    noise = 1e-6 * (1 + float(exact.abs().max()))
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + noise).all()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
