"""The journal of a merge: what a kill or a full disk cuts off counts as not written."""

import os
from pathlib import Path

import pytest

from adaptertools.errors import DestinationError
from adaptertools.merging.journal import Journal

ENTRIES = [{"recipe": "abc"}, {"file": "a.safetensors", "state": [1, 2]}, {"file": "b.safetensors", "state": [3, 4]}]


def written(path: Path) -> Journal:
    journal = Journal(path, flush=True)
    for entry in ENTRIES:
        journal.add(entry)
    return journal


def test_what_was_added_is_read_by_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert list(written(path).entries) == list(Journal(path, flush=True).entries) == ENTRIES


def test_cut_off_anywhere_whole_lines_stand_and_the_next_goes_after_them(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    written(path)
    content = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = sum(end <= size for end in ends)
        journal = Journal(path, flush=False)
        assert list(journal.entries) == ENTRIES[:whole]
        journal.add({"file": "c"})
        assert list(Journal(path, flush=False).entries) == [*ENTRIES[:whole], {"file": "c"}]


def test_a_full_disk_leaves_what_stood_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    journal = written(path)
    write = os.pwrite
    calls = []

    def half(handle: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(handle, data[:5], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        with pytest.raises(DestinationError, match="the disk is full"):
            journal.add({"file": "too much"})
    assert list(Journal(path, flush=False).entries) == list(journal.entries) == ENTRIES
    journal.add({"file": "c"})
    assert list(Journal(path, flush=False).entries) == [*ENTRIES, {"file": "c"}]
