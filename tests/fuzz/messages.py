"""Messages and texts from strangers, as hypothesis draws them: of any type of the proto, by its descriptor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

HOSTILE_IDS = (
    *("", ".", "..", "/", "../../../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "a\0b", "\0", "a\nb", "%2e%2e%2f"),
    *("é", "\u202e", "a" * 10_240, "a/" * 5_000, "$where", "fl.version", "__proto__", "1", "null", "' OR 1=1 --"),
)
HOSTILE_JSON = (
    *("{}", "[]", "null", "NaN", "{", '{"a": 1e999}', '{"a": "\\ud800"}', "[" * 10_000, '{"a":' * 5_000, "9" * 5_000),
    '{"training_metadata": {"num_examples": NaN}}',
    '{"training_metadata": {"num_examples": -1}}',
    '{"training_metadata": 7, "config": 7}',
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(HOSTILE_IDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def texts(known: Sequence[str]) -> st.SearchStrategy[str]:
    """known: ids that mean something to the server at the moment, and texts that do."""
    drawn = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    return st.sampled_from((*known, *HOSTILE_IDS, *HOSTILE_JSON)) | drawn | json_values.map(json.dumps)


def messages(shape: Descriptor, text: st.SearchStrategy[str]) -> st.SearchStrategy[Message]:
    """text: what stands in its texts. Each field may be left out."""
    fields = {field.name: _field(field, text) for field in shape.fields}
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: GetMessageClass(shape)(**given))


def _field(field: FieldDescriptor, text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    one = _value(field, text)
    return st.lists(one, max_size=3) if field.label == FieldDescriptor.LABEL_REPEATED else one


def _value(field: FieldDescriptor, text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_MESSAGE:
            return messages(field.message_type, text)
        case FieldDescriptor.CPPTYPE_STRING:
            return text if field.type == FieldDescriptor.TYPE_STRING else st.binary(max_size=64)
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return st.floats(width=32)
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_ENUM:  # open: a newer client may know more values
            return st.sampled_from([*field.enum_type.values_by_number, 99, -1])
        case FieldDescriptor.CPPTYPE_UINT32:
            return st.sampled_from([0, 1, 2**32 - 1])
        case FieldDescriptor.CPPTYPE_UINT64:
            return st.sampled_from([0, 1, 2**63, 2**64 - 1])
        case FieldDescriptor.CPPTYPE_INT32:
            return st.sampled_from([0, 1, -1, 10**9, 2**31 - 1, -(2**31)])
        case FieldDescriptor.CPPTYPE_INT64:
            return st.sampled_from([0, 1, -1, 1_795_485_241, 253_402_300_800, 2**63 - 1, -(2**63)])
    raise AssertionError(f"{field.full_name}: a kind that is not drawn yet")


@st.composite
def damaged(draw: st.DrawFn, sound: st.SearchStrategy[bytes]) -> bytes:
    """A few of the bytes changed, cut out or put in."""
    broken = bytearray(draw(sound) or b"\0")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(broken) - 1))
        match draw(st.sampled_from(["set", "cut", "insert", "ones"])):
            case "set":
                broken[at] = draw(st.integers(0, 255))
            case "cut":
                del broken[at : at + draw(st.integers(1, 40))]
            case "insert":
                broken[at:at] = draw(st.binary(min_size=1, max_size=10))
            case "ones":
                broken[at : at + 4] = b"\xff\xff\xff\xff"
        if not broken:
            break
    return bytes(broken)
