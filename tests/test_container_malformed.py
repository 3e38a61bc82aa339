"""The container cases of fixtures/malformed: each raises its error, and they can be made again."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from adaptertools import containers, errors

ROOT = Path(__file__).parents[1] / "fixtures"
CASES = sorted((ROOT / "malformed").glob("*/container_*"))


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_malformed", ROOT / "generate_malformed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check(case: Path) -> None:
    with pytest.raises(errors.AdapterToolsError) as raised:
        containers.read(case)
    assert type(raised.value) is getattr(errors, case.parent.name), raised.value
    assert str(case) in str(raised.value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_reading_raises_the_error_that_the_case_is_filed_under(case: Path) -> None:
    check(case)


def test_the_cases_can_be_made_again(tmp_path: Path) -> None:
    generator().main(tmp_path)
    made = sorted(tmp_path.glob("*/container_*"))
    assert [case.relative_to(tmp_path) for case in made] == [case.relative_to(ROOT / "malformed") for case in CASES]
    for case in made:
        check(case)
