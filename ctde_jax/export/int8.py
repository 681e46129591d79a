"""Weights of one byte, quantized by ONNX Runtime's tools; activations are quantized as the model runs.

The file has a quarter of the size and other outputs, and is slower on some processors; its receipt shows both.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from ctde_jax.export.program import LeftOut, leaving_out


def to_int8(model: bytes) -> bytes:
    """Returns an ONNX file with its weights in one byte each.

    Raises:
        LeftOut: ONNX Runtime is not installed, or its tools cannot do it.
    """
    if find_spec("onnxruntime") is None:
        raise LeftOut("needs `pip install 'ctde_jax[onnx]'`")
    from onnxruntime.quantization import quantize_dynamic

    with TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        before.write_bytes(model)
        with _quiet(), leaving_out("onnxruntime.quantization"):
            quantize_dynamic(before, after)
        return after.read_bytes()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back advice to optimize the file first, which here comes from a compiler."""
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(before)
