"""YAML documents beside tensors: small, always a mapping, and read without building any object but plain ones."""

from pathlib import Path
from typing import Any

from adaptertools.containers.tensorfile import file_size, reading
from adaptertools.errors import DamagedFileError, UnsafeFileError

MAX_BYTES = 1_000_000
"""More than any configuration has; the parser needs about a minute for ten times as much."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises: DamagedFileError if it is not one; UnsafeFileError if the file is larger than any configuration
    """
    import yaml

    with reading(path):
        if file_size(path) > MAX_BYTES:
            raise UnsafeFileError(f"{path}: {file_size(path)} bytes are more than any configuration needs")
        try:
            value = yaml.safe_load(path.read_bytes())
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise DamagedFileError(f"{path}: not valid YAML ({_first_line(error)})") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise DamagedFileError(f"{path}: expected a YAML mapping with names as keys, found {type(value).__name__}")
    return value


def _first_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    return f"{problem}, line {mark.line + 1}" if mark is not None else str(problem)
