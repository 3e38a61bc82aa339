"""One commit on the Hub: large files go first, as they are finished, and nothing shows until the end.

Nothing here depends on what a repository's .gitattributes or .gitignore say: the server is asked how it takes each
file, and is told to ignore none.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from adaptertools.errors import HubError, HubMovedError, HubNotFoundError, HubUnavailableError, OptionError
from adaptertools.hub.address import Address
from adaptertools.hub.client import LONGEST_WAIT, connect, explained, offline
from adaptertools.hub.faults import retry_after
from adaptertools.hub.sent import Sent, holds, is_ignored, is_uploaded, uploaded_before
from adaptertools.hub.standing import (
    MAIN,
    Standing,
    asked,
    given,
    head_of,
    newer,
    ready,
    refs_of,
    requests_of,
    sha256_of,
    shown,
    size_of,
    standing,
)

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import GitRefs

_NOTHING_IGNORED = "# nothing is ignored\n"
"""Sent as the .gitignore that counts: files that one in the repository names would be left out without a word."""

ATTEMPTS = 5
"""How often a commit is tried while the Hub does not answer."""
WAIT = 1.0
"""Seconds before the second attempt; before each further one twice as long."""


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit came to."""

    sha: str | None
    """None for a trial."""
    url: str
    pull_request: str | None = None
    """Its page, where one was opened."""
    changed: bool = True
    """False where everything stood there already, and no commit was made."""


@dataclass(kw_only=True)
class Commit:
    """Files that become one commit on a branch, on top of the commit that was its head at the start.

    Paths are those in the address's folder. For one thread at a time.
    """

    address: Address
    branch: str
    parent: str | None
    """The head at the start; None where there is no such branch, which only a trial leaves so."""
    create_pr: bool
    created: bool
    """Whether the repository was made for this, or would be."""
    trial: bool
    files: Mapping[str, Standing]
    """What stands in the address's folder at the start."""
    unchanged: list[str] = field(default_factory=list)
    """Files that stand there already with the same content, and are not sent again."""
    deleted: list[str] = field(default_factory=list)
    """Files that this takes out of the repository."""
    _api: "HfApi" = field(repr=False)
    _refs: "GitRefs | None" = field(repr=False)
    _operations: "dict[str, CommitOperationAdd]" = field(default_factory=dict, repr=False)
    _asked_wait: float = field(default=0.0, repr=False)
    """Seconds that the server asked for when it took no commit."""

    @classmethod
    def open(
        cls,
        address: Address,
        *,
        token: str | None = None,
        private: bool = False,
        create_pr: bool = False,
        parent: str | None = None,
        trial: bool = False,
    ) -> Self:
        """Begin a commit; the repository and the branch are made where they are missing.

        `parent` is the head that an earlier run began on: has the branch moved since, that is an error. A `trial`
        changes nothing on the Hub and sends nothing.

        Raises: HubError; OptionError for what is no branch, or `private` with a repository that everyone can see
        """
        if offline():
            raise HubError(f"{address}: HF_HUB_OFFLINE is set, so that nothing can be sent: unset it")
        branch = address.revision or MAIN
        api = connect(token)
        refs, created = ready(api, address, branch, private=private, make=not trial and not create_pr)
        head = head_of(refs, branch)
        if create_pr and head is None:
            raise HubNotFoundError(f"{address}: there is no such branch, or repository, to open a pull request for")
        if parent is not None and head != parent:
            raise HubMovedError(_moved(address, parent, head))
        commit = cls(
            address=address,
            branch=branch,
            parent=head,
            create_pr=create_pr,
            created=created,
            trial=trial,
            files=standing(api, address, head),
            _api=api,
            _refs=refs,
        )
        if not trial and not created:
            commit._check_access()
        return commit

    def add(self, path: str, content: Path | bytes) -> Sent:
        """Put a file into the commit; a large one is uploaded now, and not needed any more afterwards.

        Raises: HubError
        """
        return self.add_all({path: content})[0]

    def add_all(self, contents: Mapping[str, Path | bytes]) -> list[Sent]:
        """Put files into the commit; the large ones are uploaded now, several at a time.

        Raises: HubError
        """
        from huggingface_hub import CommitOperationAdd

        changed = {}
        for path, content in contents.items():
            size_of(content)  # says what is missing before anything is sent
            if (old := self.files.get(path)) and old.is_same(content):
                self._forget(path)
                self.unchanged.append(path)
            else:
                source = str(content) if isinstance(content, Path) else content
                changed[path] = CommitOperationAdd(path_in_repo=self._inside(path), path_or_fileobj=source)
        self._upload([*changed.values()])
        for path, operation in changed.items():
            self._forget(path)
            self._operations[path] = operation
        return [self._sent(path, content) for path, content in contents.items()]

    def resume(self, sent: Sent) -> None:
        """Put a file into the commit that an earlier run uploaded, and whose bytes are no longer here.

        Raises: OptionError for a file whose bytes travel with the commit
        """
        if not sent.uploaded:
            raise OptionError(f"{sent.path} was not uploaded before its commit: add it again")
        self._forget(sent.path)
        if (old := self.files.get(sent.path)) and old.sha256 == sent.sha256:
            self.unchanged.append(sent.path)
        else:
            self._operations[sent.path] = uploaded_before(self._inside(sent.path), sent)

    @property
    def added(self) -> dict[str, int]:
        """The files that are new or differ from what stands there, with their bytes."""
        return {path: operation.upload_info.size for path, operation in self._operations.items()}

    def delete(self, path: str) -> None:
        """Take a file that stands in the repository out of it."""
        if path in self.files and path not in self.deleted:
            self._forget(path)
            self.deleted.append(path)

    def finish(self, message: str, description: str = "") -> Committed:
        """Commit, once: where an answer is lost, the branch is looked at before anything is sent again.

        Raises: HubMovedError where someone else committed meanwhile; HubError
        """
        operations = [*self._operations.values(), *self._deletions()]
        if self.trial or not operations:
            return Committed(None if self.trial else self.parent, self._url(self.parent), changed=False)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._send(operations, message, description)
            except HubError as error:
                if made := self._made():
                    return made
                passing = isinstance(error, HubUnavailableError | HubMovedError)  # or other work goes on there just now
                if not passing or attempt == ATTEMPTS or self._asked_wait > LONGEST_WAIT:
                    raise
            time.sleep(max(WAIT * 2 ** (attempt - 1), self._asked_wait))
        raise HubUnavailableError(f"{self.address}: no attempt was made to commit")

    def _send(self, operations: Sequence[Any], message: str, description: str) -> Committed:
        with explained(self.address, token=given(self._api)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the Hub finds odd about a card, such as one without metadata
            try:
                info = self._api.create_commit(
                    self.address.repo_id,
                    operations,
                    commit_message=message,
                    commit_description=description,
                    revision=self.branch,
                    create_pr=self.create_pr,
                    parent_commit=self.parent,
                )
            except ValueError as error:
                if "README.md" in str(error):  # the client has the Hub look at the card's metadata first
                    raise HubError(f"{self.address}: {error}") from error
                raise HubUnavailableError(f"{self.address}: the Hub's answer cannot be read: {error}") from error
            except Exception as error:
                self._asked_wait = retry_after(error) or 0.0
                raise
        return Committed(info.oid, self._url(info.oid), info.pr_url)

    def _made(self) -> Committed | None:
        """The commit, if it was made although its answer was lost; None where the branch stands as it did.

        Raises: HubMovedError where someone else committed
        """
        refs = refs_of(self._api, self.address)
        if self.create_pr:
            before = requests_of(self._refs)
            new = [ref for name, ref in requests_of(refs).items() if name not in before]
            return next((self._requested(ref) for ref in new if self._stands_at(ref.target_commit)), None)
        head = head_of(refs, self.branch)
        if head == self.parent:
            return None
        listed = asked(
            self._api, self.address, lambda: self._api.list_repo_commits(self.address.repo_id, revision=self.branch)
        )
        next_one = newer([commit.commit_id for commit in listed], self.parent)
        if next_one and self._stands_at(next_one):
            return Committed(next_one, self._url(next_one))
        raise HubMovedError(_moved(self.address, self.parent, head))

    def _stands_at(self, sha: str) -> bool:
        """Whether a commit holds all that this one was to bring."""
        files = standing(self._api, self.address, sha)
        brought = (path in files and holds(files[path], operation) for path, operation in self._operations.items())
        return all(brought) and not any(path in files for path in self.deleted)

    def _requested(self, ref: Any) -> Committed:
        number = ref.ref.rpartition("/")[2]
        page = f"{self._api.endpoint}/{self.address.repo_id}/discussions/{number}"
        return Committed(ref.target_commit, self._url(ref.target_commit), page)

    def _upload(self, operations: "Sequence[CommitOperationAdd]") -> None:
        """Ask the server how it takes these files, and upload those that do not travel with the commit."""
        if not operations or self.trial:
            return
        asked(
            self._api,
            self.address,
            lambda: _unwrapped(
                lambda: self._api.preupload_lfs_files(
                    self.address.repo_id,
                    operations,
                    revision=self.branch,
                    create_pr=self.create_pr,
                    gitignore_content=_NOTHING_IGNORED,
                )
            ),
        )

        if ignored := [operation.path_in_repo for operation in operations if is_ignored(operation)]:
            raise HubError(f"{self.address}: the repository's .gitignore leaves out {ignored[0]}: take it out of there")

    def _check_access(self) -> None:
        """Ask whether the token may write, before any work is done."""
        from huggingface_hub import CommitOperationAdd

        self._upload([CommitOperationAdd(path_in_repo=self._inside("README.md"), path_or_fileobj=b"")])

    def _sent(self, path: str, content: Path | bytes) -> Sent:
        operation = self._operations.get(path)
        if operation is None:
            known = self.files[path]
            return Sent(path, known.sha256 or sha256_of(content), known.size, known.sha256 is not None)
        info = operation.upload_info
        return Sent(path, info.sha256.hex(), info.size, is_uploaded(operation))

    def _deletions(self) -> list[Any]:
        from huggingface_hub import CommitOperationDelete

        return [CommitOperationDelete(path_in_repo=self._inside(path), is_folder=False) for path in self.deleted]

    def _forget(self, path: str) -> None:
        """Whatever was said of this path before counts no more."""
        self._operations.pop(path, None)
        for listed in (self.unchanged, self.deleted):
            if path in listed:
                listed.remove(path)

    def _inside(self, path: str) -> str:
        return f"{self.address.inside}/{path}" if self.address.inside else path

    def _url(self, sha: str | None) -> str:
        page = f"{self._api.endpoint}/{self.address.repo_id}"
        return f"{page}/commit/{sha}" if sha else page


def _moved(address: Address, parent: str | None, head: str | None) -> str:
    return (
        f"{address} moved on meanwhile, from {shown(parent)} to {shown(head)}: nothing was committed. Look at what "
        "changed there, then run the same command again; what is uploaded is not sent again"
    )


def _unwrapped(upload: Callable[[], None]) -> None:
    """The client wraps what goes wrong in a thread into a RuntimeError that says nothing; its cause does."""
    try:
        upload()
    except RuntimeError as error:
        if isinstance(error.__cause__, Exception):
            raise error.__cause__ from None
        raise
