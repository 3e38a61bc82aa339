"""Base models of any size that take no room on the disk: their headers are whole, their weights are holes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptertools.adapter import Adapter


def hollow_model(folder: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Path:
    """A folder with a model of these weights, all zero, and this config.json."""
    header: dict[str, Any] = {}
    size = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [size, size + 2 * math.prod(shape)]}
        size = header[name]["data_offsets"][1]
    encoded = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + size)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shapes_of(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The weights that an adapter changes, as they are in a model."""
    return {f"{module.target.parameter}.weight": module.weight_shape for module in adapter.modules}
