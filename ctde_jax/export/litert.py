"""A program as a .tflite file, for LiteRT on phones and small devices. Experimental: what has loops stays behind.

The converter is not among what pip resolves beside this package, for it asks for an old typing_extensions through a
package that this way of using it does not import: `pip install --no-deps litert-converter==0.5.0`.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from unittest import mock

import jax
from jax import export

from ctde_jax.export.program import LeftOut, Program, leaving_out

INSTALL = "pip install ai-edge-litert && pip install --no-deps litert-converter==0.5.0"


def to_litert(program: Program) -> bytes:
    """Writes a program with one argument as LiteRT reads it; the number of examples stays open.

    Raises:
        LeftOut: The packages for it are not installed, or the converter has no words for something in the program.
    """
    if find_spec("litert_converter") is None or find_spec("ai_edge_litert") is None:
        raise LeftOut(f"needs `{INSTALL}`")
    quiet = {"TF_ENABLE_ONEDNN_OPTS": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "0")}  # else it prints notes on import
    with mock.patch.dict(os.environ, quiet):
        litert = import_module("litert_converter.converter_api_ext")
    ir = import_module("litert_converter.mlir.ir")
    passes = import_module("litert_converter.mlir.passmanager")
    stablehlo = import_module("litert_converter.mlir.dialects.stablehlo")

    exported = export.export(jax.jit(program.run), platforms=("cpu",))(*program.like)
    config, context = litert.ConvertToTFLConfig(), ir.Context()
    config.model_origin_framework = "JAX"
    config.unsafe_fuse_dynamic_shaped_broadcast = True  # without it, a CNN takes 20 times as long
    litert.prepare_mlir_context(context)
    with leaving_out("litert_converter"), context, ir.Location.unknown():
        module = stablehlo.deserialize_portable_artifact(context, exported.mlir_module_serialized)
        litert.set_signature(module.operation, "serving_default", ["inputs"], ["outputs"])
        litert.run_convert_to_tfl_passes(module, passes.PassManager(), config)
        return litert.export_flatbuffer_to_bytes(module.operation)
