"""What a merged model has to consist of beside values: its tensors' names, its index, its configuration, its files."""

import filecmp
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from adaptertools.containers.checkpoint import CONFIG, Checkpoint
from adaptertools.containers.jsonfile import read_json
from adaptertools.errors import few
from adaptertools.merging.plan import MergePlan
from adaptertools.tensors import dtype_name

_MOST = 5

_BUFFER = re.compile(r"(.*\.)?(position_ids|rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias)")
"""What older checkpoints hold of a model and its class makes anew, so that newer libraries do not save it."""


def dropped_buffers(plan: MergePlan, merged: Checkpoint) -> list[str]:
    """The tensors that a merge lacks and needs not: positions, frequencies and masks, which are nobody's weights."""
    missing = [name for name in plan.base.shapes if name not in merged.shapes and name not in plan.edits]
    return [name for name in missing if _BUFFER.fullmatch(name) and _is_no_bias(name, plan.base.shapes[name])]


def _is_no_bias(name: str, shape: tuple[int, ...]) -> bool:
    """GPT-2's attn.bias is a mask of four dimensions."""
    return not name.endswith("attn.bias") or len(shape) == 4


def problems_of_names(
    plan: MergePlan, merged: Checkpoint, dropped: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """What is wrong with the names, shapes and dtypes of the tensors, and the names of those that can be compared.

    `dropped` are tensors that may be missing.
    """
    expected = [name for shard in plan.shards for name in shard.tensors]
    problems = []
    missing = [name for name in expected if name not in merged.shapes and name not in dropped]
    extra = [name for name in merged.shapes if name not in set(expected)]
    if missing:
        problems.append(f"missing: {few(missing, _MOST)}")
    if extra:
        problems.append(f"not of this model: {few(extra, _MOST)}")
    comparable = []
    for name in expected:
        if name not in merged.shapes:
            continue
        edit = plan.edits.get(name)
        shape = edit.shape if edit else plan.base.shapes[name]
        dtype = edit.dtype if edit else plan.base.dtypes[name]
        if (tuple(merged.shapes[name]), merged.dtypes[name]) == (tuple(shape), dtype):
            comparable.append(name)
        else:
            found = _described(merged.shapes[name], merged.dtypes[name])
            problems.append(f"{name} is {found}, expected {_described(shape, dtype)}")
    return problems, comparable


def problems_of_files(plan: MergePlan, merged: Checkpoint, ours: bool) -> list[str]:
    """What is wrong with the files beside the tensors. Other tools write configuration and small files anew."""
    problems, folder = _index_problems(plan, merged), merged.folder
    used = {path.name for path in merged.files}
    stray = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in used)
    if stray:
        problems.append(f"weights that are no part of the model: {few(stray, _MOST)}")
    problems += _config_problems(plan.config if not ours else {**plan.base.config, **plan.config}, merged, ours)
    if ours:
        problems += _copy_problems(plan, merged)
    return problems


def _index_problems(plan: MergePlan, merged: Checkpoint) -> list[str]:
    """The total size of the index; that it names the right shard for every tensor was checked when it was opened."""
    stated = _stated_size(merged)
    real = sum(torch.Size(shape).numel() * merged.dtypes[name].itemsize for name, shape in merged.shapes.items())
    if stated is None or stated == real or stated == _stated_size(plan.base):
        return []
    return [f"the index states a total_size of {stated}, the tensors take {real} bytes"]


def _stated_size(checkpoint: Checkpoint) -> Any:
    metadata = read_json(checkpoint.index).get("metadata") if checkpoint.index else None
    return metadata.get("total_size") if isinstance(metadata, dict) else None


def _config_problems(expected: Mapping[str, Any], merged: Checkpoint, ours: bool) -> list[str]:
    odd = [key for key, value in expected.items() if merged.config.get(key) != value]
    odd += [key for key in merged.config if key not in expected] if ours else []
    return [f"{CONFIG}: {key} is {merged.config.get(key)!r}, expected {expected.get(key)!r}" for key in odd[:_MOST]]


def _copy_problems(plan: MergePlan, merged: Checkpoint) -> list[str]:
    """Small files that travel along, byte by byte. Of a merge on the Hub those are here that a model needs."""
    problems = []
    source, folder = plan.base.folder, merged.folder
    partly = merged.opened is not None and merged.opened.is_remote
    for name in plan.copied:
        if name == CONFIG:
            continue
        if not (folder / name).is_file():
            if not partly:
                problems.append(f"{name} is missing, a file of the base")
        elif not filecmp.cmp(source / name, folder / name, shallow=False):
            problems.append(f"{name} is not that of the base")
    return problems


def _described(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{tuple(shape)} in {dtype_name(dtype)}"
