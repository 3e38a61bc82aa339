"""What a merge on a GPU waits for is begun early, and whatever goes wrong there stays with the merge."""

import ctypes
import threading

import pytest
import torch

from adaptertools.merging import warm_up as module
from adaptertools.merging.warm_up import warm_up


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The devices that something was begun for."""
    found: list[int] = []
    monkeypatch.setattr(module, "_load", found.append)
    return found


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:3", 3)])
def test_it_begins_for_a_gpu(device: str, index: int, begun: list[int]) -> None:
    warm_up(device)
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(5)
    assert begun == [index]


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda:x", "cuda:-1", "meta", ""])
def test_it_leaves_everything_else_alone(device: str, begun: list[int]) -> None:
    before = threading.active_count()
    warm_up(device)
    assert threading.active_count() == before
    assert not begun


@pytest.mark.parametrize("code", [None, 100])
def test_without_a_driver_or_a_device_nothing_is_loaded_and_nothing_is_said(
    code: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Driver:
        def __init__(self, name: str) -> None:
            if code is None:
                raise OSError(f"{name}: cannot open shared object file")

        def cuInit(self, flags: int) -> int | None:
            return code

    loaded: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", Driver)
    monkeypatch.setattr(module, "_load_kernels", loaded.append)
    module._load(0)
    assert not loaded
    assert capsys.readouterr() == ("", "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_context_that_it_makes_is_the_one_that_torch_uses() -> None:
    module._start_cuda(0)
    assert torch.ones(3, device="cuda").sum().item() == 3
