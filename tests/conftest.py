"""What several test files need: a small adapter, files of it, and the command line in-process."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hub_fixtures import hub, impatient, tool  # noqa: F401  (fixtures)
from proof import proven

import adaptertools
from adaptertools import api
from adaptertools.adapter import Adapter, Base
from adaptertools.module import LoraModule, Target

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # on a GPU jax multiplies in TF32 and takes most of the memory
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the cores are taken by the other processes


@pytest.fixture(scope="session", autouse=True)
def every_conversion_is_proven() -> Iterator[None]:
    """Whatever any test converts, in Python or on the command line, `diff` compares with what it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "convert", proven(api.convert))
        yield


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout; anything else beside it fails here."""
        document: dict[str, Any] = json.loads(self.out)
        return document


@pytest.fixture
def run() -> Callable[..., Ran]:
    """Run `adaptertools ARGS…` in this process."""
    from adaptertools.cli import group

    def call(*args: str | Path, **env: str) -> Ran:
        result = CliRunner(env=env).invoke(group, [str(arg) for arg in args], prog_name="adaptertools")
        return Ran(result.exit_code, result.stdout, result.stderr)

    return call


@pytest.fixture
def plain() -> Adapter:
    """Four linear modules of a two-layer model in float32: rank 4, alpha 16."""
    generator = torch.Generator().manual_seed(0)
    modules = tuple(
        LoraModule(
            target=Target(parameter=f"model.layers.{layer}.self_attn.{name}"),
            lora_A=torch.randn(4, 12, generator=generator),
            lora_B=torch.randn(8, 4, generator=generator),
            alpha=16.0,
        )
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
    )
    return Adapter(modules=modules, bases={"": Base(id="tiny/llama")})


@pytest.fixture
def peft_folder(plain: Adapter, tmp_path: Path) -> Path:
    """The plain adapter as a PEFT folder."""
    return adaptertools.write(plain, tmp_path / "adapter", format="peft").path
