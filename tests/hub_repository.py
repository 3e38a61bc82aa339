"""What the Hub server of the tests stores: files by their content, commits, branches, tags and pull requests."""

import base64
import hashlib
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".npz", ".onnx", ".gguf", ".model", ".zip")
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE).encode()
MAIN = "refs/heads/main"


class RefusedError(Exception):
    """An answer other than success: its status, the Hub's error code and its message."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] = {}):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers)


@dataclass(frozen=True)
class Blob:
    """The content of a file; `oid` as git names it, `large` where it is a pointer to large file storage."""

    path: Path
    size: int
    sha256: str
    oid: str
    large: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid

    def read(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    description: str
    tree: Mapping[str, Blob]
    at: float


@dataclass
class Storage:
    """Contents in a folder, each once, under their sha256."""

    folder: Path
    lock: threading.RLock = field(default_factory=threading.RLock)

    def keep(self, content: bytes | Path, name: str, large: bool | None = None) -> Blob:
        """The content as a file of this name, large or not as the Hub decides; a path's file is copied."""
        if isinstance(content, Path):
            with content.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            sha256 = hashlib.sha256(content).hexdigest()
        place = self.folder / sha256
        if not place.exists():
            part = place.with_suffix(f".{threading.get_ident()}")
            if isinstance(content, Path):
                shutil.copyfile(content, part)
            else:
                part.write_bytes(content)
            part.replace(place)
        return self.blob(sha256, large=is_large(name, place) if large is None else large)

    def blob(self, sha256: str, *, large: bool) -> Blob:
        """A content that is here."""
        place = self.folder / sha256
        size = place.stat().st_size
        stored = pointer(sha256, size) if large else place.read_bytes()
        return Blob(place, size, sha256, hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest(), large)

    def has(self, sha256: str) -> bool:
        return (self.folder / sha256).exists()


def pointer(sha256: str, size: int) -> bytes:
    """What git holds in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def is_large(name: str, place: Path) -> bool:
    """Whether the Hub would hold it in large file storage."""
    with place.open("rb") as file:
        return large_by(name, file.read(512), place.stat().st_size)


def large_by(name: str, sample: bytes, size: int) -> bool:
    """By its suffix, its size, or because it is no text; never an empty file."""
    return size > 0 and (name.endswith(LARGE) or size > 10 * 1024 * 1024 or b"\0" in sample)


@dataclass
class Repository:
    """A model repository. Every commit is an immutable tree, as in git."""

    name: str
    storage: Storage
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    objects: set[str] = field(default_factory=set)
    """sha256 of the large files that were uploaded here, committed or not."""

    def find(self, revision: str) -> Commit:
        """The commit that a branch, tag, reference, or (shortened) sha names."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        found = [commit for sha, commit in self.commits.items() if len(revision) >= 7 and sha.startswith(revision)]
        if len(found) != 1:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]

    def entry(self, commit: Commit, path: str) -> Blob:
        if path not in commit.tree:
            raise RefusedError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.sha})
        return commit.tree[path]

    def add(
        self,
        ref: str,
        files: Mapping[str, Blob],
        delete: Iterable[str] = (),
        title: str = "commit",
        description: str = "",
    ) -> Commit:
        """A commit on top of a reference; `delete` names files, and folders with a slash at the end."""
        parent = self.refs.get(ref)
        tree = dict(self.commits[parent].tree) if parent else {}
        for gone in delete:
            inside = gone if gone.endswith("/") else gone + "\0"
            tree = {path: blob for path, blob in tree.items() if path != gone and not path.startswith(inside)}
        tree |= files
        self.objects |= {blob.sha256 for blob in files.values() if blob.large}
        text = f"{self.name}{len(self.commits)}{parent}{title}{sorted((p, b.oid) for p, b in tree.items())}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        commit = self.commits[sha] = Commit(sha, parent, title, description, tree, time.time())
        self.refs[ref] = sha
        return commit

    def history(self, commit: Commit) -> list[Commit]:
        """A commit and those before it, the newest first."""
        found = [commit]
        while found[-1].parent:
            found.append(self.commits[found[-1].parent])
        return found

    def apply(self, revision: str, lines: list[dict], create_pr: bool) -> tuple[Commit, int | None]:
        """What the commit endpoint does: all of it, or nothing. Gives the number of the pull request too."""
        head = self.find(revision)
        ref = revision if revision in self.refs else f"refs/heads/{revision}"
        if ref not in self.refs:
            raise RefusedError(400, f"{revision} is no branch")
        header, files, delete = {}, {}, []
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    header = value
                case "file":
                    files[value["path"]] = self.storage.keep(base64.b64decode(value["content"]), "", large=False)
                case "lfsFile":
                    if value["oid"] not in self.objects:
                        message = f"LFS pointer pointed to a file that does not exist: {value['path']}"
                        raise RefusedError(400, message, "LfsFileNotFound")
                    files[value["path"]] = self.storage.blob(value["oid"], large=True)
                case "deletedFile":
                    self.entry(head, value["path"])
                    delete.append(value["path"])
                case "deletedFolder":
                    delete.append(value["path"].rstrip("/") + "/")
                case other:
                    raise RefusedError(400, f"unknown operation {other}")
        if unsafe := [path for path in files if path.startswith("/") or ".." in path.split("/")]:
            raise RefusedError(400, f"Invalid path {unsafe[0]}")
        if header.get("parentCommit") not in (None, head.sha):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        number = None
        if create_pr:
            number = 1 + sum(name.startswith("refs/pr/") for name in self.refs)
            ref = f"refs/pr/{number}"
            self.refs[ref] = head.sha
        return self.add(ref, files, delete, header["summary"], header.get("description") or ""), number
