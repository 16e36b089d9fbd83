"""Odd inputs for tests of every edge: bytes, JSON values and protobuf messages that are almost right."""

import copy
import json
import random
from typing import Any

from google.protobuf.message import Message

# Values that a field may not expect.
ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**63,
        2**64,
        -(2**63),
        10**400,
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *("", "a", "\0", "\ud800", "ü" * 300, "../../../etc/passwd", "9" * 5000, "%s%n", "best", "run:x", "1e999"),
    *([], [[]], [None], {}, {"": {}}, {"a": None}),
)


def odd_bytes(rng: random.Random, content: bytes) -> bytes:
    """Changes some bytes: flips, cuts, repeats, inserts or replaces them, or a number among them."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(8):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                del changed[at : at + rng.randrange(1, 20)]
            case 3:
                changed[at:at] = changed[at : at + rng.randrange(1, 50)] * rng.choice((1, 2, 40))
            case 4:
                changed[at:at] = rng.choice(
                    (b"\xff\xfe", b"\0" * 9, b"\r\n", b"{" * 500, b"[" * 100_000, b"\xed\xa0\x80")
                )
            case 5:
                changed[at : at + 8] = rng.randbytes(8)
            case 6:
                changed[at : at + 1] = rng.choice((b"9" * 30, b"-1", b"1e999", b"NaN", b'"', b","))
            case 7:
                changed[:] = rng.choice((b"", b"null", b"[]", b"{}", b"0", b"\xff" * 8, bytes(changed) * 2))
    return bytes(changed)


def odd_json(rng: random.Random, value: Any) -> Any:
    """Changes one part of a JSON value: replaces it by another kind, removes it, renames it, or nests it deeply."""
    value = copy.deepcopy(value)
    parent: Any = None
    key: Any = None
    node = value
    while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.75):
        parent = node
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        node = node[key]
    new = copy.deepcopy(rng.choice(ODD))
    if parent is None:
        return new
    match rng.randrange(6):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[rng.choice(("", "unknown", "\ud800", "x" * 200))] = parent.pop(key)
        case 2:
            for _ in range(rng.choice((2, 50))):
                new = [new] if rng.random() < 0.5 else {"a": new}
            parent[key] = new
        case 3 if isinstance(node, int | float):
            parent[key] = node * rng.choice((-1, 1000, 10**30))
        case 4 if isinstance(node, str):
            parent[key] = odd_bytes(rng, node.encode(errors="replace")).decode(errors="replace")
        case _:
            parent[key] = new
    return value


def json_bytes(value: Any) -> bytes:
    """Returns JSON text, in which half of an emoji stays an escape."""
    return json.dumps(value).encode()


def odd_file(rng: random.Random, content: bytes) -> bytes:
    """Changes a file, by its structure if it is JSON or has a JSON object on each line."""
    if rng.random() < 0.6:
        try:
            return json_bytes(odd_json(rng, json.loads(content)))
        except (ValueError, RecursionError):
            lines = content.splitlines()
            number = rng.randrange(len(lines)) if lines else 0
            try:
                lines[number] = json_bytes(odd_json(rng, json.loads(lines[number])))
                return b"\n".join(lines)
            except (ValueError, IndexError, RecursionError):
                pass
    return odd_bytes(rng, content)


def odd_message(rng: random.Random, kind: type[Message], depth: int = 3) -> Message:
    """Returns a message of which some fields have values that its contract allows."""
    message = kind()
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.5 or (field.message_type is not None and not depth):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            with_value = getattr(message, field.name)
            entry = field.message_type.fields_by_name
            for _ in range(rng.randrange(4)):
                if entry["value"].message_type is None:
                    with_value[_scalar(rng, entry["key"])] = _scalar(rng, entry["value"])
        elif field.message_type is not None:
            for _ in range(rng.randrange(1, 3) if field.is_repeated else 1):
                target = getattr(message, field.name)
                target = target.add() if field.is_repeated else target
                target.SetInParent()
                target.MergeFrom(odd_message(rng, type(target), depth - 1))
        elif field.is_repeated:
            getattr(message, field.name).extend(_scalar(rng, field) for _ in range(rng.randrange(4)))
        else:
            setattr(message, field.name, _scalar(rng, field))
    return message


def _scalar(rng: random.Random, field: Any) -> Any:
    kinds = field
    match field.cpp_type:
        case kinds.CPPTYPE_STRING:
            if field.type == kinds.TYPE_BYTES:
                return rng.randbytes(rng.randrange(9))
            return rng.choice(("", "a", "Once upon", "\0", "ü" * 300, "best", "9" * 30, "builtin", "run:x", "a/../b"))
        case kinds.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case kinds.CPPTYPE_ENUM:
            return rng.choice((0, 1, 2, 99, -1))
        case kinds.CPPTYPE_FLOAT | kinds.CPPTYPE_DOUBLE:
            return rng.choice((0.0, 1.0, 0.5, -1.0, 1e30, float("nan"), float("inf"), 1e-30))
        case kinds.CPPTYPE_INT32:
            return rng.choice((0, 1, 2, 7, -1, 2**31 - 1, -(2**31)))
        case kinds.CPPTYPE_UINT32:
            return rng.choice((0, 1, 7, 2**32 - 1))
        case kinds.CPPTYPE_UINT64:
            return rng.choice((0, 1, 7, 2**64 - 1))
        case _:
            return rng.choice((0, 1, 2, 7, -1, 2**63 - 1, -(2**63)))
