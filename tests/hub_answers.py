"""What the endpoints of the Hub server of the tests take and give: requests taken apart, and answers."""

import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qsl

import yaml
from hub_repository import Blob, RefusedError


@dataclass
class Answer:
    """Status, headers, and the body: bytes, or a span of a file."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    file: Path | None = None
    start: int = 0
    length: int = 0

    def __post_init__(self) -> None:
        if self.file is None:
            self.length = len(self.body)

    def open(self) -> BinaryIO:
        if self.file is None:
            return io.BytesIO(self.body)
        file = self.file.open("rb")
        file.seek(self.start)
        return file

    @classmethod
    def json(cls, value: object, status: int = 200, headers: Mapping[str, str] = {}) -> "Answer":
        return cls(status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode())

    @classmethod
    def refusal(cls, refused: RefusedError) -> "Answer":
        headers = {"X-Error-Message": refused.message, **refused.headers}
        if refused.code:
            headers["X-Error-Code"] = refused.code
        return cls.json({"error": refused.message}, refused.status, headers)


@dataclass
class Call:
    """A request, taken apart."""

    method: str
    parts: list[str]
    query: dict[str, str]
    headers: Mapping[str, str]
    body: BinaryIO
    token: str | None

    def json(self) -> dict:
        text = self.body.read()
        if "json" in self.headers.get("Content-Type", ""):
            return json.loads(text)
        form: dict[str, list[str]] = {}
        for key, value in parse_qsl(text.decode()):
            form.setdefault(key, []).append(value)
        return form


def spanned(blob: Blob, span: str | None, headers: dict[str, str]) -> Answer:
    """A file, or the span of it that a Range header asks for."""
    headers = {
        "ETag": f'"{blob.etag}"',
        "Content-Type": "application/octet-stream",
        "Accept-Ranges": "bytes",
        **headers,
    }
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", span or "")
    if not match or match[0] == "bytes=-":
        return Answer(200, headers, file=blob.path, length=blob.size)
    first, last = match.groups()
    start = int(first) if first else max(0, blob.size - int(last))
    end = min(blob.size, int(last) + 1) if first and last else blob.size
    if start >= end:
        raise RefusedError(416, "range outside of the file", headers={"Content-Range": f"bytes */{blob.size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{blob.size}"
    return Answer(206, headers, file=blob.path, start=start, length=end - start)


def checked_card(text: str) -> dict:
    """What the Hub says of a model card's metadata; it refuses base models that are no repositories."""
    found = re.match(r"---\r?\n(.*?\n)---", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        return {"errors": [{"message": f"YAML: {error}"}], "warnings": []}
    errors = []
    if not isinstance(metadata, dict):
        return {"errors": [{"message": "YAML: not a mapping"}], "warnings": []}
    checks: dict[str, Callable[[str], object]] = {
        "base_model": re.compile(r"\w[\w.-]*(/\w[\w.-]*)?").fullmatch,
        "base_model_relation": ("adapter", "merge", "quantized", "finetune").__contains__,
        "license": re.compile(r"[a-z0-9.-]+").fullmatch,
        "language": re.compile(r"[a-z]{2,3}(-\w+)?|multilingual|code").fullmatch,
        "datasets": re.compile(r"\w[\w.-]*(/\w[\w.-]*)?").fullmatch,
        "tags": lambda tag: isinstance(tag, str),
        "library_name": re.compile(r"[\w.-]+").fullmatch,
    }
    for key, allowed in checks.items():
        values = metadata.get(key) if isinstance(metadata.get(key), list) else [metadata.get(key)]
        errors += [
            {"message": f'"{key}" with value "{value}" is not valid'}
            for value in values
            if value is not None and not (isinstance(value, str) and allowed(value))
        ]
    return {"errors": errors, "warnings": [] if metadata else [{"message": "empty or missing yaml metadata"}]}
