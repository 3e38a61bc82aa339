"""The house rules that a test can hold: who imports whom, what starts without torch, how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from adaptertools import formats

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "adaptertools"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = (
    {"errors"},
    {"tensors", "names"},
    {"module"},
    {"convolution"},
    {"adapter"},
    {"encoding"},
    {"stating"},
    {"containers"},
    {"linalg"},
    {"dialects"},
    {"formats", "operations", "merging", "consumers"},
    {"hub", "destination"},
    {"api"},
    {"cli"},
)
"""Each imports only what stands above it, and its own room; formats not even that, as a test of their own says."""

EXCEPTIONS = {
    ("adapter.py", "api"),  # Adapter.to_state_dict stands where users look for it
    ("__main__.py", "cli"),
}

ONLY_IN = {"click": "cli", "huggingface_hub": "hub", "tqdm": "cli"}
OPTIONAL = {"tensorstore", "gguf"}


def room(path: Path) -> str:
    """The part of the package that a file belongs to: `containers`, `api`; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """The syntax tree of a file, node by node."""
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path: Path, *, at_import_time: bool = False) -> Iterator[str]:
    """The dotted names that a file imports, `from a import b` as `a.b`."""
    nodes = nodes_of(path)
    lazy = {
        id(inner)
        for node in (nodes if at_import_time else ())
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node)
        for inner in ast.walk(node)
    }
    for node in nodes:
        if id(node) in lazy:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def rooms_imported(path: Path) -> Iterator[str]:
    """The rooms of the package that a file imports; `from adaptertools import read` names none."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "adaptertools" and len(parts) > 1 and is_room(parts[1]):
            yield parts[1]


def is_room(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def layer(name: str) -> int:
    return next(depth for depth, names in enumerate(LAYERS) if name in names)


def label(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=label)
def test_a_file_imports_only_what_stands_above_it(path: Path) -> None:
    own = room(path)
    for other in rooms_imported(path):
        if own not in ("", other) and (label(path), other) not in EXCEPTIONS:
            assert layer(other) < layer(own), f"{label(path)} imports {other}, which does not stand above {own}"


def test_formats_never_import_each_other() -> None:
    names = {path.stem for path in (PACKAGE / "formats").glob("*.py")} - {"__init__"}
    for path in (PACKAGE / "formats").glob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            assert not (parts[:2] == ["adaptertools", "formats"] and set(parts[2:]) & names), f"{path.name}: {name}"


@pytest.mark.parametrize(("package", "home"), ONLY_IN.items())
def test_each_outer_package_has_one_home(package: str, home: str) -> None:
    users = {label(path) for path in FILES for name in imports(path) if name.split(".")[0] == package}
    assert all(room(PACKAGE / user) == home for user in users), f"{package} is imported by {users}"


def test_optional_packages_are_imported_only_inside_functions() -> None:
    for path in FILES:
        for name in imports(path, at_import_time=True):
            assert name.split(".")[0] not in OPTIONAL, f"{label(path)} imports {name} when it is itself imported"


def test_commands_import_the_library_only_when_they_run() -> None:
    allowed = {"adaptertools.errors", "adaptertools.cli", "adaptertools.__version__"}
    for path in (PACKAGE / "cli").glob("*.py"):
        for name in imports(path, at_import_time=True):
            if name.startswith("adaptertools."):
                assert any(f"{name}.".startswith(f"{home}.") for home in allowed), f"{label(path)} imports {name}"
            assert name.split(".")[0] not in {"torch", "numpy", "tqdm"}, f"{label(path)} imports {name}"


def test_only_the_command_line_prints_or_exits() -> None:
    for path in FILES:
        if room(path) == "cli":
            continue
        for node in nodes_of(path):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"print", "exit", "quit", "sys.exit", "os._exit"}, f"{label(path)}:{node.lineno}"


TORCH_FREE = {
    "importing the package": "import adaptertools",
    "listing its names": "import adaptertools; dir(adaptertools)",
    "the help": "from adaptertools.cli import group; group(['--help'], standalone_mode=False)",
    "the help of a command": "from adaptertools.cli import group; group(['convert', '--help'], standalone_mode=False)",
    "the version": "from adaptertools.cli import group; group(['--version'], standalone_mode=False)",
}


@pytest.mark.parametrize("code", TORCH_FREE.values(), ids=list(TORCH_FREE))
def test_no_torch_is_loaded_for(code: str) -> None:
    check = f"{code}\nimport sys\nassert not {{'torch', 'numpy', 'huggingface_hub', 'tqdm'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


@pytest.mark.parametrize("path", FILES, ids=label)
def test_no_file_is_longer_than_350_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("[!_]*.py")), ids=label)
def test_no_command_is_longer_than_80_lines(path: Path) -> None:
    commands = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "command" and node.decorator_list
    ]
    assert all((node.end_lineno or 0) - node.lineno < 80 for node in commands)


def test_the_root_holds_what_was_agreed() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = {line.split("/")[0] for line in listed.stdout.splitlines()}
    shown = {name for name in names if not name.startswith(".")}
    assert shown <= {"adaptertools", "tests", "fixtures", "pyproject.toml", "README.md", "LICENSE"}


def public_definitions(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """The functions and classes of a module that a user or a sibling may call, and its own top."""
    tree = ast.parse(path.read_text())
    yield path.name, tree
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node


CONTRACT_FUNCTIONS = {
    "formats": {"detect", "read", "write"},
    "containers": {"sniff", "read", "write"},
}
"""What the contract in a folder's `__init__` describes once for all its modules."""


@pytest.mark.parametrize("path", FILES, ids=label)
def test_every_public_function_and_class_has_a_docstring(path: Path) -> None:
    if path.name == "__main__.py":
        return
    for name, node in public_definitions(path):
        described = ast.get_docstring(node) or name in CONTRACT_FUNCTIONS.get(room(path), ())  # type: ignore[arg-type]
        assert described, f"{label(path)}: {name} has no docstring"


@pytest.mark.parametrize("name", formats.names())
def test_a_format_keeps_the_contract(name: str) -> None:
    module = formats.get(name)
    assert isinstance(module.SUMMARY, str)
    assert len(module.SUMMARY) <= 100
    assert "\n" not in module.SUMMARY
    assert isinstance(module.CONTAINERS, tuple)
    assert isinstance(module.FOLDER, bool)
    assert isinstance(module.CONFIG, str)
    assert isinstance(module.FILES, tuple)
    assert isinstance(module.CARRIES, frozenset)
    assert module.__doc__, "a format opens with its key grammar"
    for function in (module.detect, module.read, module.write):
        assert callable(function)
