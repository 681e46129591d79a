"""Programs as ONNX files, which run on servers, on phones and in browsers, without JAX."""

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ctde_jax.export.converter import convert
from ctde_jax.export.lowering import RULES
from ctde_jax.export.program import Inference, LeftOut, leaving_out, with_rules

OPSET = 23
LARGEST = 2**31 - 1
"""Maximum size of a file in bytes; a larger model would need a second file for its weights."""


def to_onnx(
    program: Inference, inputs: Sequence[str], outputs: Sequence[str], metadata: Mapping[str, Any]
) -> bytes:
    """Writes a program as ONNX.

    Args:
        program: The program.
        inputs: Names of the arguments.
        outputs: Names of the results.
        metadata: Metadata of the file by name, such as the class names; values are written as JSON.

    Returns:
        The content of the file.

    Raises:
        LeftOut: The required packages are not installed, ONNX cannot express the program, or the
            file would exceed `LARGEST`.
    """
    if find_spec("jax2onnx") is None or find_spec("onnx") is None:
        raise LeftOut("needs `pip install 'ctde_jax[onnx]'`")
    from onnx.checker import check_model
    from onnx.helper import set_model_props

    # Any exception of jax2onnx or of the checker means that the model has no ONNX form.
    with leaving_out("jax2onnx"):
        model = convert(
            with_rules(program, RULES),
            model_name="ctde_jax",
            opset=OPSET,
            input_names=inputs,
            output_names=outputs,
        )
        _tidy(model.graph)
        set_model_props(
            model, {name: json.dumps(fact, ensure_ascii=False) for name, fact in metadata.items()}
        )

        # Protobuf cannot serialize more than 2 GiB.
        if model.ByteSize() > LARGEST:
            raise LeftOut("would be larger than 2 GiB")
        check_model(model, full_check=True)
    return model.SerializeToString()


_PLAIN = {("alpha", 1.0), ("beta", 0), ("beta", 1.0), ("transA", 0), ("transB", 0)}
"""Attributes of a Gemm that is a MatMul if nothing or an array of zeros is added to its result."""


def _tidy(graph: Any) -> None:
    """Rewrites matrix products as MatMul, and removes unused initializers and shape annotations.

    Quantization tools support MatMul. Shape annotations of intermediate values may be wrong, which
    not all runtimes tolerate.
    """
    from onnx.numpy_helper import to_array

    # Gemm without bias -> MatMul.
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        is_product = (
            node.op_type == "Gemm"
            and {(each.name, each.f or each.i) for each in node.attribute} <= _PLAIN
        )
        # Only a product has a bias, as its third input.
        has_bias = (
            is_product and len(node.input) == 3 and to_array(initializers[node.input[2]]).any()
        )
        if is_product and not has_bias:
            node.op_type = "MatMul"
            del node.input[2:], node.attribute[:]

    # Einsum over the last axis -> MatMul, also in the bodies of loops and branches.
    inner = list(_within(graph))
    for node in (
        node for each in (graph, *inner) for node in each.node if node.op_type == "Einsum"
    ):
        if _is_product(node.attribute[0].s.decode()):
            node.op_type = "MatMul"
            del node.attribute[:]

    # Remove initializers that no node reads and no graph returns; a body may read an outer one.
    read = {name for each in (graph, *inner) for node in each.node for name in node.input}
    read |= {output.name for each in (graph, *inner) for output in each.output}
    for each in (graph, *inner):
        del each.value_info[:]
        kept = [tensor for tensor in each.initializer if tensor.name in read]
        del each.initializer[:]
        each.initializer.extend(kept)


def _is_product(equation: str) -> bool:
    """Returns whether an einsum is the matrix product of `[..., inner]` and `[inner, outer]`."""
    # For example `abc,cd->abd`.
    operands, result = equation.replace(" ", "").split("->")
    left, *right = operands.split(",")
    if len(right) != 1 or len(right[0]) != 2:
        return False
    inner, outer = right[0]
    return (
        left.endswith(inner)
        and inner not in left[:-1]
        and outer not in left
        and result == left[:-1] + outer
    )


def _within(graph: Any) -> Iterator[Any]:
    """Yields all graphs nested in a graph; they may read values of the enclosing graphs."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
                yield from _within(attribute.g)
