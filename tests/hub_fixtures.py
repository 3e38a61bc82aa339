"""The pytest fixtures of the Hub tests: a server, an environment that points at it, and a command that is watched."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

# Bound as long as this process runs, so that no other is given the port while no server listens here.
_held = socket.socket()
_held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
_held.bind(("127.0.0.1", 0))
PORT = _held.getsockname()[1]

# huggingface_hub reads these when it is imported. Every test's server has one address, since clients before 2.0 take no
# answer to a commit from another endpoint than that. HF_HUB_DISABLE_XET=0 runs the tests through Xet.
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{PORT}"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

_SEARCHED = 8 << 20
"""Bytes of a file that are searched for tokens: what is larger are sparse weights that a test made itself."""

TOKENS = ("hf_reader", "hf_writer", "hf_outsider", "hf_wrong")
XET = os.environ["HF_HUB_DISABLE_XET"].lower() not in ("1", "true", "on", "yes")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of this test's own, a writer's token, and an empty cache at `tmp_path / "hub-cache"`.

    Afterwards no token is in any file that the test left here or on the Hub.
    """
    for name in ("HF_HUB_OFFLINE", "HF_HOME", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with HubServer(xet=XET, port=PORT) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        yield server
        assert_no_token_in_files(server, tmp_path)
    forget_connections()
    assert server.failures == []


class _Waits(threading.local):
    """A clock for each thread that goes on only while the thread waits, however long its calls take on this machine."""

    _passed = 0.0

    def monotonic(self) -> float:
        return self._passed

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        self._passed += seconds


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repetitions that come at once, and end soon."""
    from adaptertools.hub import client, commit

    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(client, "PATIENCE", 0.3)
    monkeypatch.setattr(client, "time", _Waits())
    monkeypatch.setattr(commit, "WAIT", 0.01)


@pytest.fixture
def tool(
    hub: HubServer, run: Callable[..., Any], tmp_path: Path, impatient: None, caplog: pytest.LogCaptureFixture
) -> Iterator[Callable[..., Any]]:
    """The command line. Afterwards no token is in anything that it said or logged."""
    said: list[str] = []

    def call(*args: str | Path, **env: str) -> Any:
        ran = run(*args, **env)
        said.append(ran.out + ran.err)
        return ran

    yield call
    for token in TOKENS:
        assert not [text for text in (*said, caplog.text) if token in text]


def assert_no_token_in_files(hub: HubServer, folder: Path) -> None:
    """No token is in a file below the folder, or in a commit on the Hub and its files."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    for repository in hub.repositories.values():
        for commit in repository.commits.values():
            files += [blob.path for blob in commit.tree.values()]
            assert not [token for token in TOKENS if token in commit.title + commit.description]
    for path in set(files):
        with path.open("rb") as file:
            content = file.read(_SEARCHED)
        assert not [token for token in TOKENS if token.encode() in content], path


def forget_connections() -> None:
    """Close what the client keeps open between calls."""
    import huggingface_hub

    close = getattr(huggingface_hub, "close_session", None)  # since 1.0
    if close is not None:
        close()
