"""Compute packages from a stranger: whatever they hold, nothing lands outside, nothing fills the disk, and the reason
is one sentence."""

from __future__ import annotations

import bz2
import gzip
import io
import random
import stat
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from fl_client.wire.archive import BadArchive, Limits, check, extension, format_of, unpack

LIMITS = Limits(total_bytes=1 << 20, members=50)
YAML = b"entry_points: {}\n"
TEN_GB = 10 << 30
Entry = tarfile.TarInfo | tuple[str, bytes]


def tar(*entries: Entry, mode: str = "w:gz", format: int = tarfile.PAX_FORMAT, manifest: bool = True) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=format) as archive:  # type: ignore[call-overload]
        for entry in [*([("client/fedn.yaml", YAML)] if manifest else []), *entries]:
            info, data = (member(entry[0]), entry[1]) if isinstance(entry, tuple) else (entry, b"")
            info.size = info.size or len(data)
            archive.addfile(info, io.BytesIO(data) if len(data) == info.size else None)
    return out.getvalue()


def member(
    name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, target: str = "", size: int = 0
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.size = kind, mode, target, size
    return info


def packed(*entries: tuple[str | zipfile.ZipInfo, bytes], manifest: bool = True) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        if manifest:
            archive.writestr("client/fedn.yaml", YAML)
        for name, data in entries:
            archive.writestr(name, data)
    return out.getvalue()


def zip_member(name: str, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def refused(data: bytes, folder: Path, limits: Limits = LIMITS) -> str:
    """What check and unpack say; both the same, in one sentence, and nothing is left."""
    path, target = folder / "package", folder / "unpacked"
    path.write_bytes(data)
    said = []
    for attempt in (lambda: check(path, limits), lambda: unpack(path, target, limits)):
        with pytest.raises(BadArchive) as caught:
            attempt()
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "\n" not in said[0]
    assert len(said[0]) < 250
    assert [left.name for left in folder.iterdir()] == ["package"]
    return said[0]


# ---- what is taken


@pytest.mark.parametrize(
    ("pack", "kind"),
    [
        (lambda entries: tar(*entries), "gz"),
        (lambda entries: tar(*entries, format=tarfile.GNU_FORMAT), "gz"),
        (lambda entries: tar(*entries, format=tarfile.USTAR_FORMAT), "gz"),
        (lambda entries: tar(*entries, mode="w:bz2"), "bz2"),
        (lambda entries: packed(*entries), "zip"),
    ],
    ids=["pax", "gnu", "ustar", "bzip2", "zip"],
)
def test_what_was_packed_is_unpacked(
    pack: Callable[[list[tuple[str, bytes]]], bytes], kind: str, tmp_path: Path
) -> None:
    long_name = "client/" + "d" * 90 + "/" + "f" * 90
    contents = {"client/train.py": b"print()\n" * 100_000, "client/empty": b"", long_name: b"x"}
    contents["client/data/é.bin"] = bytes(range(256))
    path = tmp_path / "p"
    path.write_bytes(pack(list(contents.items())))
    assert format_of(path) == kind
    check(path, LIMITS)
    home = unpack(path, tmp_path / "out", LIMITS)
    assert home == tmp_path / "out" / "client"
    found = {str(file.relative_to(tmp_path / "out")): file.read_bytes() for file in home.rglob("*") if file.is_file()}
    assert found == {"client/fedn.yaml": YAML, **contents}


def test_files_keep_whether_they_run_and_no_other_bit(tmp_path: Path) -> None:
    wild, plain = member("run", mode=0o7777), member("plain", mode=0o066)
    (tmp_path / "p").write_bytes(tar(wild, plain, member("folder", tarfile.DIRTYPE, mode=0)))
    unpack(tmp_path / "p", tmp_path / "out", LIMITS)
    (tmp_path / "z").write_bytes(packed((zip_member("run", stat.S_IFREG | 0o4777), b"")))
    unpack(tmp_path / "z", tmp_path / "zipped", LIMITS)
    modes = {
        str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "out/run", tmp_path / "out/plain", tmp_path / "zipped/run")
    }
    assert modes == {"out/run": 0o755, "out/plain": 0o644, "zipped/run": 0o755}
    assert stat.S_IMODE((tmp_path / "out/folder").stat().st_mode) & 0o7022 == 0


@pytest.mark.parametrize("pack", [tar, packed])
def test_the_manifest_nearest_to_the_top_says_where_the_package_lies(
    pack: Callable[..., bytes], tmp_path: Path
) -> None:
    (tmp_path / "p").write_bytes(pack(("b/a/fedn.yaml", YAML), ("./a/fedn.yaml", YAML), manifest=False))
    assert unpack(tmp_path / "p", tmp_path / "out", LIMITS) == tmp_path / "out" / "a"
    (tmp_path / "q").write_bytes(pack(("fedn.yaml", YAML)))
    assert unpack(tmp_path / "q", tmp_path / "top", LIMITS) == tmp_path / "top"


def test_a_folder_that_exists_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(tar())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileExistsError):
        unpack(tmp_path / "p", tmp_path / "out", LIMITS)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_folder_may_be_named_twice(tmp_path: Path) -> None:
    folder = [member("./", tarfile.DIRTYPE), member("client/", tarfile.DIRTYPE), member("client", tarfile.DIRTYPE)]
    (tmp_path / "p").write_bytes(tar(*folder))
    check(tmp_path / "p", LIMITS)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("a.TGZ", ".tgz"),
        ("a.b.tar.gz", ".tar.gz"),
        ("a.tar.bz2", ".tar.bz2"),
        ("a.zip", ".zip"),
        ("tgz", None),
        ("a.gz", None),
        ("a.tar", None),
        ("a.tgz.exe", None),
        ("", None),
    ],
)
def test_a_package_is_known_by_its_whole_extension(name: str, known: str | None) -> None:
    assert extension(name) == known


# ---- what is refused


def _pax(**records: str) -> tarfile.TarInfo:
    info = member("x")
    info.pax_headers = records
    return info


SPARSE = member("s", tarfile.GNUTYPE_SPARSE)
BAD_TARS: list[tuple[str, list[Entry], str]] = [
    ("symlink", [member("a", tarfile.SYMTYPE, target="/etc/passwd")], "'a' is a link"),
    ("symlink inside", [member("a", tarfile.SYMTYPE, target="client/fedn.yaml")], "'a' is a link"),
    ("symlink, then through it", [member("a", tarfile.SYMTYPE, target="/tmp"), ("a/x", b"x")], "'a' is a link"),
    ("hard link", [member("a", tarfile.LNKTYPE, target="client/fedn.yaml")], "'a' is a link"),
    ("long link", [member("a", tarfile.SYMTYPE, target="t" * 300)], "link"),
    ("character device", [member("a", tarfile.CHRTYPE)], "'a' is a device"),
    ("block device", [member("a", tarfile.BLKTYPE)], "'a' is a device"),
    ("pipe", [member("a", tarfile.FIFOTYPE)], "'a' is a pipe"),
    ("sparse", [SPARSE], "'s' is a sparse file"),
    ("contiguous", [member("a", tarfile.CONTTYPE)], "'a' is neither a file nor a folder"),
    ("unknown type", [member("a", b"Z")], "'a' is neither a file nor a folder"),
    ("a folder with contents", [member("a", tarfile.DIRTYPE, size=512)], "'a' has a size that makes no sense"),
    ("up", [("../x", b"x")], "'../x' leads out of the package"),
    ("up inside", [("client/../../x", b"x")], "leads out of the package"),
    ("up at the end", [member("client/..", tarfile.DIRTYPE)], "leads out of the package"),
    ("absolute", [("/etc/x", b"x")], "'/etc/x' is an absolute path"),
    ("absolute folder", [member("//x", tarfile.DIRTYPE)], "is an absolute path"),
    ("drive letter", [("C:x", b"x")], "backslash or a colon"),
    ("backslash", [("..\\x", b"x")], "backslash or a colon"),
    ("new line", [("a\nb", b"x")], "no name for a file"),
    ("empty", [member("")], "no name for a file"),
    ("a dot", [(".", b"x")], "no name for a file"),
    ("long part", [("f" * 300, b"x")], "too long for a name"),
    ("long path", [("d/" * 700 + "f", b"x")], "too long for a name"),
    ("twice", [("x", b"1"), ("x", b"2")], "'x' is in it twice"),
    ("twice, spelled otherwise", [("x", b"1"), ("./x", b"2")], "'./x' is in it twice"),
    ("twice in another case", [("x", b"1"), ("X", b"2")], "'X' is in it twice"),
    ("twice in another form", [("\u00e9", b"1"), ("e\u0301", b"2")], "is in it twice"),
    ("a file in a file", [("client/fedn.yaml/x", b"1")], "is in it twice"),
    ("a folder that is a file", [member("client/fedn.yaml", tarfile.DIRTYPE)], "is in it twice"),
    ("a file that is a folder", [("client", b"1")], "is in it twice"),
    ("more than the limit", [("x", bytes(LIMITS.total_bytes + 1))], "more than 1048576 bytes"),
    ("more than the limit together", [(f"{i}", bytes(300_000)) for i in range(4)], "more than 1048576 bytes"),
    ("too many", [(f"{i}", b"") for i in range(50)], "more than 50 members"),
    ("too many folders", [member(f"{i}", tarfile.DIRTYPE) for i in range(50)], "more than 50 members"),
    ("pax size", [_pax(size="5")], "pax header size"),
    ("pax sparse", [_pax(**{"GNU.sparse.major": "1"})], "pax header GNU.sparse.major"),
    ("pax name up", [_pax(path="../x")], "leads out of the package"),
]


@pytest.mark.parametrize(("kind", "entries", "said"), BAD_TARS, ids=[case[0] for case in BAD_TARS])
def test_a_tar_with_what_a_package_must_not_have_is_refused(
    kind: str, entries: list[Entry], said: str, tmp_path: Path
) -> None:
    assert said in refused(tar(*entries, format=tarfile.PAX_FORMAT), tmp_path)
    if not kind.startswith("pax"):
        assert said in refused(tar(*entries, mode="w:bz2", format=tarfile.GNU_FORMAT), tmp_path)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    for format in (tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        assert "no name for a file" in refused(tar(("a\udcffb", b"x"), format=format), tmp_path)
    refused(tar(("a\udcffb", b"x"), format=tarfile.PAX_FORMAT), tmp_path)


BAD_ZIPS: list[tuple[str, list[tuple[str | zipfile.ZipInfo, bytes]], str]] = [
    ("symlink", [(zip_member("a", stat.S_IFLNK | 0o777), b"/etc/passwd")], "'a' is a link"),
    ("device", [(zip_member("a", stat.S_IFCHR), b"")], "'a' is neither a file nor a folder"),
    ("a file that is a folder", [(zip_member("a/", stat.S_IFREG), b"")], "called a file and a folder"),
    ("a folder that is a file", [(zip_member("a", stat.S_IFDIR), b"")], "called a file and a folder"),
    ("a folder with contents", [(zip_member("a/"), b"x")], "'a/' is a folder with contents"),
    ("up", [("../x", b"x")], "leads out of the package"),
    ("absolute", [(zip_member("/x"), b"x")], "is an absolute path"),
    ("drive letter", [("C:/x", b"x")], "backslash or a colon"),
    ("backslash", [("a\\b", b"x")], "backslash or a colon"),
    ("twice in another case", [("x", b"1"), ("X", b"2")], "'X' is in it twice"),
    ("more than the limit together", [(f"{i}", bytes(300_000)) for i in range(4)], "more than 1048576 bytes"),
    ("too many", [(f"{i}", b"") for i in range(50)], "more than 50 members"),
]


@pytest.mark.parametrize(("entries", "said"), [case[1:] for case in BAD_ZIPS], ids=[case[0] for case in BAD_ZIPS])
def test_a_zip_with_what_a_package_must_not_have_is_refused(
    entries: list[tuple[str | zipfile.ZipInfo, bytes]], said: str, tmp_path: Path
) -> None:
    assert said in refused(packed(*entries), tmp_path)


def test_a_name_that_ends_at_a_nul_is_refused(tmp_path: Path) -> None:
    for name in ("fedn.yaml#hidden", "#", "#/"):
        assert "no name for a file" in refused(packed((name, b"")).replace(b"#", b"\0"), tmp_path)
    long_name = "a" * 110 + "#" + "b" * 60  # in a header of its own
    plain = tar((long_name, b"x"), mode="w:", format=tarfile.GNU_FORMAT)
    assert "no name for a file" in refused(gzip.compress(plain.replace(b"#", b"\0")), tmp_path)


def test_a_name_of_any_length_makes_no_long_message(tmp_path: Path) -> None:
    data = packed(("y" * 5000, b"1"), manifest=False)
    listed, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entry = data[listed : listed + 28] + b"\1\0" + data[listed + 30 : listed + 46] + b"x"  # another name than inside
    record = data[end : end + 12] + len(entry).to_bytes(4, "little") + data[end + 16 :]
    assert "is damaged: File name in directory 'x'" in refused(data[:listed] + entry + record, tmp_path)


def test_a_name_that_occurs_twice_in_a_zip_is_refused(tmp_path: Path) -> None:
    assert "'x' is in it twice" in refused(packed(("x", b"1"), ("y", b"2")).replace(b"y", b"x"), tmp_path)


def test_an_encrypted_or_oddly_packed_zip_is_refused(tmp_path: Path) -> None:
    for offset, value, said in [(8, b"\1\0", "is encrypted"), (10, b"\x0e\0", "neither stored nor deflated")]:
        data = bytearray(packed())
        listed = data.index(b"PK\1\2") + offset
        data[listed : listed + 2] = value
        assert said in refused(bytes(data), tmp_path)


@pytest.mark.parametrize("pack", [tar, packed])
def test_a_package_without_its_manifest_is_refused(pack: Callable[..., bytes], tmp_path: Path) -> None:
    assert refused(pack(("train.py", b""), manifest=False), tmp_path) == "there is no fedn.yaml in it"
    assert refused(pack(("fedn.yaml.txt", b""), manifest=False), tmp_path) == "there is no fedn.yaml in it"


def test_a_folder_called_fedn_yaml_is_no_manifest(tmp_path: Path) -> None:
    folder = member("fedn.yaml", tarfile.DIRTYPE)
    assert refused(tar(folder, manifest=False), tmp_path) == "there is no fedn.yaml in it"


@pytest.mark.parametrize("data", [b"", b"PK", b"hello", YAML, tar(mode="w:"), b"\x7fELF" * 100])
def test_what_is_no_archive_is_refused(data: bytes, tmp_path: Path) -> None:
    assert refused(data, tmp_path) == "it is neither a tar (gzip or bzip2) nor a zip"


@pytest.mark.parametrize(
    "data",
    [
        b"\x1f\x8b",
        b"\x1f\x8b" + bytes(100),
        b"BZh9",
        b"BZh9" + bytes(100),
        b"PK\x03\x04" + bytes(100),
        b"PK\x05\x06",
        gzip.compress(b"", mtime=0),
        gzip.compress(b"text" * 200, mtime=0),
        bz2.compress(b""),
    ],
)
def test_what_only_begins_like_an_archive_is_refused(data: bytes, tmp_path: Path) -> None:
    refused(data, tmp_path)


@pytest.mark.parametrize("pack", [tar, packed])
def test_an_archive_that_ends_early_is_refused_wherever_it_ends(pack: Callable[..., bytes], tmp_path: Path) -> None:
    whole = pack(("data", random.Random(1).randbytes(2000)))
    for length in range(0, len(whole) - 1, 97):
        refused(whole[:length], tmp_path)


def test_what_follows_a_tars_end_is_refused(tmp_path: Path) -> None:
    plain = tar(mode="w:")
    (tmp_path / "package").write_bytes(gzip.compress(plain + bytes(100_000)))
    check(tmp_path / "package", LIMITS)
    assert refused(gzip.compress(plain + b"more"), tmp_path) == "it goes on after its end"


def test_damage_anywhere_is_a_refusal_and_never_another_error(tmp_path: Path) -> None:
    rng, path = random.Random(7), tmp_path / "p"
    plain = tar(("d/" + "n" * 120, b"x" * 50), mode="w:")
    originals = [plain, tar(("x", b"y" * 50)), tar(("x", b"y" * 50), mode="w:bz2"), packed(("x", b"y" * 50))]
    for number in range(1200):
        data = bytearray(originals[number % 4])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.choice([0, 0xFF, rng.randrange(256)])
        path.write_bytes(gzip.compress(bytes(data), 1) if number % 4 == 0 else bytes(data))
        try:
            check(path, LIMITS)
        except BadArchive:
            pass


# ---- bombs


def _deflated_again(before: bytes, data: bytes, times: int) -> bytes:
    """A gzip of `before` and so many times `data`, which deflates to the same bytes each time: nobody ever holds it."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = deflate.compress(before) + deflate.flush(zlib.Z_FULL_FLUSH)
    again = deflate.compress(data) + deflate.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + head + again * times


def _gzip_of_zeros(before: bytes, size_bytes: int) -> bytes:
    return _deflated_again(before, bytes(1 << 20), size_bytes >> 20)


def _declares(name: str, size_bytes: int) -> bytes:
    return member(name, size=size_bytes).tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(_declares("x", TEN_GB)),
        gzip.compress(_declares("x", LIMITS.total_bytes + 1)),
        _gzip_of_zeros(_declares("x", TEN_GB), TEN_GB),
        _gzip_of_zeros(_declares("x", LIMITS.total_bytes), TEN_GB),
        _gzip_of_zeros(tar(mode="w:"), TEN_GB),
        bz2.compress(_declares("x", TEN_GB) + bytes(8 << 20)),
        bz2.compress(_declares("x", LIMITS.total_bytes) + bytes(8 << 20)),
        packed(("x", bytes(8 << 20))),
    ],
    ids=["declared", "one byte declared", "declared and real", "real", "after the end", "bzip2", "bzip2 real", "zip"],
)
def test_a_bomb_is_refused_before_it_fills_memory_or_disk(data: bytes, tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        assert refused(data, tmp_path) == "it holds more than 1048576 bytes"
        assert tracemalloc.get_traced_memory()[1] < 4 * LIMITS.total_bytes + len(data)
    finally:
        tracemalloc.stop()


def test_a_zip_that_declares_less_than_it_holds_is_refused(tmp_path: Path) -> None:
    data = packed(("x", bytes(8 << 20)))
    size, less = (8 << 20).to_bytes(4, "little"), (5).to_bytes(4, "little")
    assert data.count(size) == 2
    refused(data.replace(size, less), tmp_path)


def test_a_zip_whose_members_share_their_bytes_is_counted_for_each(tmp_path: Path) -> None:
    """Each member declares the same local header, as in Fifield's overlapping bomb."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("fedn.yaml", bytes(600_000))
        one = archive.infolist()[0]
        archive.filelist += [one, one]
    refused(out.getvalue(), tmp_path)


def test_a_header_that_holds_a_name_without_end_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
        header = member("x", kind, size=TEN_GB).tobuf(tarfile.GNU_FORMAT)
        assert refused(_gzip_of_zeros(header, TEN_GB), tmp_path) == "it has a header that is too long"
    many = member("x", tarfile.XGLTYPE).tobuf(tarfile.USTAR_FORMAT) * 2000
    assert refused(_deflated_again(b"", many, 500), tmp_path) == "it has a header that is too long"


@pytest.mark.parametrize("size", ["-1", "0"])
def test_a_pax_header_that_leads_nowhere_is_refused(size: str, tmp_path: Path) -> None:
    data = f"{size} path=x\n".encode()
    header = member("x", tarfile.XHDTYPE, size=len(data)).tobuf(tarfile.USTAR_FORMAT)
    refused(gzip.compress(header + data.ljust(512, b"\0") + tar(mode="w:")), tmp_path)


def test_a_global_name_is_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo.create_pax_global_header({"path": "x"})
    assert refused(gzip.compress(header + tar(mode="w:")), tmp_path) == "it gives one name to all of its members"


def test_a_comment_of_git_archive_is_no_harm(tmp_path: Path) -> None:
    header = tarfile.TarInfo.create_pax_global_header({"comment": "0" * 40})
    (tmp_path / "p").write_bytes(gzip.compress(header + tar(mode="w:")))
    check(tmp_path / "p", LIMITS)


def test_a_million_members_are_refused_at_the_limit(tmp_path: Path) -> None:
    header = member("x/" * 3, tarfile.DIRTYPE).tobuf(tarfile.USTAR_FORMAT)
    million = _deflated_again(tar(mode="w:")[:1024], header * 2000, 500)
    assert refused(million, tmp_path) == "it has more than 50 members"


def test_a_zips_list_of_a_million_members_is_not_read_into_memory(tmp_path: Path) -> None:
    whole = packed()
    listed, end = whole.index(b"PK\1\2"), whole.index(b"PK\5\6")
    entry = whole[listed:end]
    many = entry * 1_000_000
    record = bytearray(whole[end:])
    record[12:16] = len(many).to_bytes(4, "little")
    tracemalloc.start()
    try:
        data = whole[:listed] + many + bytes(record)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        assert refused(data, tmp_path) == "its list of members is too long"
        assert tracemalloc.get_traced_memory()[1] - before < 4 << 20
    finally:
        tracemalloc.stop()
