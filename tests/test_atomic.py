"""Results appear whole or not at all: under SIGKILL, a full disk, links, and beside what must stay."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adaptertools import containers
from adaptertools.containers import atomic, sidecar
from adaptertools.containers.atomic import allocated, publish_files, publish_folder, staged, write_text
from adaptertools.containers.source import Source
from adaptertools.errors import DestinationError, NonFiniteError

WRITERS = """
import itertools, os, sys
from pathlib import Path
import torch
from adaptertools import containers
from adaptertools.containers import atomic, sidecar
from adaptertools.containers.atomic import publish_files, publish_folder, staged, write_text
from adaptertools.containers.jsonfile import format_json

def write(value):
    tensors = {f"t{n}": torch.full((300, 100), float(value)) for n in range(8)}
    with staged(dst) as staging:
        if kind == "folder":
            containers.get("safetensors").write(staging / "adapter_model.safetensors", tensors, {})
            write_text(staging / "adapter_config.json", format_json({"value": value}))
            publish_folder(staging, dst, ["adapter_*"])
        else:
            containers.get("torch").write(staging / dst.name, tensors, {})
            document = sidecar.bind({"value": value}, staging / dst.name, dst)
            write_text(staging / (dst.name + sidecar.SUFFIX), format_json(document))
            publish_files(staging, dst, [dst.name + sidecar.SUFFIX, dst.name])

torch.set_num_threads(1)
dst, kind = Path(sys.argv[1]), sys.argv[2]
if sys.argv[3] == "False":
    atomic._exchange = lambda one, other: False
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        for value in itertools.count(int(line)):
            write(value)
            os.write(1, f"{value}\\n".encode())  # in one piece, however Python buffers
    os.waitpid(child, 0)
    print("killed", flush=True)
"""
"""Starts a writer for each number on its input; the writer overwrites `dst` again and again, counting from there."""


def read_folder(dst: Path) -> tuple[set[float], int]:
    tensors = containers.read(dst / "adapter_model.safetensors").tensors
    return {float(x) for t in tensors.values() for x in t.aminmax()}, json.loads(
        (dst / "adapter_config.json").read_text()
    )["value"]


def read_file(dst: Path) -> tuple[set[float], int]:
    tensors = containers.read(dst).tensors
    document, notes = sidecar.load(Source(dst), dst.name)
    assert document is not None, notes
    return {float(x) for t in tensors.values() for x in t.aminmax()}, document["value"]


READ: dict[str, Callable[[Path], tuple[set[float], int]]] = {"folder": read_folder, "file": read_file}


@pytest.mark.skipif(sys.platform != "linux", reason="finds the writer in /proc")
@pytest.mark.parametrize(("kind", "swap"), [("folder", True), ("folder", False), ("file", True)])
def test_a_killed_writer_leaves_the_old_result_or_the_new_one(kind: str, swap: bool, tmp_path: Path) -> None:
    dst = tmp_path / "adapter.bin"
    command = [sys.executable, "-c", WRITERS, dst, kind, str(swap)]
    last, randomness, hidden = -1, random.Random(0), 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writers:
        assert writers.stdin is not None
        assert writers.stdout is not None
        for _ in range(20):
            print(last + 1, file=writers.stdin, flush=True)
            told = [int(writers.stdout.readline())]
            time.sleep(randomness.uniform(0, 0.05))
            child = Path(f"/proc/{writers.pid}/task/{writers.pid}/children").read_text()
            os.kill(int(child), signal.SIGKILL)
            while (line := writers.stdout.readline()) != "killed\n":
                told.append(int(line))
            hidden += any(entry.name.startswith(".") for entry in tmp_path.iterdir())
            if not swap and not dst.exists():
                with staged(dst):  # the next write restores it
                    pass
            values, last = READ[kind](dst)
            assert values == {float(last)}
            assert told[-1] <= last <= told[-1] + 1
        writers.stdin.close()
    assert hidden > 5  # else no writer was killed at work
    with staged(dst):
        pass
    assert not any(entry.name.startswith(".") for entry in tmp_path.iterdir())
    assert READ[kind](dst) == ({float(last)}, last)


@pytest.fixture
def cannot_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)


def publish(dst: Path, text: str, replaced: tuple[str, ...] = ("weights*",)) -> None:
    with staged(dst) as staging:
        write_text(staging / "weights.txt", text)
        publish_folder(staging, dst, replaced)


def fail(dst: Path, error: type[BaseException]) -> None:
    with staged(dst) as staging:
        write_text(staging / "weights.txt", "half")
        raise error("x: 1 NaN")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("swap", [True, False])
def test_other_files_of_an_overwritten_folder_stay(swap: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not swap:
        request.getfixturevalue("cannot_swap")
    dst = tmp_path / "adapter"
    publish(dst, "old")
    (dst / "README.md").write_text("mine")
    (dst / "weights-00001.txt").write_text("a shard of the old adapter")
    (dst / "runs").mkdir()
    (dst / "runs" / "log.txt").write_text("log")
    (dst / "link").symlink_to("README.md")
    publish(dst, "new")
    assert (dst / "weights.txt").read_text() == "new"
    assert (dst / "README.md").read_text() == "mine"
    assert (dst / "runs" / "log.txt").read_text() == "log"
    assert (dst / "link").readlink() == Path("README.md")
    assert not (dst / "weights-00001.txt").exists()
    assert names(tmp_path) == ["adapter"]


def test_a_kill_between_the_two_renames_is_mended_by_the_next_write(tmp_path: Path) -> None:
    """Where folders cannot be swapped: the destination stands aside, the new folder is still hidden."""
    dst = tmp_path / "adapter"
    publish(dst, "old")
    dst.rename(tmp_path / ".adapter.adaptertools-0123abcd-old")
    (tmp_path / ".adapter.adaptertools-0123abcd").mkdir()
    with staged(dst):
        assert (dst / "weights.txt").read_text() == "old"
    assert names(tmp_path) == ["adapter"]


def test_leftovers_of_a_killed_process_go_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    dst = tmp_path / "adapter"
    with staged(dst) as living:
        abandoned = tmp_path / ".adapter.adaptertools-deadbeef"
        abandoned.mkdir()
        (abandoned / "half").write_text("x")
        other = tmp_path / ".adapter2.adaptertools-deadbeef"
        other.mkdir()
        with staged(dst) as second:
            assert living.is_dir()
            assert second.is_dir()
            assert not abandoned.exists()
            assert other.exists()


@pytest.mark.parametrize("swap", [True, False])
def test_an_error_while_writing_leaves_what_was_there_and_nothing_else(
    swap: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not swap:
        request.getfixturevalue("cannot_swap")
    dst = tmp_path / "new" / "deep" / "adapter"
    for error in (NonFiniteError, KeyboardInterrupt):
        with pytest.raises(error):
            fail(dst, error)
        assert names(tmp_path) == []
    publish(dst, "old")
    with pytest.raises(NonFiniteError):
        fail(dst, NonFiniteError)
    assert names(dst.parent) == ["adapter"]
    assert (dst / "weights.txt").read_text() == "old"


_FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from adaptertools import containers
from adaptertools.containers.atomic import staged
from adaptertools.errors import DestinationError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
dst = Path(sys.argv[1])
for name, container in containers.CONTAINERS.items():
    try:
        with staged(dst) as staging:
            container.write(staging / "x", {"a": torch.ones(10), "b": torch.ones(20_000)}, {}, lambda _: None)
    except DestinationError as error:
        assert error.errno, repr(error)
        print(name, error.errno, error)
"""


def test_a_file_that_finds_no_room_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", _FULL, tmp_path / "dst"], capture_output=True, text=True, check=True)
    said = ran.stdout.splitlines()
    assert [line.split()[0] for line in said] == list(containers.CONTAINERS)
    assert all(line.split()[1] == str(errno.EFBIG) and "takes no file of this size" in line for line in said)
    assert names(tmp_path) == []


def test_a_full_disk_is_named_and_found_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    worked = []
    with pytest.raises(DestinationError, match="the disk is full") as raised, allocated(tmp_path / "x", 10):
        worked.append(1)
    assert worked == []
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_room_is_written_all_the_same(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    write_text(tmp_path / "x", "text")
    assert (tmp_path / "x").read_text() == "text"


def test_room_that_was_reserved_and_not_used_is_given_back(tmp_path: Path) -> None:
    with allocated(tmp_path / "x", 1000) as file:
        file.write(b"abc")
    assert (tmp_path / "x").read_bytes() == b"abc"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_honour_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        publish(tmp_path / "adapter", "x")
        with staged(tmp_path / "a.bin") as staging:
            write_text(staging / "a.bin", "x")
            publish_files(staging, tmp_path / "a.bin", ["a.bin"])
    finally:
        os.umask(before)
    assert (tmp_path / "adapter").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "adapter" / "weights.txt").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == 0o666 & ~mask


def test_an_overwritten_folder_keeps_its_permissions(tmp_path: Path) -> None:
    publish(tmp_path / "adapter", "old")
    (tmp_path / "adapter").chmod(0o700)
    publish(tmp_path / "adapter", "new")
    assert (tmp_path / "adapter").stat().st_mode & 0o777 == 0o700


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "run3"
    publish(real, "old")
    (tmp_path / "latest").symlink_to(real)
    publish(tmp_path / "latest", "new")
    assert (tmp_path / "latest").is_symlink()
    assert (real / "weights.txt").read_text() == "new"
    assert names(tmp_path) == ["elsewhere", "latest"]


def test_a_link_to_a_file_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_text("shared by others")
    link = tmp_path / "adapter.bin"
    link.symlink_to(blob)
    with staged(link) as staging:
        write_text(staging / "adapter.bin", "new")
        publish_files(staging, link, ["adapter.bin"])
    assert not link.is_symlink()
    assert link.read_text() == "new"
    assert blob.read_text() == "shared by others"


def test_a_folder_that_may_not_be_changed_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = tmp_path / "dst"
    dst.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == dst and mode & os.W_OK))
    with pytest.raises(DestinationError, match="no permission"), staged(dst):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["dst"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(DestinationError, match="no permission"), staged(tmp_path / "x"):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_a_destination_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DestinationError, match=r"cannot write .*: a part of the path is a file"):
        publish(tmp_path / "file" / "adapter", "x")


def put_file(dst: Path, value: float, *, publish: bool = True) -> None:
    """A torch file with its sidecar; without `publish` the sidecar alone, as a kill in between leaves it."""
    with staged(dst) as staging:
        containers.get("torch").write(staging / dst.name, {"x": torch.tensor(value)}, {}, lambda _: None)
        document = sidecar.bind({"value": value}, staging / dst.name, dst)
        write_text(staging / (dst.name + sidecar.SUFFIX), json.dumps(document))
        publish_files(staging, dst, [dst.name + sidecar.SUFFIX, *([dst.name] if publish else [])])


def test_a_sidecar_belongs_to_its_weights_whatever_number_of_kills_came_between(tmp_path: Path) -> None:
    dst = tmp_path / "adapter.bin"
    put_file(dst, 1.0)
    for value in (2.0, 3.0, 4.0):
        put_file(dst, value, publish=False)
        assert sidecar.load(Source(dst), dst.name)[0]["value"] == 1.0  # type: ignore[index]
    put_file(dst, 5.0)
    assert sidecar.load(Source(dst), dst.name)[0]["value"] == 5.0  # type: ignore[index]


def test_a_sidecar_of_other_weights_is_not_used_and_that_is_said(tmp_path: Path) -> None:
    dst = tmp_path / "adapter.bin"
    put_file(dst, 1.0)
    torch.save({"x": torch.tensor(2.0)}, dst)
    document, (note,) = sidecar.load(Source(dst), dst.name)
    assert document is None
    assert "was written for other weights" in note
    dst.write_bytes(b"\x80\x02not a zip")
    document, (note,) = sidecar.load(Source(dst), dst.name)
    assert document is None
    assert "is not used" in note


def test_weights_without_a_sidecar_have_no_record_and_no_note(tmp_path: Path) -> None:
    torch.save({"x": torch.tensor(2.0)}, tmp_path / "x.bin")
    assert sidecar.load(Source(tmp_path / "x.bin"), "x.bin") == (None, ())
