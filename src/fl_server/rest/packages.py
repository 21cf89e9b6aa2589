"""Compute packages: one comes in, checked before it is kept; one of them is active; clients fetch it."""

from __future__ import annotations

import asyncio
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from fl_client.wire import archive

from ..errors import Invalid, NotFound
from ..scheduler.packages import Packages
from ..store.ports import Document
from .bodies import BoundedRoute, Desk, FileBytes
from .models import known_helper
from .records import answered
from .schemas import (
    PACKAGES,
    ActivePackage,
    Checksum,
    Failure,
    Message,
    PackageAdded,
    PackageFile,
    PackageForm,
    PackageObject,
    checked,
)

MEDIA_TYPES = {
    ".tgz": "application/gzip",
    ".tar.gz": "application/gzip",
    ".tar.bz2": "application/x-bzip2",
    ".zip": "application/zip",
}
_NAMED = f"a name that ends in {', '.join(archive.FORMATS)} needed"
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "helper"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": f"an archive with a {archive.MANIFEST} in it; {_NAMED}",
                        },
                        "name": {"type": "string", "description": "the file's name if absent"},
                        "helper": {"type": "string", "description": "the format of its models: numpyhelper"},
                        "description": {"type": "string"},
                    },
                }
            }
        },
    }
}


def routes(packages: Packages, desk: Desk) -> APIRouter:
    router = APIRouter(prefix="/api/v1/packages", tags=["packages"], route_class=BoundedRoute)
    limits = archive.Limits(total_bytes=desk.max_unpacked_bytes)

    @router.post(
        "/",
        response_model=PackageAdded,
        operation_id="add_package",
        openapi_extra=_FORM,
        responses={400: {"model": Failure}},
    )
    async def add(request: Request) -> Response:
        """Keeps the package; it becomes the active one."""
        async with desk.receive(request, "file", desk.max_package_bytes, "package_max_bytes") as upload:
            form = checked(PackageForm, upload.fields)
            helper = known_helper(form.helper)
            file_name = re.split(r"[\\/]", upload.file_name)[-1]  # some send the whole path
            if (extension := archive.extension(file_name)) is None:
                raise Invalid(f"file: {file_name[:100]!r}: {_NAMED}")
            file = checked(PackageFile, {"file": file_name}).file
            check = asyncio.get_running_loop().run_in_executor(desk.kernel, _checked, upload.path, extension, limits)
            document = await answered(
                packages.add(
                    upload.path,
                    name=form.name or file,
                    description=form.description,
                    file_name=file,
                    extension=extension,
                    helper=helper,
                    sha256=await check,
                )
            )
        return JSONResponse(
            {
                "message": "Package uploaded",
                "package_id": document["package_id"],
                "storage_file_name": document["storage_file_name"],
                "checksum": document["fl"]["sha256"],
            }
        )

    @router.get("/active", response_model=PackageObject, operation_id="get_active_package")
    async def active() -> Response:
        if (package := await packages.active()) is None:
            raise NotFound("Entity not found")
        return JSONResponse(PACKAGES.answer(package))

    @router.put("/active", response_model=Message, operation_id="set_active_package")
    async def activate(body: ActivePackage) -> Response:
        if not await answered(packages.activate(body.id)):
            raise NotFound(f"Entity with id: {body.id} not found")
        return JSONResponse({"message": "Active package set"})

    @router.delete("/active", response_model=Message, operation_id="delete_active_package")
    async def deactivate() -> Response:
        """From then on no package is active; it is kept, and can be activated again."""
        if not await answered(packages.deactivate()):
            raise NotFound("Entity not found")
        return JSONResponse({"message": "Active package deleted"})

    async def named(name: str | None) -> Document | None:
        return await (packages.stored_as(name) if name else packages.active())

    @router.get(
        "/download",
        operation_id="download_package",
        response_class=Response,
        responses={
            200: {
                "content": {
                    media_type: {"schema": {"type": "string", "format": "binary"}}
                    for media_type in (*MEDIA_TYPES.values(), "application/octet-stream")  # what generators know
                }
            }
        },
    )
    async def download(name: str | None = None) -> Response:
        """`name`: a storage_file_name; absent: the active package."""
        if (package := await named(name)) is None:
            raise NotFound(f"Package {name} not found" if name else "No active package")
        stored_as = package["storage_file_name"]
        path = await packages.blobs.local(stored_as)
        media_type = MEDIA_TYPES[stored_as[stored_as.index(".") :]]
        return FileBytes(path, stored_as, desk.disk, media_type)

    @router.get(
        "/checksum", response_model=Checksum, operation_id="get_package_checksum", responses={404: {"model": Checksum}}
    )
    async def checksum(name: str | None = None) -> Response:
        """The SHA-256 of the archive. `name`: a storage_file_name; absent: the active package."""
        if (package := await named(name)) is None:
            message = "File not found." if name else "No compute package uploaded"
            return JSONResponse({"message": message, "checksum": None}, 404)
        return JSONResponse({"message": "Checksum created.", "checksum": package["fl"]["sha256"]})

    return router


def _checked(path: Path, extension: str, limits: archive.Limits) -> str:
    """Its SHA-256. Raises Invalid."""
    try:
        found = archive.format_of(path)
        if found != archive.FORMATS[extension]:
            raise Invalid(f"file: named {extension}, but what it holds is a {_WORDS[found]}")
        archive.check(path, limits)
    except archive.BadArchive as wrong:
        raise Invalid(f"file: {wrong}") from None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_WORDS: dict[archive.Format, str] = {"gz": "gzip file", "bz2": "bzip2 file", "zip": "zip"}
