"""The bytes that a server and its nodes exchange: a header in JSON, and any number of arrays.

    4 bytes   length of the header, little-endian
    header    JSON object; "sizes" has the length of each array in bytes
    arrays    one after another, without a type: the receiver knows the type of each

Nothing in a message is executed, and no length in it is trusted: see `unpack`.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from ctde_jax.errors import InputError

T = TypeVar("T")
_LENGTH = struct.Struct("<I")
_LONGEST_HEADER = 2**20
"""Bytes."""


class Envelope(NamedTuple):
    """A header, and arrays as bytes."""

    header: dict[str, Any]
    parts: list[bytes]

    def value(self, name: str, kind: type[T]) -> T:
        """Returns a value of the header.

        Raises:
            InputError: The header has no value of this name and type.
        """
        found = self.header.get(name)
        # bool is a subclass of int.
        if not isinstance(found, kind) or isinstance(found, bool) is not (kind is bool):
            raise InputError("message", f"must have {name} in its header, got {found!r:.40}.")
        return found


def pack(header: Mapping[str, Any], parts: Sequence[bytes] = ()) -> bytes:
    """Returns the bytes of a message.

    Args:
        header: Values by name, serializable as JSON.
        parts: Arrays as bytes.
    """
    values = {**header, "sizes": [len(part) for part in parts]}
    written = json.dumps(values, separators=(",", ":")).encode()
    return b"".join([_LENGTH.pack(len(written)), written, *parts])


def unpack(message: bytes) -> Envelope:
    """Inverts `pack`.

    Raises:
        InputError: The bytes are not a message.
    """
    rule = "must be a header and arrays of the sizes in the header"
    start = _LENGTH.size
    if len(message) < start:
        raise InputError("message", f"{rule}, got {len(message)} bytes.")
    (length,) = _LENGTH.unpack_from(message)
    if length > min(_LONGEST_HEADER, len(message) - start):
        raise InputError("message", f"{rule}, got a header of {length:,} bytes.")
    try:
        header = json.loads(message[start : start + length])
    except (ValueError, RecursionError) as error:
        raise InputError("message", f"{rule}, but the header is not valid JSON.") from error
    sizes = header.pop("sizes", None) if isinstance(header, dict) else None
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        raise InputError("message", f"{rule}, but the header has no sizes.")

    # Cut the rest into the arrays.
    if start + length + sum(sizes) != len(message):
        raise InputError("message", f"{rule}, got {len(message) - start - length:,} bytes of them.")
    parts: list[bytes] = []
    first = start + length
    for size in sizes:
        parts.append(message[first : first + size])
        first += size
    return Envelope(header, parts)
