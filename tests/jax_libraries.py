"""tunix and the gemma library, of which only the models are wanted: their packages import whole training stacks.

pip install --no-deps google-tunix==0.1.7 gemma==3.3.0 jaxtyping==0.3.11 wadler-lindig==0.1.8 einops==0.8.2
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest


def require(*packages: str) -> None:
    """Skip the test file where one of these is not installed, and say how to install it."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; {__doc__.splitlines()[-1].strip()}", allow_module_level=True)


def hollow(name: str, parent: ModuleType | None = None) -> ModuleType:
    """The package without what its `__init__` does: its modules can be imported, and only they are."""
    if name in sys.modules:
        return sys.modules[name]
    if parent is None:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        paths = list(spec.submodule_search_locations or [])
    else:
        paths = [f"{path}/{name.rpartition('.')[2]}" for path in parent.__path__]
    package = ModuleType(name)
    package.__path__ = paths
    sys.modules[name] = package
    return package


class _Kauldron(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """kauldron gives gemma type annotations and a no-op layer, and needs TensorFlow for more."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "kauldron":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        module = MagicMock(__path__=[], __spec__=spec, __name__=spec.name)
        module.kd.nn.Identity.return_value = lambda x: x
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def gemma_modules() -> tuple[Any, Any]:
    """gemma's `_modules` (Block) and `_lora` (gm.nn.LoRA and what it wraps)."""
    sys.meta_path.insert(0, _Kauldron())
    try:
        gm = hollow("gemma.gm", hollow("gemma"))
        hollow("gemma.gm.nn", gm)
        return importlib.import_module("gemma.gm.nn._modules"), importlib.import_module("gemma.gm.nn._lora")
    finally:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Kauldron)]


def tunix_module(name: str) -> Any:
    """A module of tunix, such as `models.llama3.model`."""
    hollow("tunix")
    return importlib.import_module(f"tunix.{name}")
