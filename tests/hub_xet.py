"""Xet for the Hub server of the tests: hf_xet's own local storage (`local://FOLDER`), one fresh folder a token.

hf_xet locks its folder. So each write token gets an empty one, from which the committed files are taken, and each read
token a copy of one that holds every large file of the repository.
"""

import shutil
import struct
import time
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

import hf_xet
from hub_answers import Answer
from hub_repository import Blob, Commit, Repository, Storage

_ROW = 48
_END = b"\xff" * 32
_VERIFIED, _WITH_SHA256 = 1 << 31, 1 << 30


class Xet:
    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.session = hf_xet.XetSession()
        self._written: dict[str, list[Path]] = {}
        self._readable: dict[frozenset[str], Path] = {}
        self._hashes: dict[str, str] = {}
        self._number = count()

    def token(self, repository: Repository, kind: str) -> Answer:
        """A storage of this token's own."""
        folder = self._fresh()
        if kind == "xet-write-token":
            folder.mkdir()
            self._written.setdefault(repository.name, []).append(folder)
        else:
            shutil.copytree(self._all(repository), folder)
        expires = int(time.time()) + 30  # the client takes it for stale at once and asks again
        url = f"local://{folder}"
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        return Answer.json({"casUrl": url, "accessToken": "xet", "exp": expires}, headers=headers)

    def headers(self, endpoint: str, repository: Repository, commit: Commit, blob: Blob) -> dict[str, str]:
        route = f"{endpoint}/api/models/{repository.name}/xet-read-token/{commit.sha}"
        return {"X-Xet-Hash": self.hash(blob), "Link": f'<{route}>; rel="xet-auth"'}

    def hash(self, blob: Blob) -> str:
        if blob.sha256 not in self._hashes:
            self._hashes[blob.sha256] = hf_xet.hash_files([str(blob.path)])[0].hash
        return self._hashes[blob.sha256]

    def collect(self, repository: Repository, oids: Iterable[str]) -> None:
        """Take the files that a commit names out of the folders that were written to."""
        wanted = {oid for oid in oids if oid not in repository.objects}
        for folder in self._written.get(repository.name, []):
            found = [(sha256, *rest) for sha256, *rest in uploaded(folder) if sha256 in wanted]
            if not found:
                continue
            copy = self._fresh()
            shutil.copytree(folder, copy)
            with self.session.new_file_download_group(endpoint=f"local://{copy}") as group:
                for sha256, name, size in found:
                    group.start_download_file(hf_xet.XetFileInfo(name, size), str(copy / sha256))
            for sha256, *_ in found:
                if self.storage.keep(copy / sha256, "", large=True).sha256 == sha256:
                    repository.objects.add(sha256)
            wanted -= repository.objects

    def _all(self, repository: Repository) -> Path:
        """A storage that holds every large file of a repository."""
        key = frozenset(repository.objects)
        if key not in self._readable:
            folder = self._fresh()
            folder.mkdir()
            with self.session.new_upload_commit(endpoint=f"local://{folder}") as commit:
                for oid in sorted(key):
                    commit.start_upload_file(str(self.storage.folder / oid), sha256=oid)
            self._readable[key] = folder
        return self._readable[key]

    def _fresh(self) -> Path:
        return self.storage.folder / f"xet-{next(self._number)}"


def uploaded(folder: Path) -> Iterator[tuple[str, str, int]]:
    """(sha256, Xet hash, size) of each file that the shards in a local storage describe."""
    for shard in folder.glob("xet/xorbs/shards/*.mdb"):
        yield from described(shard.read_bytes())


def described(shard: bytes) -> Iterator[tuple[str, str, int]]:
    """A shard's files: rows of 48 bytes, of which a file has one head, its segments, their proofs and its sha256."""
    at = _ROW
    while shard[at : at + 32] != _END:
        name = shard[at : at + 32]
        flags, segments = struct.unpack_from("<II", shard, at + 32)
        at += _ROW
        size = sum(struct.unpack_from("<I", shard, at + each * _ROW + 36)[0] for each in range(segments))
        at += _ROW * segments * (2 if flags & _VERIFIED else 1)
        if flags & _WITH_SHA256:
            yield written(shard[at : at + 32]), written(name), size
            at += _ROW


def written(digest: bytes) -> str:
    """A hash as Xet writes it: four numbers of 64 bits, each the other way around."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))
