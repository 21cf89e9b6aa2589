"""Compute packages over REST: checked before they are kept, one of them active, fetched as they came."""

from __future__ import annotations

import asyncio
import hashlib
import io
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fl_client.wire import archive
from fl_server.app import executors, scheduling
from fl_server.errors import Unavailable
from fl_server.rest.schemas import PackageObject
from fl_server.scheduler import packages as scheduler_packages
from fl_server.settings import Settings
from fl_server.store.ports import Collection
from tests.server.rest_world import MAX_PACKAGE_BYTES, MAX_UNPACKED_BYTES, Api, serving, tgz

PACKAGES = "/api/v1/packages/"
FORM = {"name": "digits", "helper": "numpyhelper", "description": ""}


def _zip(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in {"fedn_yaml": b"", **files}.items():
            packed.writestr(f"client/{name.replace('_', '.')}", data)
    return out.getvalue()


def _link() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as packed:
        packed.addfile(tarfile.TarInfo("fedn.yaml"))
        info = tarfile.TarInfo("x")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        packed.addfile(info)
    return out.getvalue()


async def _active_ids(api: Api) -> list[str]:
    found = (await api.http.get(f"{PACKAGES}?active=true")).json()
    return [package["package_id"] for package in found["result"]]


@pytest.mark.parametrize(
    ("file_name", "data", "extension", "media_type"),
    [
        ("package.tgz", tgz(), ".tgz", "application/gzip"),
        ("my.package.TAR.GZ", tgz(), ".tar.gz", "application/gzip"),
        ("p.tar.bz2", tgz("w:bz2"), ".tar.bz2", "application/x-bzip2"),
        ("p.zip", _zip(), ".zip", "application/zip"),
    ],
)
async def test_a_package_comes_back_as_it_came_under_a_name_with_its_whole_extension(
    file_name: str, data: bytes, extension: str, media_type: str, tmp_path: Path
) -> None:
    sha256 = hashlib.sha256(data).hexdigest()
    async with serving(tmp_path) as api:
        answer = await api.http.post(PACKAGES, files={"file": (file_name, data)}, data={**FORM, "description": "d"})
        added = answer.json()
        assert answer.status_code == 200
        assert (added["message"], added["checksum"]) == ("Package uploaded", sha256)
        package = (await api.http.get(f"{PACKAGES}{added['package_id']}")).json()
        PackageObject.model_validate(package)
        assert (package["name"], package["file_name"], package["helper"]) == ("digits", file_name, "numpyhelper")
        assert (package["description"], package["active"]) == ("d", True)
        stored_as = package["storage_file_name"]
        assert stored_as == added["storage_file_name"]
        assert stored_as[36:] == extension
        for query in ("", f"?name={stored_as}"):
            down = await api.http.get(f"{PACKAGES}download{query}")
            assert (down.status_code, down.content) == (200, data)
            assert down.headers["content-disposition"] == f"attachment; filename={stored_as}"
            assert down.headers["content-type"] == media_type
            checksum = await api.http.get(f"{PACKAGES}checksum{query}")
            assert checksum.json() == {"message": "Checksum created.", "checksum": sha256}
        (tmp_path / stored_as).write_bytes(data)
        archive.unpack(tmp_path / stored_as, tmp_path / "unpacked", archive.Limits())
        assert not any(api.folder.iterdir())


async def test_a_package_is_there_after_a_restart(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        package = await api.package()
    async with serving(tmp_path) as api:
        assert (await api.http.get(f"{PACKAGES}active")).json()["package_id"] == package["package_id"]
        down = await api.http.get(f"{PACKAGES}download")
        assert hashlib.sha256(down.content).hexdigest() == package["checksum"]


async def test_the_newest_upload_is_active_until_another_is_activated_or_none(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        first, second = (await api.package())["package_id"], (await api.package())["package_id"]
        assert await _active_ids(api) == [second]
        put = await api.http.put(f"{PACKAGES}active", json={"id": first})
        assert (put.status_code, put.json()) == (200, {"message": "Active package set"})
        assert await _active_ids(api) == [first]
        assert (await api.http.get(f"{PACKAGES}active")).json()["package_id"] == first
        again = await api.http.put(f"{PACKAGES}active", json={"id": first})
        assert (again.status_code, await _active_ids(api)) == (200, [first])

        deleted = await api.http.delete(f"{PACKAGES}active")
        assert (deleted.status_code, deleted.json()) == (200, {"message": "Active package deleted"})
        assert await _active_ids(api) == []
        for answer in (await api.http.delete(f"{PACKAGES}active"), await api.http.get(f"{PACKAGES}active")):
            assert (answer.status_code, answer.json()) == (404, {"message": "Entity not found"})
        assert (await api.http.get(f"{PACKAGES}count")).json() == 2
        assert (await api.http.put(f"{PACKAGES}active", json={"id": second})).status_code == 200


async def test_of_many_uploads_at_once_exactly_one_is_active(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        added = await asyncio.gather(*(api.package() for _ in range(8)))
        assert (await api.http.get(f"{PACKAGES}count")).json() == 8
        active = await _active_ids(api)
        assert len(active) == 1
        assert active[0] in [package["package_id"] for package in added]


async def test_of_two_that_a_crash_left_active_the_newest_counts(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for number, package_id in enumerate(["new", "old"]):
            document = {"package_id": package_id, "active": True, "helper": "numpyhelper", "storage_file_name": "x.tgz"}
            fl = {"version": 1, "activated_at": 2.0 - number}
            await api.scheduler.store.insert(Collection.PACKAGES, {**document, "fl": fl})
        assert (await api.http.get(f"{PACKAGES}active")).json()["package_id"] == "new"


async def test_nothing_is_found_where_there_is_no_package(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for path, message in [
            ("download", {"message": "No active package"}),
            ("download?name=x.tgz", {"message": "Package x.tgz not found"}),
            ("download?name=../state.sqlite", {"message": "Package ../state.sqlite not found"}),
            ("checksum", {"message": "No compute package uploaded", "checksum": None}),
            ("checksum?name=x.tgz", {"message": "File not found.", "checksum": None}),
            ("active", {"message": "Entity not found"}),
            ("nope", {"message": "Entity with id: nope not found"}),
        ]:
            answer = await api.http.get(f"{PACKAGES}{path}")
            assert (answer.status_code, answer.json()) == (404, message)
        for body in ({"id": "nope"}, {"id": "active"}):
            answer = await api.http.put(f"{PACKAGES}active", json=body)
            assert (answer.status_code, answer.json()) == (404, {"message": f"Entity with id: {body['id']} not found"})


async def test_a_package_whose_bytes_are_gone_is_a_404(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        package = await api.package()
        await api.packages.blobs.delete([package["storage_file_name"]])
        assert (await api.http.get(f"{PACKAGES}download")).status_code == 404


def _sent(data: bytes, file_name: str = "p.tgz", **form: str) -> dict[str, Any]:
    return {"files": {"file": (file_name, data)}, "data": {**FORM, **form}}


BAD_PACKAGES: list[tuple[dict[str, Any], str]] = [
    (_sent(tgz(), "p"), "file: 'p': a name that ends in .tar.gz, .tgz, .tar.bz2, .zip needed"),
    (_sent(tgz(), "p.gz"), "file: 'p.gz': a name that ends in"),
    (_sent(tgz(), "p.tgz/p.exe"), "file: 'p.exe': a name that ends in"),
    (_sent(tgz(), "p.tar"), "file: 'p.tar': a name that ends in"),
    (_sent(tgz(), "p" * 300 + ".tgz"), "file: "),
    (_sent(tgz(), "p.zip"), "file: named .zip, but what it holds is a gzip file"),
    (_sent(_zip(), "p.tgz"), "file: named .tgz, but what it holds is a zip"),
    (_sent(tgz("w:bz2"), "p.tar.gz"), "file: named .tar.gz, but what it holds is a bzip2 file"),
    (_sent(b""), "file: it is neither"),
    (_sent(b"no archive"), "file: it is neither"),
    (_sent(tgz()[:-20]), "file: it is damaged"),
    (_sent(_link()), "file: 'x' is a link"),
    (_sent(tgz(big_bin=bytes(MAX_UNPACKED_BYTES + 1))), f"file: it holds more than {MAX_UNPACKED_BYTES} bytes"),
    (_sent(_zip(big_bin=bytes(MAX_UNPACKED_BYTES + 1)), "p.zip"), f"file: it holds more than {MAX_UNPACKED_BYTES} by"),
    (_sent(bytes(3 * MAX_PACKAGE_BYTES)), f"file: more than package_max_bytes ({MAX_PACKAGE_BYTES} bytes)"),
    (_sent(tgz(), helper="nope"), "helper: 'nope' is unknown; known: "),
    (_sent(tgz(), colour="red"), "Invalid object: unknown key 'colour'"),
    (_sent(tgz(), name="n" * 300), "name: "),
    ({"files": {"file": ("p.tgz", tgz())}, "data": {"name": "n"}}, "helper: missing"),
    ({"files": {"package": ("p.tgz", tgz())}, "data": FORM}, "file: missing"),
    ({"data": FORM}, "file: send it as multipart/form-data"),
    ({"json": FORM}, "file: send it as multipart/form-data"),
    ({}, "file: send it as multipart/form-data"),
]


async def test_a_bad_package_is_a_400_in_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        kept = await api.package()
        before = await api.counts()
        for sent, message in BAD_PACKAGES:
            answer = await api.http.post(PACKAGES, **sent)
            assert answer.status_code == 400, answer.text
            assert answer.json()["message"].startswith(message)
            assert "\n" not in answer.json()["message"]
            assert not any(api.folder.iterdir())
        assert await api.counts() == before
        assert await _active_ids(api) == [kept["package_id"]]
        assert [key for key, _ in await api.packages.blobs.keys()] == [kept["storage_file_name"]]


async def test_a_package_without_its_manifest_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as packed:
        packed.addfile(tarfile.TarInfo("client/train.py"))
    async with serving(tmp_path) as api:
        answer = await api.http.post(PACKAGES, **_sent(out.getvalue()))
        assert (answer.status_code, answer.json()) == (400, {"message": "file: there is no fedn.yaml in it"})


@pytest.mark.parametrize("body", [{}, {"id": 5}, {"id": None}, {"id": "x", "colour": "red"}, [], "x"])
async def test_a_wrong_choice_of_the_active_package_is_a_400(body: Any, tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        package = await api.package()
        assert (await api.http.put(f"{PACKAGES}active", json=body)).status_code == 400
        assert await _active_ids(api) == [package["package_id"]]


async def test_the_name_is_the_files_if_none_is_given_and_a_path_is_no_part_of_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        form = {"helper": "numpyhelper"}
        files = {"file": ("C:\\packages\\digits.tgz", tgz())}
        added = await api.http.post(PACKAGES, files=files, data=form)
        package = (await api.http.get(f"{PACKAGES}{added.json()['package_id']}")).json()
        assert (package["name"], package["file_name"], package["description"]) == ("digits.tgz", "digits.tgz", "")


# ---- the helper


async def test_the_helper_is_the_active_packages_or_else_that_which_was_set(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        helper = "/api/v1/helpers/active"
        assert (await api.http.get(helper)).status_code == 400
        await api.package()
        assert (await api.http.get(helper)).json() == "numpyhelper"
        await api.http.delete(f"{PACKAGES}active")
        assert (await api.http.get(helper)).status_code == 400
        assert (await api.http.put(helper, json={"helper": "numpyhelper"})).status_code == 200
        assert (await api.http.get(helper)).json() == "numpyhelper"


async def test_another_helper_than_the_active_packages_is_a_conflict(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        document = {"package_id": "p", "name": "old", "active": True, "helper": "binaryhelper"}
        await api.insert(Collection.PACKAGES, **document)
        answer = await api.http.put("/api/v1/helpers/active", json={"helper": "numpyhelper"})
        message = "helper: that of the active package old is binaryhelper"
        assert (answer.status_code, answer.json()) == (409, {"message": message})
        assert (await api.http.get("/api/v1/helpers/active")).json() == "binaryhelper"


async def test_a_helper_alone_is_no_package(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.http.put("/api/v1/helpers/active", json={"helper": "numpyhelper"})
        assert (await api.http.get(PACKAGES)).json() == {"count": 0, "result": []}
        assert (await api.http.post(f"{PACKAGES}list", json={})).json() == {"count": 0, "result": []}
        assert (await api.http.get(f"{PACKAGES}count")).json() == 0
        assert (await api.http.post(f"{PACKAGES}count", json={})).json() == 0
        assert (await api.http.get(f"{PACKAGES}active")).status_code == 404
        assert (await api.http.delete(f"{PACKAGES}active")).status_code == 404


# ---- when things fail


async def test_a_store_that_is_away_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as api:
        save = api.scheduler.store.save
        failed: list[Any] = []

        async def once(writes: Any) -> None:
            if not failed:
                failed.append(writes)
                raise Unavailable("the disk is full")
            await save(writes)

        monkeypatch.setattr(api.scheduler.store, "save", once)
        package = await api.package()
        assert failed
        assert await _active_ids(api) == [package["package_id"]]


async def test_bytes_that_no_record_names_are_litter_when_they_are_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as api:
        package = await api.package()
        await api.packages.blobs.put("orphan.tgz", b"")
        monkeypatch.setattr(scheduler_packages, "LITTER_TTL_S", -1e12)  # the files' times are the host's
        assert await api.packages.litter() == ["orphan.tgz"]
        monkeypatch.setattr(scheduler_packages, "LITTER_TTL_S", 1e12)
        assert await api.packages.litter() == []
        assert package["storage_file_name"] in [key for key, _ in await api.packages.blobs.keys()]


async def test_what_a_former_life_was_checking_is_gone_when_the_server_starts(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for name in ("0123abcd", "0123abcd.seed"):
        (work / name).touch()
    with executors() as pools:
        async with scheduling(Settings.load(None, {"data_dir": tmp_path}), pools, time.time):
            assert not any(work.iterdir())
