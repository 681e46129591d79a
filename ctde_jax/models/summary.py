"""A table of a network: layers, output shapes, parameters and FLOPs."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from ctde_jax.data import Dataset
from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError
from ctde_jax.models.base import KeyPath, Model, count_params, unscaled, with_raw_inputs
from ctde_jax.models.modules import as_model

_COLUMNS = 100
"""Width of the table in characters."""

_NOT_COUNTED = re.compile(r"stablehlo\.while|custom_call @(?!mhlo\.)")
"""Operations that the cost analysis of XLA does not count correctly.

It counts the body of a loop once, and a kernel of another library as 0 FLOPs.
"""


class Layer(NamedTuple):
    """A layer with parameters that are not those of its sublayers."""

    path: str  # names of the modules, from the outermost to the layer, separated by /
    output: str
    """Shape of the output for one example; empty if it is not known."""

    params: int


@dataclass(frozen=True, repr=False)
class Summary:
    """A network in numbers; `str` is a table of at most 100 columns, and notebooks show HTML.

    Examples:
        >>> found = ctde.summary(ctde.models.mlp([64, 10]), ctde.data.digits())
        >>> found.params, found.flops
        (650, 1418)
    """

    layers: Sequence[Layer]
    """In the order of execution; then those whose outputs are not known."""

    inputs: str
    """Dtype and shape of one example."""

    output: str
    """Shape of the output of the model for one example."""

    params: int
    """Number of parameters, which is the sum over the layers."""

    state: int
    """Number of values in the model state, such as batch statistics."""

    flops: int | None
    """FLOPs of inference per example, including the scaling of the inputs.

    They are counted by the cost analysis of XLA in the program before its optimization. None if the
    program has loops, as recurrent networks have, or kernels of other libraries.
    """

    def __repr__(self) -> str:
        table = Table(*_HEADER)
        for column in table.columns:
            column.overflow = "fold"
            column.justify = "left" if column is table.columns[0] else "right"
        for layer in self.layers:
            table.add_row(layer.path, layer.output, f"{layer.params:,}")
        table.add_section()
        table.add_row("model", self.output, f"{self.params:,}")
        text = io.StringIO()
        # Names may contain brackets, which are no markup.
        console = Console(
            file=text, width=_COLUMNS, color_system=None, markup=False, highlight=False, emoji=False
        )
        console.print(table, *self._notes, sep="\n")
        return text.getvalue().rstrip()

    def _repr_html_(self) -> str:
        """Returns an HTML table, which notebooks show."""
        rows = [*self.layers, Layer("model", self.output, self.params)]
        lines = [(layer.path, layer.output, f"{layer.params:,}") for layer in rows]
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines
        )
        head = "".join(f"<th>{name}</th>" for name in _HEADER)
        return (
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            f"<p>{'<br>'.join(map(escape, self._notes))}</p>"
        )

    @property
    def _notes(self) -> list[str]:
        """The lines below the table."""
        flops = (
            "FLOPs not counted, because the program has loops or kernels of other libraries"
            if self.flops is None
            else f"{self.flops:,} FLOPs in inference (cost analysis of XLA)"
        )
        state = [f"{self.state:,} further values are model state"] if self.state else []
        return [f"one example, {self.inputs}: {flops}", *state]


_HEADER = ("layer", "output", "parameters")


def summary(model: Any, data: Dataset) -> Summary:
    """Returns a table of the layers of a network with output shapes and parameters, and its FLOPs.

    Nothing is computed: the model is only traced, in inference, for one example of the data.

    Args:
        model: A model or module, as for `fit`.
        data: Data set whose inputs the model receives.

    Raises:
        InputError: The model is invalid, or does not accept the inputs.

    Examples:
        >>> print(ctde.summary(ctde.models.mlp([64, 32, 10]), ctde.data.digits()))
    """
    if not isinstance(data, Dataset):
        raise InputError(
            "data",
            "must be a Dataset, such as data.digits() or data.from_arrays(...), got "
            f"{type(data).__name__}.",
        )
    network = with_raw_inputs(unscaled(as_model(model)), data.shift, data.scale)
    inputs = data.train.inputs[:1]
    like = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)

    # Trace once for the shapes, and once for the program.
    center = jax.eval_shape(network.init, jax.eval_shape(jax.random.key, 0), inputs)
    outputs, _ = jax.eval_shape(network.apply, *center, inputs, None)
    by_layer = jax.eval_shape(network.layers, *center, inputs) if network.layers else {}
    params, model_state = center
    return Summary(
        layers=_layers(params, by_layer),
        inputs=f"{like.dtype}{list(like.shape[1:])}",
        output=_shape_of_one(outputs),
        params=count_params(params),
        state=count_params(model_state),
        flops=_count_flops(network, center, like),
    )


def _layers(params: PyTree, outputs: Mapping[KeyPath, PyTree]) -> list[Layer]:
    """Returns the layers: those with outputs in the order of execution, then all others."""
    # Group the parameters by the path of their layer.
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        counts[name] = counts.get(name, 0) + leaf.size

    shapes = {"/".join(map(str, path)): _shape_of_one(each) for path, each in outputs.items()}
    names = [name for name in shapes if name in counts]
    names += [name for name in counts if name not in shapes]
    return [Layer(name or "(top level)", shapes.get(name, ""), counts[name]) for name in names]


def _shape_of_one(outputs: PyTree) -> str:
    """Describes the shapes of outputs without the axis of examples; several are separated by +."""
    shapes = [leaf.shape[1:] for leaf in jax.tree.leaves(outputs)]
    return " + ".join(" x ".join(map(str, shape)) if shape else "scalar" for shape in shapes)


def _count_flops(
    model: Model, center: tuple[PyTree, PyTree], like: jax.ShapeDtypeStruct
) -> int | None:
    """Returns the FLOPs of inference for one example; None if they cannot be counted."""

    def infer(params: PyTree, model_state: PyTree, inputs: jax.Array) -> PyTree:
        outputs, _ = model.apply(params, model_state, inputs, None)
        return outputs

    # Before optimization: a compiled program may contain kernels of libraries, counted as 0.
    lowered = jax.jit(infer).lower(*center, like)
    if _NOT_COUNTED.search(lowered.as_text()):
        return None
    flops = (lowered.cost_analysis() or {}).get("flops")
    return None if flops is None else int(flops)
