"""Files of a commit to come: what a later run needs to know of one that an earlier run uploaded."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from adaptertools.hub.standing import Standing

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


@dataclass(frozen=True, slots=True)
class Sent:
    """A file of a commit to come, in terms of JSON: enough to commit it without its bytes."""

    path: str
    sha256: str
    size: int
    uploaded: bool
    """Whether the Hub holds its bytes. Those of a small file travel with the commit: it has to stay until then."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(**document)


def holds(old: Standing, operation: "CommitOperationAdd") -> bool:
    """Whether a file that stands in the repository is what an operation adds."""
    if old.sha256 is not None:
        return old.sha256 == operation.upload_info.sha256.hex()
    content = operation.path_or_fileobj
    return not is_uploaded(operation) and old.is_same(content if isinstance(content, bytes) else Path(str(content)))


# The client has no public way to tell that a file was uploaded, nor to commit one that an earlier process uploaded: a
# merge that deletes each shard once the Hub has it needs both; nor does it say which files it would leave out without a
# word. From 0.36 to 2.4 the same attributes say so, and tests fail with a client that has others.


def is_uploaded(operation: "CommitOperationAdd") -> bool:
    """Whether the Hub has the bytes already, so that the commit only names them."""
    return bool(operation._is_uploaded)


def is_ignored(operation: "CommitOperationAdd") -> bool:
    """Whether the server would leave the file out of the commit."""
    return bool(operation._should_ignore)


def uploaded_before(path: str, sent: Sent) -> "CommitOperationAdd":
    """The operation that commits a file which an earlier process uploaded."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    operation = CommitOperationAdd(path_in_repo=path, path_or_fileobj=b"")
    operation.upload_info = UploadInfo(sha256=bytes.fromhex(sent.sha256), size=sent.size, sample=b"")
    operation._upload_mode = "lfs"
    operation._should_ignore = False
    operation._is_uploaded = True
    return operation
