"""Module-path rules: what wrappers put around a name, and what remains of it."""

from fnmatch import fnmatchcase

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Path parts that torch.compile, DDP, FSDP and activation checkpointing insert."""

_INNER_WRAPPERS = frozenset(WRAPPERS) - {"module"}
"""Those that no model uses as a name of its own, so that they go wherever they stand."""

STATE_DICT_KEYS = ("model_state_dict", "state_dict", "model", "module")
"""Keys under which training loops wrap a state dict."""


def strip_wrappers(name: str) -> str:
    """The name without the parts that wrappers inserted: `module.` in front, the others anywhere.

    >>> strip_wrappers("module._orig_mod.model.layers.0._fsdp_wrapped_module.q_proj")
    'model.layers.0.q_proj'
    """
    parts = [part for part in name.split(".") if part not in _INNER_WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def strip_state_dict(key: str) -> str:
    """The key without those under which training loops wrap a state dict.

    >>> strip_state_dict("model/transformer.h.0.attn.qkv.lora_A")
    'transformer.h.0.attn.qkv.lora_A'
    """
    first, _, rest = key.partition("/")
    while rest and first in STATE_DICT_KEYS:
        key = rest
        first, _, rest = key.partition("/")
    return key


def strip_prefix(name: str, prefix: str) -> str:
    """The name without `prefix`, however often it stands in front."""
    while name.startswith(prefix):
        name = name.removeprefix(prefix)
    return name


def parent(name: str) -> str:
    """The module that holds a parameter: `a.b` of `a.b.weight`."""
    return name.rpartition(".")[0]


def leaf(name: str) -> str:
    """The last part of a name: `weight` of `a.b.weight`."""
    return name.rpartition(".")[2]


def join(*parts: str) -> str:
    """Path parts joined with dots, empty ones left out."""
    return ".".join(part for part in parts if part)


def matches(pattern: str, name: str) -> bool:
    """Whether a glob pattern fits a whole name, or its last parts.

    >>> matches("q_proj", "model.layers.0.q_proj"), matches("model.layers.1.*", "model.layers.10.q_proj")
    (True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
