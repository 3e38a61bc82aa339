"""A merge that is killed, that meets a full disk, or that is aimed at the wrong place."""

import errno
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from merge_plans import COLUMNS, ROWS, contents, edit, make_base, make_plan, update

from adaptertools.errors import (
    AdapterToolsError,
    DestinationError,
    DestinationExistsError,
    StoppedMergeError,
)
from adaptertools.merging import blocks, record, resume, shards, tasks
from adaptertools.merging.journal import Journal
from adaptertools.merging.plan import MergePlan
from adaptertools.merging.record import NAME
from adaptertools.merging.resume import resumable, staging_folder
from adaptertools.merging.route import Route
from adaptertools.merging.run import run_merge

SHARDS = 6
BLOCKS = {"cpu": 5 * COLUMNS * 2}
CHUNK = 100


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many writes for every file."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCKS)
    monkeypatch.setattr(shards, "CHUNK_BYTES", CHUNK)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", shards=SHARDS)


@pytest.fixture
def dst(tmp_path: Path) -> Path:
    """A place in a folder that holds nothing else."""
    return tmp_path / "out" / "merged"


@pytest.fixture
def undisturbed(base: Path, tmp_path: Path) -> dict[str, bytes]:
    """What a merge gives that nothing disturbs."""
    run_merge(make_plan(base), tmp_path / "reference", device="cpu")
    return contents(tmp_path / "reference")


def other_plan(base: Path) -> MergePlan:
    """A merge of one tensor only."""
    plan = make_plan(base)
    name = "model.layers.0.mlp.weight"
    return replace(plan, edits={name: edit(plan.base, name, update(ROWS, COLUMNS, seed=99))})


def merge_in_child(base: Path, dst: Path, ready: Connection) -> None:
    """The same merge in a process of its own; tells when it begins."""
    blocks.BLOCK_BYTES, shards.CHUNK_BYTES = BLOCKS, CHUNK
    plan = make_plan(base)
    ready.send(True)
    run_merge(plan, dst, device="cpu", workers=2, overwrite=True)


def start(base: Path, dst: Path) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "merge_plans", "adaptertools.merging.run", __name__])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=merge_in_child, args=(base, dst, there))
    process.start()
    there.close()
    here.recv()
    return process


def states(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Files, each known by its inode and time."""
    found = {name: (folder / name).stat() for name in names}
    return {name: (state.st_ino, state.st_mtime_ns) for name, state in found.items()}


def finished_files(dst: Path) -> dict[str, tuple[int, int]]:
    """The finished files of a merge in the making."""
    folder = staging_folder(dst)
    entries = Journal(folder / "journal.jsonl", flush=False).entries
    return states(folder / "result", sorted({entry["file"] for entry in entries if "file" in entry}))


def assert_no_half_model(folder: Path, whole: list[dict[str, bytes]]) -> None:
    """A folder with a configuration is a whole model, and no file that a model library reads is half-made."""
    for config in folder.rglob("config.json"):
        found = contents(config.parent)
        assert found in whole or (found.items() <= whole[0].items() and set(found) >= whole[0].keys() - {NAME})
    for path in folder.rglob("*.safetensors"):
        assert any(path.read_bytes() == each[path.name] for each in whole)


def kill_and_resume(times: int, old: Path | None, base: Path, dst: Path, undisturbed: dict[str, bytes]) -> None:
    """Kill merges at random moments until `times` were hit, each time going on from what was left.

    With `old`, an earlier merge stands at the destination, and is there until the new one is.
    """
    before = contents(old) if old is not None else {}
    chance = random.Random(times)
    start(base, dst).join()  # warms up the server of forks
    shutil.rmtree(dst)
    process = start(base, dst)
    begun = time.monotonic()
    process.join()
    whole = time.monotonic() - begun
    shutil.rmtree(dst)
    kills = went_on = finished = 0
    kept: dict[str, tuple[int, int]] = {}
    while kills < times or not (went_on and finished):
        assert kills < times + 50, "never killed half-way"
        if not kept and not staging_folder(dst).exists():
            shutil.rmtree(dst, ignore_errors=True)
            if old is not None:
                shutil.copytree(old, dst)
        process = start(base, dst)
        time.sleep(chance.random() * whole)
        process.kill()
        process.join()
        assert process.exitcode in (0, -9)
        kills += process.exitcode == -9
        found = contents(dst) if dst.exists() else {}
        assert found in (before, undisturbed)
        assert_no_half_model(dst.parent, [undisturbed, *([before] if before else [])])
        if found == undisturbed:
            finished += 1
            assert kept.items() <= states(dst, undisturbed).items()
            if (staging_folder(dst) / "journal.jsonl").exists():  # killed while it cleared up
                assert run_merge(make_plan(base), dst, device="cpu").resumed == SHARDS
                assert not staging_folder(dst).exists()
            shutil.rmtree(staging_folder(dst), ignore_errors=True)
            kept = {}
        else:
            went_on += bool(kept)
            now = finished_files(dst)
            assert kept.items() <= now.items()
            kept = now


def test_a_killed_merge_resumes_to_the_same_bytes(base: Path, dst: Path, undisturbed: dict[str, bytes]) -> None:
    kill_and_resume(8, None, base, dst, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_a_merge_that_is_killed_a_hundred_times_resumes_to_the_same_bytes(
    replacing: bool, base: Path, dst: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    kill_and_resume(120, _old(base, tmp_path) if replacing else None, base, dst, undisturbed)


def _old(base: Path, tmp_path: Path) -> Path:
    run_merge(other_plan(base), tmp_path / "old", device="cpu")
    return tmp_path / "old"


class Faults:
    """Lets the `at`-th write of a kind fail, and counts them all."""

    def __init__(self, at: int, code: int) -> None:
        self.at, self.code, self.calls = at, code, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                raise OSError(self.code, os.strerror(self.code))
            return function(*args, **options)

        return call


WRITES = [
    (os, "pwrite"),
    (os, "copy_file_range"),
    (os, "posix_fallocate"),
    (os, "fsync"),
    (os, "replace"),
    (os, "rename"),
    (os, "open"),
    (Path, "write_bytes"),
    (Path, "mkdir"),
]


def merge_with_fault(at: int, code: int, plan: MergePlan, dst: Path) -> int:
    """Merge while the `at`-th call that writes fails. Returns the calls; all of them succeeded if they are fewer."""
    faults = Faults(at, code)
    with pytest.MonkeyPatch.context() as patch:
        for place, name in WRITES:
            patch.setattr(place, name, faults.around(getattr(place, name)))
        run_merge(plan, dst, device="cpu", workers=1, overwrite=True)
    return faults.calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_fault_at_any_write_leaves_the_old_result_and_nothing_half_made(code: int, dst: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shards=2)
    run_merge(make_plan(base), tmp_path / "reference", device="cpu")
    undisturbed = contents(tmp_path / "reference")
    old = _old(base, tmp_path)
    before = contents(old)
    stopped = refused = 0
    at = 0
    while True:
        at += 1
        shutil.rmtree(dst.parent, ignore_errors=True)
        shutil.copytree(old, dst)
        try:
            calls = merge_with_fault(at, code, make_plan(base), dst)
        except StoppedMergeError:
            stopped += 1
        except AdapterToolsError:
            refused += 1
            assert {path.name for path in dst.parent.iterdir()} == {"merged"}
        else:
            assert contents(dst) == undisturbed
            if calls < at:
                break
            continue  # a fault that can be lived with, as a lock that is not to be had
        found = contents(dst)
        assert found == before or (found == undisturbed and staging_folder(dst).exists())
        assert_no_half_model(dst.parent, [undisturbed, before])
        run_merge(make_plan(base), dst, device="cpu", overwrite=True)
        assert contents(dst) == undisturbed
        assert not staging_folder(dst).exists()
    assert stopped > 10
    assert refused > 10


def test_a_full_disk_is_found_before_any_work(base: Path, dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    asked: list[int] = []
    written: list[int] = []

    def allocate(handle: int, offset: int, length: int) -> None:
        asked.append(length)
        if sum(asked) > size - 1:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    monkeypatch.setattr(tasks, "write_from", lambda *args: written.append(1))
    monkeypatch.setattr(tasks, "copy_range", lambda *args: written.append(1))
    with pytest.raises(DestinationError, match="disk is full"):
        run_merge(make_plan(base), dst, device="cpu")
    assert sum(length for length in asked if length >= 2048) == size
    assert not written
    assert not dst.parent.exists()


@pytest.fixture
def half_done(base: Path, dst: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """A merge, one file after the other, that stopped half-way; the files that it finished."""
    monkeypatch.setattr(Route, "at_once", 1)
    with pytest.raises(StoppedMergeError, match="goes on from there"):
        merge_with_fault(60, errno.EIO, make_plan(base), dst)
    done = len(finished_files(dst))
    assert 0 < done < SHARDS
    return done


def test_what_is_finished_is_not_made_again(
    half_done: int, base: Path, dst: Path, undisturbed: dict[str, bytes]
) -> None:
    kept = finished_files(dst)
    report = run_merge(make_plan(base), dst, device="cpu", workers=3, max_memory=1 << 30)
    assert report.resumed == half_done
    assert kept.items() <= states(dst, undisturbed).items()
    assert contents(dst) == undisturbed


def test_a_file_that_was_tampered_with_is_made_again(
    half_done: int, base: Path, dst: Path, undisturbed: dict[str, bytes]
) -> None:
    path = staging_folder(dst) / "result" / next(iter(finished_files(dst)))
    path.write_bytes(bytes(path.stat().st_size))
    assert run_merge(make_plan(base), dst, device="cpu").resumed == half_done - 1
    assert contents(dst) == undisturbed


def _touched(base: Path, patch: pytest.MonkeyPatch) -> MergePlan:
    os.utime(base / "model-00001-of-00006.safetensors", (1, 1))
    return make_plan(base)


def _on_another_device(base: Path, patch: pytest.MonkeyPatch) -> MergePlan:
    patch.setattr(record, "device_name", lambda device: "another")
    return make_plan(base)


def _weighted(base: Path, patch: pytest.MonkeyPatch) -> MergePlan:
    plan = make_plan(base)
    edits = {
        name: replace(made, updates=tuple(replace(each, scale=2 * each.scale) for each in made.updates))
        for name, made in plan.edits.items()
    }
    return replace(plan, edits=edits)


def _retrained(base: Path, patch: pytest.MonkeyPatch) -> MergePlan:
    plan = make_plan(base)
    name, made = next(iter(plan.edits.items()))
    nudged = made.updates[0].left.clone()
    nudged[0, 0] += 1
    return replace(plan, edits={**plan.edits, name: replace(made, updates=(replace(made.updates[0], left=nudged),))})


def _another_tokenizer(base: Path, patch: pytest.MonkeyPatch) -> MergePlan:
    (base / "tokenizer.json").write_text('{"other": 1}')
    return make_plan(base)


@pytest.mark.usefixtures("half_done")
@pytest.mark.parametrize("change", [_touched, _on_another_device, _weighted, _retrained, _another_tokenizer])
def test_a_changed_recipe_device_or_input_reuses_nothing(
    change: Callable[[Path, pytest.MonkeyPatch], MergePlan],
    base: Path,
    dst: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = change(base, monkeypatch)
    assert run_merge(plan, dst, device="cpu").resumed == 0
    run_merge(plan, tmp_path / "afresh", device="cpu")
    assert contents(dst) == contents(tmp_path / "afresh")


def test_a_second_run_is_refused_while_one_is_at_work(base: Path, dst: Path) -> None:
    with resumable(dst), pytest.raises(DestinationError, match="another merge"):
        run_merge(make_plan(base), dst, device="cpu")
    run_merge(make_plan(base), dst, device="cpu")


def test_a_merge_that_is_interrupted_keeps_what_is_finished_and_frees_the_rest(
    base: Path, dst: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = resume.Staging.finish

    def interrupted(self: resume.Staging, *args: Any) -> None:
        finish(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume.Staging, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_merge(make_plan(base), dst, device="cpu", workers=1)
    assert len(finished_files(dst)) == 1
    assert not list(dst.parent.rglob("*.part"))
    assert run_merge(make_plan(base), dst, device="cpu").resumed == 1
    assert contents(dst) == undisturbed


def test_a_callback_that_raises_ends_the_merge(base: Path, dst: Path) -> None:
    def enough(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run_merge(make_plan(base), dst, device="cpu", on_progress=enough)
    assert not dst.exists()


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_a_run_that_was_killed_while_it_cleared_up_is_known_to_be_done(
    replacing: bool, base: Path, dst: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: resume.Staging) -> None:
        raise KeyboardInterrupt

    if replacing:
        run_merge(other_plan(base), dst, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(resume.Staging, "remove", killed)
        patch.setattr(resume.Staging, "give_up", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            run_merge(make_plan(base), dst, device="cpu", overwrite=replacing)
    assert staging_folder(dst).exists()
    report = run_merge(make_plan(base), dst, device="cpu")
    assert report.resumed == SHARDS
    assert len(report.tensors) == 2 * SHARDS
    assert contents(dst) == undisturbed
    assert {path.name for path in dst.parent.iterdir()} == {"merged"}


def test_the_staging_folder_of_another_program_is_left_alone(base: Path, dst: Path) -> None:
    mine = staging_folder(dst) / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(DestinationExistsError, match="in the way"):
        run_merge(make_plan(base), dst, device="cpu")
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("inside", [".", "merged", "deeper/merged", ".."])
def test_the_base_is_never_written_to(inside: str, base: Path, tmp_path: Path) -> None:
    before = contents(base)
    link = tmp_path / "link"
    link.symlink_to(base)
    for place in (base / inside, link / inside if inside != ".." else base / ".."):
        with pytest.raises(DestinationExistsError, match="base model"):
            run_merge(make_plan(base), place, device="cpu", overwrite=True)
    assert contents(base) == before


def test_what_exists_is_replaced_only_on_request_and_only_if_it_is_a_merge(base: Path, dst: Path) -> None:
    dst.mkdir(parents=True)
    (dst / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(DestinationExistsError):
            run_merge(make_plan(base), dst, device="cpu", overwrite=overwrite)
    assert contents(dst) == {"thesis.txt": b"mine"}
    assert {path.name for path in dst.parent.iterdir()} == {"merged"}


def test_a_file_is_never_replaced(base: Path, dst: Path) -> None:
    dst.parent.mkdir()
    dst.write_text("mine")
    with pytest.raises(DestinationExistsError, match="is a file"):
        run_merge(make_plan(base), dst, device="cpu", overwrite=True)
    assert dst.read_text() == "mine"


def test_a_merge_that_may_not_be_replaced_is_told_before_anything_is_made(
    base: Path, dst: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_merge(make_plan(base), dst, device="cpu")
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: not (Path(path) == dst and mode & os.W_OK))
        with pytest.raises(DestinationError, match="no permission to write there"):
            run_merge(other_plan(base), dst, device="cpu", overwrite=True)
    assert contents(dst) == undisturbed
    assert not staging_folder(dst).exists()


@pytest.mark.parametrize("target", ["gone", "merged"], ids=["nothing", "itself"])
@pytest.mark.parametrize("below", ["", "below"])
def test_a_link_that_leads_nowhere_is_never_replaced(target: str, below: str, base: Path, dst: Path) -> None:
    dst.parent.mkdir()
    dst.symlink_to(target)
    with pytest.raises(DestinationExistsError, match=rf"is a link to {target}, which leads nowhere: remove the link"):
        run_merge(make_plan(base), dst / below, device="cpu", overwrite=True)
    assert dst.readlink() == Path(target)


def test_no_merge_is_put_into_the_folder_of_an_adapter(base: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    plan = replace(make_plan(base), folders=(lora,))
    with pytest.raises(
        DestinationExistsError, match=r"lies in .*lora, an adapter that is merged: give a place outside"
    ):
        run_merge(plan, lora / "deep" / "merged", device="cpu")
    assert not any(lora.iterdir())


def test_an_empty_folder_is_filled(
    base: Path, dst: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    dst.mkdir(parents=True)
    monkeypatch.chdir(dst.parent)
    report = run_merge(make_plan(base), dst.name, device="cpu")
    assert report.path == Path(dst.name)
    assert contents(dst) == undisturbed


def test_a_link_to_a_folder_is_followed(base: Path, dst: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    dst.parent.mkdir()
    dst.symlink_to(tmp_path / "real")
    assert run_merge(make_plan(base), dst, device="cpu").path == dst
    assert dst.is_symlink()
    assert contents(tmp_path / "real") == undisturbed


def test_an_earlier_merge_is_replaced_and_what_else_lies_there_stays(
    base: Path, dst: Path, undisturbed: dict[str, bytes]
) -> None:
    plan = make_plan(base)
    (base / "merges.txt").write_text("of the base")
    run_merge(replace(plan, copied=(*plan.copied, "merges.txt")), dst, device="cpu")
    (dst / "thesis.txt").write_text("mine")
    run_merge(plan, dst, device="cpu", overwrite=True)
    assert contents(dst) == undisturbed | {"thesis.txt": b"mine"}


def test_weights_that_no_merge_wrote_are_not_replaced(base: Path, dst: Path) -> None:
    run_merge(make_plan(base), dst, device="cpu")
    (dst / "mine.safetensors").write_text("mine")
    with pytest.raises(DestinationExistsError, match=r"mine\.safetensors"):
        run_merge(make_plan(base), dst, device="cpu", overwrite=True)
    assert (dst / "mine.safetensors").read_text() == "mine"


def test_nothing_stays_open(base: Path, dst: Path) -> None:
    plan = make_plan(base)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for place in range(3):
        run_merge(plan, dst.with_name(str(place)), device="cpu")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


PEAK = r"""
import re, sys
from pathlib import Path
from merge_plans import make_plan
from adaptertools.merging.record import NAME
from adaptertools.merging.run import run_merge

plan = make_plan(Path(sys.argv[1]))
run_merge(plan, sys.argv[2], device="cpu", max_memory=200_000_000, flush=False)
print(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_base(tmp_path: Path) -> None:
    peaks = []
    for shards_ in (2, 4):
        folder = make_base(tmp_path / f"base{shards_}", shards=shards_, layers=4, rows=16384, columns=4096)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert size > shards_ * 500_000_000
        ran = subprocess.run(
            [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "merged")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(ran.stdout) * 1024)
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "merged")
    bare = subprocess.run(
        [sys.executable, "-c", PEAK.split("plan =")[0] + PEAK.splitlines()[-1]],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    adapters = 16 * 3 * (16384 + 4096) * 4
    assert max(peaks) < int(bare.stdout) * 1024 + 200_000_000 + adapters
    assert abs(peaks[1] - peaks[0]) < 30_000_000
