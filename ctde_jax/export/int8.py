"""Weights of one byte: a quarter of the size, other outputs, and on some processors slower; the receipt shows it.

Both ways are those of ONNX Runtime's own tools.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ctde_jax.export.program import LeftOut, leaving_out

CALIBRATION = 256
"""Training examples that say in which range the numbers between two layers lie."""


def dynamic(model: bytes) -> bytes:
    """Writes the weights of an ONNX file in one byte each; what is between layers is rounded when it is there.

    Raises:
        LeftOut: ONNX Runtime is not installed, or its tools cannot do it.
    """
    _check_installed()
    from onnxruntime.quantization import quantize_dynamic

    with TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        before.write_bytes(model)
        with _quiet(), leaving_out("onnxruntime.quantization"):
            quantize_dynamic(before, after)
        return after.read_bytes()


def static(model: bytes, inputs: np.ndarray) -> bytes:
    """Likewise; in which range the numbers between layers lie is found out before, by these examples.

    Raises:
        LeftOut: As `dynamic`.
    """
    _check_installed()
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self._batches = iter(np.array_split(inputs, max(1, len(inputs) // 32)))

        def get_next(self):  # pyright: ignore[reportIncompatibleMethodOverride]
            batch = next(self._batches, None)
            return None if batch is None else {"inputs": batch}

    with TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        before.write_bytes(model)
        with _quiet(), leaving_out("onnxruntime.quantization"):
            quantize_static(before, after, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        return after.read_bytes()


def _check_installed() -> None:
    if find_spec("onnxruntime") is None:
        raise LeftOut("needs `pip install 'ctde_jax[onnx]'`")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back advice to optimize the file first, which here comes from a compiler."""
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(before)
