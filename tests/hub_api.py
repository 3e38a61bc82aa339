"""The endpoints of the Hub server of the tests: a request in, an answer out."""

import base64
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote, urlencode

from hub_answers import Answer, Call, checked_card, spanned
from hub_large import LargeFiles
from hub_repository import ATTRIBUTES, MAIN, Blob, Commit, RefusedError, Repository, large_by, pointer

if TYPE_CHECKING:
    from hub_server import HubServer


class Api:
    """Every endpoint, over the state of one server."""

    def __init__(self, hub: "HubServer") -> None:
        self.hub = hub
        self.large = LargeFiles(hub)

    def answer(
        self, method: str, parts: list[str], query: dict[str, str], headers: Mapping[str, str], body: BinaryIO
    ) -> Answer:
        """Raises: RefusedError"""
        token = (headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token is not None and token not in self.hub.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        call = Call(method, parts, query, headers, body, token)
        match parts:
            case ["api", "whoami-v2"]:
                return self._whoami(call)
            case ["api", "validate-yaml"]:
                checked = checked_card(call.json()["content"])
                return Answer.json(checked, 400 if checked["errors"] else 200)
            case ["api", "repos", "create"]:
                return self._create(call)
            case ["api", "models", namespace, name, *rest]:
                return self._model(call, f"{namespace}/{name}", rest)
            case ["storage", oid, *_] if method in ("GET", "HEAD"):
                return spanned(self.hub.storage.blob(oid, large=True), call.headers.get("Range"), {})
            case ["storage", oid, *part] if method == "PUT":
                return self.large.put(call, oid, part)
            case ["storage", oid, "complete"] if method == "POST":
                return self.large.complete(call.json(), oid)
            case [namespace, name, "info", "lfs", *rest] if name.endswith(".git"):
                repository = self._repository(call, f"{namespace}/{name.removesuffix('.git')}", write=True)
                return self.large.lfs(call, repository, rest)
            case [namespace, name, "resolve", revision, *path] if method in ("GET", "HEAD"):
                return self._resolve(call, f"{namespace}/{name}", revision, "/".join(path))
        raise RefusedError(404, f"no endpoint {method} /{'/'.join(parts)}")

    def _repository(self, call: Call, name: str, *, write: bool = False, content: bool = False) -> Repository:
        """A repository that this caller may see, write to, or read the files of."""
        repository = self.hub.repositories.get(name)
        hidden = repository is not None and repository.private and call.token in (None, "hf_outsider")
        if repository is None or hidden:
            if call.token is None:
                raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if write and call.token is None:
            raise RefusedError(401, "Invalid username or password.")
        if write and (self.hub.tokens[call.token] != "write" or call.token == "hf_outsider"):
            raise RefusedError(403, f"Forbidden: you must have write access to {name}")
        if content and repository.gated and call.token not in self.hub.admitted:
            status, who = (401, "Please log in.") if call.token is None else (403, "Visit its page to ask for access.")
            message = f"Access to model {name} is restricted and you are not in the authorized list. {who}"
            raise RefusedError(status, message, "GatedRepo")
        return repository

    def _whoami(self, call: Call) -> Answer:
        if call.token is None:
            raise RefusedError(401, "Invalid username or password.")
        role = self.hub.tokens[call.token]
        access = {"displayName": "test", "role": role}
        orgs = [] if call.token == "hf_outsider" else [{"type": "org", "name": "org"}, {"type": "org", "name": "me"}]
        name = call.token.removeprefix("hf_")
        auth = {"type": "access_token", "accessToken": access}
        return Answer.json({"type": "user", "name": name, "fullname": name, "orgs": orgs, "auth": auth})

    def _create(self, call: Call) -> Answer:
        asked = call.json()
        if call.token is None:
            raise RefusedError(401, "Invalid username or password.")
        namespace = asked.get("organization") or call.token.removeprefix("hf_")
        name = f"{namespace}/{asked['name']}"
        if self.hub.tokens[call.token] != "write" or call.token == "hf_outsider":
            raise RefusedError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        about = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        with self.hub.lock:
            if name in self.hub.repositories:
                return Answer.json({"error": "You already created this model repo", **about}, 409)
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            repository = self.hub.repositories[name] = Repository(name, self.hub.storage, private)
            attributes = self.hub.storage.keep(ATTRIBUTES, "", large=False)
            repository.add(MAIN, {".gitattributes": attributes}, title="initial commit")
        return Answer.json(about)

    def _model(self, call: Call, name: str, rest: list[str]) -> Answer:
        write = rest[:1] in (["preupload"], ["commit"], ["branch"], ["tag"], ["xet-write-token"], ["settings"])
        write = write and not call.query.get("create_pr")  # whoever reads a repository may propose
        repository = self._repository(call, name, write=write and call.method != "GET")
        with self.hub.lock:
            match call.method, rest:
                case "GET" | "HEAD", []:
                    return self._info(call, repository, repository.find("main"))
                case "GET" | "HEAD", ["revision", revision]:
                    return self._info(call, repository, repository.find(revision))
                case "GET", ["auth-check"]:
                    self._repository(call, name, content=True)
                    return Answer.json({})
                case "GET", ["refs"]:
                    return Answer.json(references(repository))
                case "GET", ["commits", revision]:
                    return self._page(call, [as_listed(each) for each in repository.history(repository.find(revision))])
                case "GET", ["tree", revision, *path]:
                    entries = listing(
                        repository.find(revision), "/".join(path), call.query.get("recursive", "").lower() == "true"
                    )
                    return self._page(call, [self._entry(*entry) for entry in entries])
                case "POST", ["paths-info", revision]:
                    tree = repository.find(revision).tree
                    return Answer.json([self._entry(path, tree[path]) for path in call.json()["paths"] if path in tree])
                case "POST", ["preupload", revision]:
                    return self._preupload(call, repository.find(revision))
                case "POST", ["commit", revision]:
                    return self._commit(call, repository, revision)
                case "POST" | "DELETE", ["branch" | "tag" as kind, *named]:
                    return change_reference(call, repository, kind, "/".join(named))
                case "GET", ["xet-read-token" | "xet-write-token" as kind, _] if self.hub.xet:
                    return self.hub.xet.token(repository, kind)
        raise RefusedError(404, f"no endpoint {call.method} models/{'/'.join(rest)}")

    def _entry(self, path: str, blob: Blob | None) -> dict:
        if blob is None:
            return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
        entry = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
        if blob.large:
            size = len(pointer(blob.sha256, blob.size))
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": size}
        if blob.large and self.hub.xet:
            entry["xetHash"] = self.hub.xet.hash(blob)
        return entry

    def _info(self, call: Call, repository: Repository, commit: Commit) -> Answer:
        siblings = [{"rfilename": path} for path in commit.tree]
        if call.query.get("blobs", "").lower() in ("1", "true"):
            for each, blob in zip(siblings, commit.tree.values(), strict=True):
                each |= {"size": blob.size, "blobId": blob.oid}
                if blob.large:
                    pointed = len(pointer(blob.sha256, blob.size))
                    each["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": pointed}
        about = {"_id": "0", "id": repository.name, "modelId": repository.name, "sha": commit.sha, "siblings": siblings}
        about |= {"private": repository.private, "gated": "manual" if repository.gated else False, "disabled": False}
        about |= {"tags": [], "downloads": 0, "likes": 0, "lastModified": stamp(commit), "createdAt": stamp(commit)}
        return Answer.json(about, headers={"X-Repo-Commit": commit.sha})

    def _page(self, call: Call, entries: list[dict]) -> Answer:
        start = int(call.query.get("cursor", 0))
        headers = {}
        if start + self.hub.page < len(entries):
            query = urlencode({**call.query, "cursor": start + self.hub.page})
            url = f"{self.hub.endpoint}/{'/'.join(quote(part, safe='') for part in call.parts)}?{query}"
            headers["Link"] = f'<{url}>; rel="next"'
        return Answer.json(entries[start : start + self.hub.page], headers=headers)

    def _preupload(self, call: Call, commit: Commit) -> Answer:
        asked = call.json()["files"]
        if len(asked) > 256:
            raise RefusedError(413, "at most 256 files a call")
        files = []
        for file in asked:
            large = large_by(file["path"], base64.b64decode(file["sample"]), file["size"])
            blob = commit.tree.get(file["path"])
            mode = "lfs" if large else "regular"
            oid = blob.etag if blob else None
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer.json({"files": files, "commitOid": commit.sha})

    def _commit(self, call: Call, repository: Repository, revision: str) -> Answer:
        lines = [json.loads(line) for line in call.body.read().splitlines() if line.strip()]
        if self.hub.xet:
            self.hub.xet.collect(repository, [line["value"]["oid"] for line in lines if line["key"] == "lfsFile"])
        pull = bool(call.query.get("create_pr"))
        if pull and call.token is None:
            raise RefusedError(401, "Invalid username or password.")
        commit, number = repository.apply(revision, lines, pull)
        page = f"{self.hub.endpoint}/{repository.name}"
        about = {"success": True, "commitOid": commit.sha, "commitUrl": f"{page}/commit/{commit.sha}", "hookOutput": ""}
        return Answer.json(about | ({"pullRequestUrl": f"{page}/discussions/{number}"} if number else {}))

    def _resolve(self, call: Call, name: str, revision: str, path: str) -> Answer:
        repository = self._repository(call, name, content=True)
        commit = repository.find(revision)
        blob = repository.entry(commit, path)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if not blob.large:
            return spanned(blob, call.headers.get("Range"), headers)
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        headers["Location"] = f"{self.hub.store}/storage/{blob.sha256}/{quote(path)}"
        if self.hub.xet:
            headers |= self.hub.xet.headers(self.hub.endpoint, repository, commit, blob)
        return Answer(302, headers)


def listing(commit: Commit, folder: str, recursive: bool) -> list[tuple[str, Blob | None]]:
    """The files under a folder, and the folders, whose content is None."""
    inside = folder + "/" if folder else ""
    found: dict[str, Blob | None] = {}
    for path, blob in commit.tree.items():
        if path == folder:
            raise RefusedError(404, f"{folder} is no folder", "EntryNotFound", {"X-Repo-Commit": commit.sha})
        if not path.startswith(inside):
            continue
        steps = path[len(inside) :].split("/")
        for depth in range(1, len(steps) if recursive else min(2, len(steps))):
            found[inside + "/".join(steps[:depth])] = None
        if recursive or len(steps) == 1:
            found[path] = blob
    if folder and not found:
        raise RefusedError(404, f"{folder} does not exist", "EntryNotFound", {"X-Repo-Commit": commit.sha})
    return sorted(found.items())


def references(repository: Repository) -> dict:
    kinds = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
    found: dict[str, list] = {"branches": [], "tags": [], "pullRequests": [], "converts": []}
    for ref, sha in repository.refs.items():
        kind, name = ref.removeprefix("refs/").split("/", 1)
        shown = ref if kind == "pr" else name
        found[kinds[kind]].append({"name": shown, "ref": ref, "targetCommit": sha})
    return found


def change_reference(call: Call, repository: Repository, kind: str, named: str) -> Answer:
    """Make or delete a branch or a tag."""
    heads = {"branch": "refs/heads/", "tag": "refs/tags/"}[kind]
    if call.method == "DELETE":
        if heads + named not in repository.refs:
            raise RefusedError(404, f"no {kind} {named}", "RevisionNotFound")
        del repository.refs[heads + named]
        return Answer.json({})
    asked = call.json()
    start = repository.find(named if kind == "tag" else asked.get("startingPoint") or "main")
    ref = heads + (asked["tag"] if kind == "tag" else named)
    if ref in repository.refs:
        raise RefusedError(409, f"{kind} {ref} already exists")
    repository.refs[ref] = start.sha
    return Answer.json({})


def as_listed(commit: Commit) -> dict:
    about = {"id": commit.sha, "title": commit.title, "message": commit.description, "date": stamp(commit)}
    return about | {"authors": [{"user": "writer"}]}


def stamp(commit: Commit) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(commit.at))
