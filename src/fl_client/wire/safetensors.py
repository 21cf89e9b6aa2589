"""safetensors: 8 bytes with the header's length, a JSON header, the arrays' values. Read and written by ourselves.

Whatever is read comes from a stranger. The header is matched where it lies, entry by entry, and never built up as JSON:
no depth and no length of it costs more than its own bytes. Every byte of the data must belong to one array.
Arrays are in the order of their names, since the format's libraries write them in an order of their own.
Format: https://huggingface.co/docs/safetensors, "Format", and the checks of its reference reader.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fl_client.wire.layout import (
    ALIGN_BYTES,
    MAX_ARRAYS,
    Array,
    ArraySpec,
    BadModel,
    Disk,
    Layout,
    Memory,
    ModelFile,
    by_number,
    is_impossible,
    plain_bytes,
    refuse_dtype,
    refuse_name,
    short,
)

MAX_HEADER_BYTES = 100_000_000  # the reference reader's limit
_MAX_KEY_BYTES = 8192  # a name of 1024 bytes, each as \u1234
_METADATA = "__metadata__"  # texts about the file: passed over
_DTYPES = {
    f"{kind}{8 * width}": np.dtype(f"<{kind.lower()}{width}")
    for kind, widths in (("F", (8, 4, 2)), ("I", (8, 4, 2, 1)), ("U", (8, 4, 2, 1)))
    for width in widths
}
_NAMES = {(dtype.kind, dtype.itemsize): name for name, dtype in _DTYPES.items()}

# JSON as far as a header may use it, on bytes, so that it is matched where it lies. Every repetition is
# possessive or bounded: what does not match is given up at once.
_WS = rb"[ \t\n\r]*+"
_TEXT = rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"'
_NUMBER = rb"(?:0|[1-9][0-9]{0,18})"
_NEXT_OR = rb"(?:," + _WS + rb"(?!%b)|(?=%b))"  # a comma, but not before the closing bracket
_SHAPE = rb"\[" + _WS + rb"(?P<shape>(?:" + _NUMBER + _WS + _NEXT_OR % (rb"\]", rb"\]") + rb"){0,64})\]"
_OFFSETS = (
    rb"\[" + _WS + rb"(?P<begin>" + _NUMBER + rb")" + _WS + b"," + _WS + rb"(?P<end>" + _NUMBER + rb")" + _WS + rb"\]"
)
_FIELD = b"|".join(
    b'"' + name + b'"' + _WS + b":" + _WS + value
    for name, value in ((b"dtype", rb'"(?P<dtype>\w{1,32})"'), (b"shape", _SHAPE), (b"data_offsets", _OFFSETS))
)
_OPEN = re.compile(rb"\{" + _WS)
_KEY = re.compile(rb"(?P<key>" + _TEXT + rb")" + _WS + rb":" + _WS, re.DOTALL)
_ARRAY = re.compile(
    rb"\{" + _WS + rb"(?:(?:" + _FIELD + rb")" + _WS + _NEXT_OR % (rb"\}", rb"\}") + rb"){3}\}" + _WS, re.ASCII
)
_TEXTS = re.compile(
    rb"\{" + _WS + rb"(?:" + _TEXT + _WS + b":" + _WS + _TEXT + _WS + _NEXT_OR % (rb"\}", rb"\}") + rb")*+\}" + _WS,
    re.DOTALL,
)
_MORE = re.compile(rb"," + _WS)
_CLOSE = re.compile(rb"\} *+\Z")  # padded with blanks alone


# ---- reading


def looks_like(source: Memory | Disk) -> bool:
    """By its first bytes: the length of a header that fits, then the header's bracket."""
    first = source.read(0, 10)
    return len(first) == 10 and 2 <= _header_bytes(first) <= source.size_bytes - 8 and first[8:9] == b"{"


def read(source: Memory | Disk, *, max_bytes: int) -> ModelFile:
    """max_bytes: of the arrays. Raises BadModel."""
    if source.size_bytes < 8:
        raise BadModel(f"not a safetensors file: {source.size_bytes} bytes")
    header_bytes = _header_bytes(source.read(0, 8))
    if header_bytes > MAX_HEADER_BYTES:
        raise BadModel(f"a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} allowed")
    if header_bytes > source.size_bytes - 8:
        raise BadModel("not a safetensors file, or cut off: its header is longer than the file")
    first = 8 + header_bytes
    values_bytes = source.size_bytes - first
    if values_bytes > max_bytes:
        raise BadModel(f"the model's arrays are larger than the {max_bytes} bytes allowed")
    found = _read_header(source.read(8, header_bytes))
    if not found:
        raise BadModel("the file holds no arrays")
    at = 0
    for begin, end, spec in sorted(((begin, end, spec) for spec, begin, end in found), key=lambda place: place[:2]):
        if begin != at:
            raise BadModel(f"array {short(spec.name)} begins at byte {begin} of the data, expected {at}")
        at = end
    if at != values_bytes:
        raise BadModel(f"{values_bytes} bytes of data, expected {at}: the file is cut off, or has bytes after its end")
    order = by_number([spec.name for spec, _, _ in found])
    if order is None:
        order = sorted(range(len(found)), key=lambda index: found[index][0].name)
    layout = tuple(found[index][0] for index in order)
    return ModelFile(source, layout, [first + found[index][1] for index in order])


def _header_bytes(first: bytes) -> int:
    return int.from_bytes(first[:8], "little")


def _read_header(header: bytes) -> list[tuple[ArraySpec, int, int]]:
    """Each array with where its values begin and end in the data, in the header's order."""
    opened = _OPEN.match(header)
    if opened is None:
        raise BadModel("not a safetensors file: its header is no JSON object")
    found: list[tuple[ArraySpec, int, int]] = []
    names: set[str] = set()
    at = opened.end()
    while names or not _CLOSE.match(header, at):
        key = _KEY.match(header, at)
        if key is None:
            raise BadModel(f"the header is no JSON object of arrays at byte {at}")
        name = _text(key["key"])
        if name in names:
            raise BadModel(f"two arrays are named {short(name)}")
        names.add(name)
        if name == _METADATA:
            value = _TEXTS.match(header, key.end())
            if value is None:
                raise BadModel(f"the header's {_METADATA} holds more than texts")
        else:
            value = _ARRAY.match(header, key.end())
            if value is None or None in (value["dtype"], value["shape"], value["begin"]):
                raise BadModel(f"array {short(name)} is not described by dtype, shape and data_offsets alone")
            found.append(_array(name, value))
            if len(found) > MAX_ARRAYS:
                raise BadModel(f"more than {MAX_ARRAYS} arrays")
        if _CLOSE.match(header, value.end()):
            break
        at = value.end()
        more = _MORE.match(header, at)
        if more is None:
            raise BadModel(f"the header is no JSON object of arrays at byte {at}")
        at = more.end()
    return found


def _text(raw: bytes) -> str:
    try:
        name = json.loads(raw.decode()) if len(raw) <= _MAX_KEY_BYTES else None
    except ValueError:
        name = None
    if not isinstance(name, str):
        raise BadModel(f"an array cannot be named {short(raw[:100].decode('utf-8', 'replace'))}")
    refuse_name(name)
    return name


def _array(name: str, value: re.Match[bytes]) -> tuple[ArraySpec, int, int]:
    shown, kind = f"array {short(name)}", value["dtype"].decode()
    if kind == "BF16":
        raise BadModel(f"{shown} has dtype BF16 (bfloat16), which numpy does not have: save it as F32")
    if kind not in _DTYPES:
        raise BadModel(f"{shown} has dtype {kind}, only real floats and integers are taken: {', '.join(_DTYPES)}")
    dtype, text = _DTYPES[kind], value["shape"].decode()
    shape = tuple(int(length) for length in text.split(",") if length.strip())
    begin, end = int(value["begin"]), int(value["end"])
    if is_impossible(shape):
        raise BadModel(f"{shown} has an impossible shape: {short(text)}")
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise BadModel(f"{shown} has {end - begin} bytes, expected {expected} for {dtype} {shape}")
    if begin % dtype.itemsize:
        raise BadModel(f"{shown} begins at byte {begin} of the data, which is not aligned for {dtype}")
    return ArraySpec(name, dtype, shape), begin, end


# ---- writing


def writing_order(layout: Layout) -> Sequence[int]:
    """The widest values first, so that all are aligned."""
    return sorted(range(len(layout)), key=lambda index: -layout[index].dtype.itemsize)


def chunks(layout: Layout, arrays: Sequence[Iterable[Array]]) -> Iterator[bytes | memoryview]:
    """The file, piece by piece, the arrays in writing_order(). Raises BadModel, before any piece."""
    entries: dict[str, object] = {}
    order = writing_order(layout)
    at = 0
    for index in order:
        spec = layout[index]
        refuse_dtype(spec.name, spec.dtype)
        refuse_name(spec.name)
        if spec.name in entries:
            raise BadModel(f"two arrays are named {short(spec.name)}")
        kind = _NAMES.get((spec.dtype.kind, spec.dtype.itemsize))
        if kind is None or spec.name == _METADATA:
            raise BadModel(f"array {short(spec.name)} of {spec.dtype} cannot be in a safetensors file")
        end = at + math.prod(spec.shape) * spec.dtype.itemsize
        entries[spec.name] = {"dtype": kind, "shape": [int(length) for length in spec.shape], "data_offsets": [at, end]}
        at = end
    if not entries:
        raise BadModel("the file holds no arrays")
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGN_BYTES)
    yield len(header).to_bytes(8, "little") + header
    for index in order:
        yield from plain_bytes(layout[index], arrays[index], layout[index].dtype.newbyteorder("<"))
