"""Dynamic quantization to int8 with ONNX Runtime's tools.

Weights take one byte each; activations are quantized as the model runs. The file has about a
quarter of the size, but its outputs differ, and it is slower on some processors; the receipt of the
export records both.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from ctde_jax.export.program import LeftOut, leaving_out


def to_int8(model: bytes) -> bytes:
    """Quantizes the weights of an ONNX file to one byte each.

    Args:
        model: The content of the ONNX file.

    Returns:
        The content of the quantized ONNX file.

    Raises:
        LeftOut: ONNX Runtime is not installed, or its tools cannot quantize the model.
    """
    if find_spec("onnxruntime") is None:
        raise LeftOut("needs `pip install 'ctde_jax[onnx]'`")
    from onnxruntime.quantization import quantize_dynamic

    # The tools read and write files.
    with TemporaryDirectory() as folder:
        before = Path(folder) / "before.onnx"
        after = Path(folder) / "after.onnx"
        before.write_bytes(model)
        with _quiet(), leaving_out("onnxruntime.quantization"):
            quantize_dynamic(before, after)
        return after.read_bytes()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the advice to optimize the file first."""
    # The tools log to the root logger.
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(before)
