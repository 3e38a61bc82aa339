"""What the tests of faults share: how a failure looks, and adapters to put on the Hub."""

from collections.abc import Mapping
from pathlib import Path

import torch
from conftest import Ran
from hub_server import HubServer

import adaptertools
from adaptertools.adapter import Adapter, Base
from adaptertools.module import LoraModule, Target


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wide(tmp_path: Path) -> Path:
    """A PEFT folder of 25 MB: what comes in more than one piece."""
    generator = torch.Generator().manual_seed(1)
    modules = tuple(
        LoraModule(
            target=Target(parameter=f"model.layers.{layer}.mlp.up_proj"),
            lora_A=torch.randn(64, 8192, generator=generator),
            lora_B=torch.randn(8192, 64, generator=generator),
            alpha=64.0,
        )
        for layer in range(6)
    )
    adapter = Adapter(modules=modules, bases={"": Base(id="tiny/llama")})
    return adaptertools.write(adapter, tmp_path / "wide", format="peft").path


def assert_one_line(ran: Ran, code: int, *said: str) -> None:
    """A failure as users see it: the exit code, nothing on stdout, and one line that says all of `said`."""
    assert (ran.code, ran.out) == (code, ""), ran
    assert ran.err.startswith("Error: "), ran.err
    assert ran.err.count("\n") == 1, ran.err
    assert len(ran.err) < 600, ran.err
    for text in said:
        assert text in ran.err, ran.err


def repositories(hub: HubServer) -> dict[str, Mapping[str, str]]:
    """All that is visible on the Hub: each repository's branches, tags and pull requests, and where they stand."""
    return {name: dict(repository.refs) for name, repository in hub.repositories.items()}
