"""A small Hub on 127.0.0.1 that speaks the protocol of the Hugging Face Hub, so that the real client talks real HTTP.

Large files lie in a storage of another origin (`localhost`), as on the Hub. Faults are injected by request.
"""

import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from hub_answers import Answer
from hub_api import Api
from hub_repository import Blob, RefusedError, Repository, Storage

SLOW, FAST = 1 << 14, 1 << 22
"""How many bytes are moved at once, with a throttle at least and without."""


@dataclass
class Request:
    """One line of the log. `sent` and `received` are the bytes of the bodies, as this server sees them."""

    method: str
    path: str
    range: str | None
    token: str | None
    started: float
    ended: float = 0.0
    status: int = 0
    sent: int = 0
    received: int = 0


@dataclass
class Fault:
    method: str
    path: re.Pattern[str]
    status: int | None
    times: int
    after: bool
    cut: int | None
    headers: Mapping[str, str]
    delay: float
    do: Callable[[], object] | None


@dataclass
class Faults:
    """What goes wrong, and for how many requests."""

    pending: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(
        self,
        method: str,
        path: str,
        *,
        status: int | None = 503,
        times: int = 1,
        after: bool = False,
        cut: int | None = None,
        headers: Mapping[str, str] = {},
        delay: float = 0.0,
        do: Callable[[], object] | None = None,
    ) -> None:
        """Make the next `times` requests fail whose method and path (with its query; a regular expression) match.

        `method` "*" is any. `status` is the answer; None closes the connection without an answer; 0 answers as usual
        (for a `delay` in seconds). `after`: the work is done first, only its answer is lost. `cut`: the connection
        is closed after so many bytes of the answer's body, or of the request's where the request has one.
        `do` is called before the work: what somebody else does at that very moment.
        """
        self.pending.append(Fault(method, re.compile(path), status, times, after, cut, headers, delay, do))

    def take(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.pending:
                if fault.times > 0 and fault.method in ("*", method) and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None

    def clear(self) -> None:
        with self.lock:
            self.pending.clear()


class CutError(Exception):
    """The connection is closed here and now."""


class HubServer:
    """The server, its repositories and its faults. Use as a context manager.

    tokens: known tokens and their roles. `hf_reader` and `hf_writer` see private repositories, `hf_outsider` does not.
    admitted: tokens that gated repositories let in (none to begin with); anonymous callers read public ones.
    throttle: bytes per second of all bodies together, in each direction; None is unlimited.
    xet: whether large files also go through Xet. port: 0 takes a free one.
    part_size: files above it are uploaded in parts. page: entries of one page of a listing.
    """

    def __init__(self, *, xet: bool = False, port: int = 0) -> None:
        self.tokens = {"hf_reader": "read", "hf_writer": "write", "hf_outsider": "write"}
        self.admitted: set[str] = set()
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults = Faults()
        self.throttle: float | None = None
        self._free_at: dict[str, float] = {}
        self.part_size = 8 << 20
        self.page = 100
        self.failures: list[BaseException] = []
        self.lock = threading.RLock()
        self._folder = tempfile.TemporaryDirectory(prefix="hub")
        self.storage = Storage(Path(self._folder.name))
        self.xet = None
        if xet:
            from hub_xet import Xet

            self.xet = Xet(self.storage)
        self._servers = [_Listener(self, port), _Listener(self, 0)]
        self.endpoint = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.store = f"http://localhost:{self._servers[1].server_port}"
        self.api = Api(self)

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *failure: object) -> None:
        for server in self._servers:
            server.stop()
        self._folder.cleanup()

    def create_repo(
        self, name: str, files: Mapping[str, bytes | Path] = {}, *, private: bool = False, gated: bool = False
    ) -> str:
        """A repository with one commit. Gives its sha."""
        self.repositories[name] = Repository(name, self.storage, private, gated)
        return self.commit(name, files)

    def commit(
        self,
        name: str,
        files: Mapping[str, bytes | Path],
        delete: Iterable[str] = (),
        branch: str = "main",
        title: str = "commit",
    ) -> str:
        """Someone else's commit. Gives its sha; any file name goes, hostile ones too."""
        blobs = {path: self.storage.keep(content, path) for path, content in files.items()}
        with self.lock:
            return self.repositories[name].add(f"refs/heads/{branch}", blobs, delete, title).sha

    def branch(self, name: str, branch: str, start: str = "main") -> str:
        repository = self.repositories[name]
        repository.refs[f"refs/heads/{branch}"] = repository.find(start).sha
        return repository.refs[f"refs/heads/{branch}"]

    def tag(self, name: str, tag: str, sha: str = "main") -> str:
        repository = self.repositories[name]
        repository.refs[f"refs/tags/{tag}"] = repository.find(sha).sha
        return repository.refs[f"refs/tags/{tag}"]

    def head(self, name: str, branch: str = "main") -> str:
        return self.repositories[name].find(branch).sha

    def blobs(self, name: str, rev: str = "main") -> dict[str, Blob]:
        return dict(self.repositories[name].find(rev).tree)

    def files(self, name: str, rev: str = "main") -> dict[str, bytes]:
        """What stands in it; `.gitattributes` too where the repository was made through the API, as on the Hub."""
        return {path: blob.read() for path, blob in self.blobs(name, rev).items()}

    def commits(self, name: str, branch: str = "main") -> list[tuple[str, str]]:
        """(sha, title), the newest first."""
        repository = self.repositories[name]
        return [(commit.sha, commit.title) for commit in repository.history(repository.find(branch))]

    def sent(self, path: str = "", method: str = "") -> int:
        """Bytes of the bodies that went out for paths that match."""
        return sum(each.sent for each in self.logged(path, method))

    def received(self, path: str = "", method: str = "") -> int:
        """Bytes of the bodies that came in for paths that match."""
        return sum(each.received for each in self.logged(path, method))

    def logged(self, path: str = "", method: str = "") -> list[Request]:
        return [each for each in self.requests if method in ("", each.method) and re.search(path, each.path)]

    @property
    def step(self) -> int:
        """How many bytes are moved at once."""
        return max(SLOW, int(self.throttle / 500)) if self.throttle else FAST

    def pace(self, direction: str, count: int) -> None:
        """Wait until these bytes have passed the line, which all bodies of a direction share."""
        if self.throttle:
            with self.lock:
                begins = max(time.monotonic(), self._free_at.get(direction, 0.0))
                self._free_at[direction] = passed = begins + count / self.throttle
            time.sleep(max(0.0, passed - time.monotonic()))

    @contextmanager
    def down(self) -> Iterator[None]:
        """Nobody answers meanwhile: every connection is closed at once."""
        fault = Fault("*", re.compile(""), None, 1 << 30, False, None, {}, 0.0, None)
        self.faults.pending.insert(0, fault)
        try:
            yield
        finally:
            self.faults.pending.remove(fault)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_port = True  # one is held for all tests of a process
    request_queue_size = 128

    def __init__(self, hub: HubServer, port: int) -> None:
        self.hub = hub
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request, client_address) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError | CutError):
            self.hub.failures.append(sys.exception())

    def stop(self) -> None:
        self.shutdown()
        for request in list(self.open):
            wake(request)
        self.server_close()


def wake(request: socket.socket) -> None:
    """Wake the thread that reads from a connection which a client keeps open."""
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the log is `HubServer.requests`."""

    def do_GET(self) -> None:
        hub = self.server.hub
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        entry = Request(self.command, self.path, self.headers.get("Range"), token, time.monotonic())
        hub.requests.append(entry)
        fault = hub.faults.take(self.command, self.path)
        with tempfile.TemporaryFile() as spool:
            try:
                if fault:
                    time.sleep(fault.delay)
                self._receive(spool, entry, fault)
                answer = self._answer(spool, entry, fault)
                self._send(answer, entry, fault)
            except CutError:
                self._hang_up()
            finally:
                entry.ended = time.monotonic()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _receive(self, spool, entry: Request, fault: Fault | None) -> None:
        """The body, whole, into the spool; nothing is done with a body that did not come whole."""
        for data in self._body():
            spool.write(data)
            entry.received += len(data)
            self.server.hub.pace("in", len(data))
            if fault and fault.cut is not None and entry.received >= fault.cut:
                raise CutError
        spool.seek(0)

    def _body(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            data = self.rfile.read(min(self.server.hub.step, left))
            if not data:
                raise CutError
            left -= len(data)
            yield data

    def _answer(self, spool, entry: Request, fault: Fault | None) -> Answer:
        hub, url = self.server.hub, urlsplit(self.path)
        broken = fault is not None and fault.cut is None and fault.status != 0
        answer = Answer()
        if fault and fault.do:
            fault.do()
        if not broken or fault.after:
            query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
            parts = [unquote(part) for part in url.path.strip("/").split("/")]
            try:
                answer = hub.api.answer(self.command, parts, query, self.headers, spool)
            except RefusedError as refused:
                answer = Answer.refusal(refused)
        if broken and fault.status is None:
            raise CutError
        if broken:
            answer = Answer.refusal(RefusedError(fault.status, "injected fault", None, fault.headers))
        return answer

    def _send(self, answer: Answer, entry: Request, fault: Fault | None) -> None:
        entry.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(answer.length))
        self.end_headers()
        if self.command == "HEAD":
            return
        left = answer.length if fault is None or fault.cut is None else min(fault.cut, answer.length)
        with answer.open() as body:
            while left:
                step = min(self.server.hub.step, left)
                self.server.hub.pace("out", step)
                entry.sent += step  # first: who has the bytes may look here at once
                count = 0
                try:
                    count = self.connection.sendfile(body, body.tell(), step)
                finally:
                    entry.sent -= step - count
                left -= count
        if entry.sent < answer.length:
            raise CutError

    def _hang_up(self) -> None:
        self.close_connection = True
        wake(self.connection)
