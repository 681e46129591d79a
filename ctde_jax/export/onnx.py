"""A program in ONNX, which runs on servers, phones and in browsers, with no JAX."""

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from ctde_jax.export.converter import convert
from ctde_jax.export.lowering import RULES
from ctde_jax.export.program import LeftOut, Program, leaving_out, with_rules

OPSET = 23
LARGEST = 2**31 - 1
"""Bytes of a file; a larger one would have to keep its weights in a second file."""


def to_onnx(
    program: Program, inputs: Sequence[str], outputs: Sequence[str], says: Mapping[str, Any]
) -> bytes:
    """Writes a program as ONNX.

    Args:
        program: What to write.
        inputs: The names of its arguments.
        outputs: The names of its results.
        says: What the file says of itself, such as the names of the classes.

    Raises:
        LeftOut: The packages for it are not installed, or the program has something in it that ONNX has no words for.
    """
    if find_spec("jax2onnx") is None or find_spec("onnx") is None:
        raise LeftOut("needs `pip install 'ctde_jax[onnx]'`")
    from onnx.checker import check_model
    from onnx.helper import set_model_props

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
            model, {name: json.dumps(fact, ensure_ascii=False) for name, fact in says.items()}
        )
        if model.ByteSize() > LARGEST:
            raise LeftOut("would be larger than 2 GiB")
        check_model(model, full_check=True)
    return model.SerializeToString()


_PLAIN = {("alpha", 1.0), ("beta", 0), ("beta", 1.0), ("transA", 0), ("transB", 0)}
"""Of a product that nothing is done to, and no array, or one of zeros, is added to."""


def _tidy(graph: Any) -> None:
    """Writes plain products as such, and takes out arrays that nobody reads and notes on shapes inside.

    Such notes may be wrong, and not all runtimes pass over that. Tools that quantize know plain products.
    """
    from onnx.numpy_helper import to_array

    own = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        is_product = (
            node.op_type == "Gemm"
            and {(each.name, each.f or each.i) for each in node.attribute} <= _PLAIN
        )
        if is_product and not (len(node.input) == 3 and to_array(own[node.input[2]]).any()):
            node.op_type = "MatMul"
            del node.input[2:], node.attribute[:]
    inner = list(_within(graph))
    for node in (
        node for each in (graph, *inner) for node in each.node if node.op_type == "Einsum"
    ):
        if _is_product(node.attribute[0].s.decode()):
            node.op_type = "MatMul"
            del node.attribute[:]
    read = {name for each in (graph, *inner) for node in each.node for name in node.input}
    read |= {output.name for each in (graph, *inner) for output in each.output}
    for each in (graph, *inner):
        del each.value_info[:]
        kept = [tensor for tensor in each.initializer if tensor.name in read]
        del each.initializer[:]
        each.initializer.extend(kept)


def _is_product(equation: str) -> bool:
    """Says whether a sum is that of arrays `[..., inner]` and `[inner, outer]` over the inner axis."""
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
    """Yields all graphs inside a graph, which may read what is around them."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
                yield from _within(attribute.g)
