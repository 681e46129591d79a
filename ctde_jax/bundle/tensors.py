"""Reads arrays by name from a file in the safetensors format, with numpy alone.

The format is a length in 8 bytes, a JSON header of this length, and the bytes of the arrays
(https://huggingface.co/docs/safetensors). A node does not need the library that wrote the file.
"""

import json
from math import prod

import numpy as np

# In bytes.
_LONGEST_HEADER = 2**23

# Bound on lengths and offsets.
_LARGEST = 2**40
_DTYPES = {"F32": np.float32, "I32": np.int32, "U8": np.uint8, "I64": np.int64, "F16": np.float16}

MOST_AXES = 32
"""Maximum number of axes of an array."""


class Malformed(Exception):
    """Raised if the content violates the format."""


def parse(content: bytes) -> dict[str, np.ndarray]:
    """Parses the content of a file and returns its arrays by name.

    The arrays are read-only and share the memory of `content`.

    Raises:
        Malformed: If the content violates the format.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 0 < length <= min(_LONGEST_HEADER, len(content) - 8):
        raise Malformed("its header is longer than the file")

    # The header may be invalid JSON, deeply nested, or JSON of any other structure.
    try:
        header = json.loads(content[8 : 8 + length])
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: _array(content, 8 + length, entry) for name, entry in entries.items()}
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise Malformed(f"its header is invalid ({error})") from error


def _array(content: bytes, start: int, entry: dict) -> np.ndarray:
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    shape = entry["shape"]
    first, last = entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < _LARGEST for number in (*shape, first, last)):
        raise ValueError("a length or offset is not an integer from 0 to 2**40 - 1")
    if len(shape) > MOST_AXES:
        raise ValueError("an array has too many axes")
    count = prod(shape)
    # The offsets count from the end of the header.
    if last - first != count * dtype.itemsize or start + last > len(content):
        raise ValueError("the size of an array does not match its shape and dtype")
    return np.frombuffer(content, dtype.newbyteorder("<"), count, start + first).reshape(shape)
