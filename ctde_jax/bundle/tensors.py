"""Arrays by name, out of a file in the safetensors format, with numpy alone.

The format is a length in 8 bytes, as much JSON, and then the arrays' bytes (https://huggingface.co/docs/safetensors).
A node need not have the library that wrote it.
"""

import json
from math import prod

import numpy as np

_LONGEST_HEADER = 2**23
_LARGEST = 2**40
_DTYPES = {"F32": np.float32, "I32": np.int32, "U8": np.uint8, "I64": np.int64, "F16": np.float16}

MOST_AXES = 32
"""Of an array."""


class Malformed(Exception):
    """The bytes are none of the format."""


def parse(content: bytes) -> dict[str, np.ndarray]:
    """Reads all arrays; they share the memory of the content, and cannot be written to.

    Raises:
        Malformed: The content is not what the format says.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 0 < length <= min(_LONGEST_HEADER, len(content) - 8):
        raise Malformed("its header is longer than the file")
    try:
        header = json.loads(content[8 : 8 + length])
        entries = {name: said for name, said in header.items() if name != "__metadata__"}
        return {name: _array(content, 8 + length, said) for name, said in entries.items()}
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise Malformed(f"its header makes no sense ({error})") from error


def _array(content: bytes, start: int, said: dict) -> np.ndarray:
    dtype, shape, (first, last) = (
        np.dtype(_DTYPES[said["dtype"]]),
        said["shape"],
        said["data_offsets"],
    )
    if not all(type(number) is int and 0 <= number < _LARGEST for number in (*shape, first, last)):
        raise ValueError("a number in it is none, or too large")
    if len(shape) > MOST_AXES:
        raise ValueError("an array has too many axes")
    count = prod(shape)
    if last - first != count * dtype.itemsize or start + last > len(content):
        raise ValueError("an array is longer or shorter than its shape")
    return np.frombuffer(content, dtype.newbyteorder("<"), count, start + first).reshape(shape)
