"""Names of modules as a checkpoint of mlx-lm has them, and how many experts a model has."""

from collections.abc import Mapping
from dataclasses import replace

from adaptertools.containers import safetensors
from adaptertools.containers.checkpoint import Checkpoint
from adaptertools.dialects.mlx.layout import Layer
from adaptertools.dialects.mlx.record import Record
from adaptertools.errors import MatchError
from adaptertools.tensors import natural_order

_LEADING = frozenset({"backbone", "language_model", "model", "text_model", "transformer"})
"""What stands in front of the layers of a language model, in one order or another."""

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def is_of_mlx(base: Checkpoint) -> bool:
    """Whether mlx-lm has saved the checkpoint: its header says so."""
    if base.container != "safetensors" or not base.files:
        return False
    header, _ = safetensors.read_header(base.files[0])
    return (header.get("__metadata__") or {}).get("format") == "mlx"


def experts_of(base: Checkpoint) -> int | None:
    """The number of experts that a model's configuration states."""
    text = base.config.get("text_config")
    for config in (base.config, text if isinstance(text, Mapping) else {}):
        for key in _EXPERT_COUNTS:
            if type(config.get(key)) is int:
                return int(config[key])
    return None


def named_as_in(base: Checkpoint, layers: list[Layer], record: Record) -> tuple[list[Layer], Record]:
    """The layers under the names that a checkpoint of mlx-lm has for them, and the record of what they were called.

    Raises: MatchError for a module that it does not have, or has several times
    """
    names = _Names(base)
    found = {layer.path: names.find(layer.path) for layer in layers}
    parts = {half for halves in record.gate_up.values() for half in halves} | record.experts.keys()
    renamed = {path: new for path, new in found.items() if path not in parts and new != record.names.get(path, path)}
    return (
        sorted(
            (replace(layer, path=found[layer.path]) for layer in layers), key=lambda layer: natural_order(layer.path)
        ),
        replace(
            record,
            ranks={found[path]: rank for path, rank in record.ranks.items()},
            embeddings=None if record.embeddings is None else tuple(found[path] for path in record.embeddings),
            experts={found[path]: experts for path, experts in record.experts.items()},
            gate_up={name: (found[gate], found[up]) for name, (gate, up) in record.gate_up.items()},
            names={new: record.names.get(path, path) for path, new in renamed.items()},
        ),
    )


class _Names:
    """The modules of a checkpoint, found whatever stands in front of their names."""

    def __init__(self, base: Checkpoint) -> None:
        self._label = base.label
        self._modules = {name.removesuffix(".weight") for name in base.shapes if name.endswith(".weight")}
        self._alike: dict[str, list[str]] = {}
        for name in self._modules:
            self._alike.setdefault(_bare(name), []).append(name)

    def find(self, path: str) -> str:
        if path in self._modules:
            return path
        alike = self._alike.get(_bare(path), [])
        if len(alike) != 1:
            several = f"several modules fit: {', '.join(alike)}" if alike else "there is no such module"
            raise MatchError(
                f"{path}: {several} in {self._label}, whose names are like {min(self._modules)}; mlx-lm would refuse "
                "the file. Rename it (--rename), or leave it out (--exclude)"
            )
        return alike[0]


def _bare(name: str) -> str:
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _LEADING:
        del parts[0]
    return ".".join(parts)
