"""The files of a merged model: shards, what changes in the configuration, and what travels along."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptertools.containers import safetensors
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.merging.edits import Edit

_TORCH_WEIGHTS = (".bin", ".ckpt", ".ot", ".pt", ".pth")
_OTHER_WEIGHTS = (".gguf", ".ggml", ".h5", ".mlmodel", ".msgpack", ".npz", ".onnx", ".onnx_data", ".pte", ".tflite")
_WEIGHTS = (*_TORCH_WEIGHTS, *_OTHER_WEIGHTS, ".safetensors", ".index.json")
_FOLDERS_OF_WEIGHTS = frozenset(("coreml", "gguf", "metal", "onnx", "openvino", "original", "runs"))
_NOT_OF_A_MODEL = frozenset(("adapter_config.json", "adaptertools_merge.json"))
_MODULES = "modules.json"
_MOST_BYTES = 256 << 20
_TORCH_STEM, _STEM = "pytorch_model", "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputShard:
    """A file of the result: its name, and its tensors in the order in which they stand there.

    `patches` says that nothing about it changes but bytes of tensors: it is the base's own safetensors file with its
    header, and whatever no edit names is copied as it is. Else a header is made anew.
    """

    name: str
    tensors: tuple[str, ...]
    patches: bool


def shards(base: Checkpoint, edits: Mapping[str, Edit]) -> tuple[OutputShard, ...]:
    """One for each file of the base; tensors that it does not have stand at the end of the last one."""
    added = tuple(name for name in edits if name not in base.shapes)
    found = []
    for file in base.files:
        tensors = base.tensors_of[file.name] + (added if file == base.files[-1] else ())
        kept = all(_keeps_its_place(base, edits[name]) for name in tensors if name in edits)
        patches = base.container == safetensors.NAME and kept
        found.append(OutputShard(name=_shard_name(base, file), tensors=tensors, patches=patches))
    return tuple(found)


def _keeps_its_place(base: Checkpoint, edit: Edit) -> bool:
    return base.shapes.get(edit.name) == edit.shape and base.dtypes[edit.name] == edit.dtype


def _shard_name(base: Checkpoint, file: Path) -> str:
    """The file's own name; that of a torch file as transformers names safetensors."""
    if base.container == safetensors.NAME:
        return file.name
    stem = file.name.partition(".")[0] if len(base.files) == 1 else file.name.rpartition(".")[0]
    return f"{stem.replace(_TORCH_STEM, _STEM) if len(base.files) > 1 else _STEM}{safetensors.SUFFIX}"


def copied(base: Checkpoint) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files that travel along, and those of weights that do not, by their paths in the base's folder."""
    kept: list[str] = []
    left: list[str] = []
    if not base.files:  # weights in memory
        return (), ()
    own = {file.name for file in base.files} | ({base.index.name} if base.index else set())
    pipeline = _pipeline_folders(base.folder)
    for path in _walk(base.folder, pipeline):
        name = path.relative_to(base.folder).as_posix()
        if name in own or path.name in _NOT_OF_A_MODEL:
            continue
        (kept if _travels(path, name, pipeline) else left).append(name)
    return tuple(sorted(kept)), tuple(sorted(left))


def _walk(folder: Path, pipeline: frozenset[str], inside: str = "") -> Iterator[Path]:
    """The files below a folder; hidden ones and folders of other weights left out."""
    for entry in os.scandir(folder):
        name = f"{inside}{entry.name}"
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            yield Path(entry.path)
        elif entry.is_dir(follow_symlinks=False) and _belongs(name, pipeline):
            yield from _walk(Path(entry.path), pipeline, f"{name}/")


def _belongs(folder: str, pipeline: frozenset[str]) -> bool:
    leaf = folder.rpartition("/")[2]
    return folder in pipeline or not (leaf in _FOLDERS_OF_WEIGHTS or leaf.startswith("checkpoint-"))


def _travels(path: Path, name: str, pipeline: frozenset[str]) -> bool:
    if not path.name.endswith(_WEIGHTS):
        return path.stat().st_size <= _MOST_BYTES
    other = path.name.endswith(".bin") and path.with_name(f"{_STEM}{safetensors.SUFFIX}").exists()
    return name.rpartition("/")[0] in pipeline and not other


def _pipeline_folders(folder: Path) -> frozenset[str]:
    """The folders of what sentence-transformers puts behind the model: pooling, and dense layers with weights."""
    path = folder / _MODULES
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        return frozenset()
    try:
        modules = json.loads(path.read_bytes())
    except ValueError:
        return frozenset()
    paths = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return frozenset(path for path in paths if isinstance(path, str) and path)


def configuration(
    base: Checkpoint,
    *,
    untied: bool,
    vocabulary: tuple[int, int] | None,
    labels: int | None,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """What changes in the base's configuration: whole values by their keys at its top.

    `vocabulary` is the old and the new number of tokens.
    """
    config = dict(base.config)
    if not config:
        return {}
    if untied:
        config = _set(config, "tie_word_embeddings", lambda _: False)
    if vocabulary is not None:
        old, new = vocabulary
        config = _set(config, "vocab_size", lambda value: new if value in (old, None) else value)
        text = config.get("text_config")
        if isinstance(text, Mapping):
            config["text_config"] = {**text, "vocab_size": new}
        else:
            config["vocab_size"] = new
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config = _set(config, key, lambda _: str(dtype).removeprefix("torch."))
    if labels is not None and labels != _labels(config):
        config["id2label"] = {str(index): f"LABEL_{index}" for index in range(labels)}
        config["label2id"] = {f"LABEL_{index}": index for index in range(labels)}
    return {key: value for key, value in config.items() if key not in base.config or base.config[key] != value}


def _set(config: dict[str, Any], key: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    """A value changed wherever it stands, at the top or a level below; at the top if it stands nowhere."""
    new = {
        name: {**part, key: change(part[key])} if isinstance(part, Mapping) and key in part else part
        for name, part in config.items()
    }
    if key in config or new == config:
        inner = "text_config" if key not in config and isinstance(config.get("text_config"), Mapping) else None
        if inner is None:
            new[key] = change(config.get(key))
        elif key not in config[inner]:
            new[inner] = {**config[inner], key: change(None)}
    return new


def _labels(config: Mapping[str, Any]) -> int:
    stated = config.get("id2label")
    return len(stated) if isinstance(stated, Mapping) else 2
