"""Large files of the Hub server of the tests: the endpoints of git-lfs, whole and in parts."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from hub_answers import Answer, Call
from hub_repository import RefusedError, Repository

if TYPE_CHECKING:
    from hub_server import HubServer


class LargeFiles:
    """Uploads into the storage of one server."""

    def __init__(self, hub: "HubServer") -> None:
        self.hub = hub

    def lfs(self, call: Call, repository: Repository, rest: list[str]) -> Answer:
        """The endpoints of git-lfs, of one repository that the caller may write to."""
        match rest:
            case ["objects", "batch"]:
                asked = call.json()
                known = ["xet", "multipart", "basic"] if self.hub.xet else ["multipart", "basic"]
                transfer = next(each for each in known if each in asked["transfers"])
                objects = [self._upload(repository, each, transfer) for each in asked["objects"]]
                return Answer.json({"transfer": transfer, "objects": objects})
            case ["verify"]:
                asked = call.json()
                place = self.hub.storage.folder / asked["oid"]
                if not place.exists() or place.stat().st_size != asked["size"]:
                    raise RefusedError(404, "no such object, or of another size")
                repository.objects.add(asked["oid"])
                return Answer.json({"success": True})
        raise RefusedError(404, "no such endpoint of LFS")

    def _upload(self, repository: Repository, asked: dict, transfer: str) -> dict:
        """What to do with an object: nothing where this repository has it."""
        oid, size = asked["oid"], asked["size"]
        if oid in repository.objects:
            return {"oid": oid, "size": size}
        page = f"{self.hub.endpoint}/{repository.name}.git/info/lfs"
        upload: dict = {"href": f"{self.hub.store}/storage/{oid}"}
        if transfer == "multipart" and size > self.hub.part_size:
            count = -(-size // self.hub.part_size)
            parts = {f"{part:05}": f"{self.hub.store}/storage/{oid}/{part}" for part in range(1, count + 1)}
            upload = {
                "href": f"{self.hub.store}/storage/{oid}/complete",
                "header": {"chunk_size": str(self.hub.part_size), **parts},
            }
        verify = {"href": f"{page}/verify", "header": {}}
        return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": verify}}

    def put(self, call: Call, oid: str, part: list[str]) -> Answer:
        place = self.hub.storage.folder / ".".join([oid, *(part or ["whole"])])
        with place.open("wb") as file:
            while data := call.body.read(1 << 20):
                file.write(data)
        if not part:
            self._kept(place, oid)
        return Answer(headers={"ETag": f'"{oid[:16]}-{"-".join(part)}"'})

    def complete(self, asked: dict, oid: str) -> Answer:
        """Put the parts together; like the upload itself it needs no token, since its address was handed out."""
        parts = [self.hub.storage.folder / f"{oid}.{part['partNumber']}" for part in asked["parts"]]
        if not all(part["etag"] for part in asked["parts"]) or not all(part.exists() for part in parts):
            raise RefusedError(400, "a part is missing")
        with (self.hub.storage.folder / f"{oid}.whole").open("wb") as whole:
            for part in parts:
                whole.write(part.read_bytes())
                part.unlink()
        self._kept(Path(whole.name), oid)
        return Answer.json({})

    def _kept(self, place: Path, oid: str) -> None:
        """Take an uploaded object in, if it is what it says."""
        if not re.fullmatch("[0-9a-f]{64}", oid) or self.hub.storage.keep(place, "", large=True).sha256 != oid:
            place.unlink()
            raise RefusedError(400, "the content is not what its sha256 says")
        place.unlink()
