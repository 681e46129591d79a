"""Warm start: initial parameters that are loaded from a source instead of drawn at random."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from flax import nnx
from flax.core import FrozenDict
from jax import numpy as jnp
from rich.table import Table
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ctde_jax.bundle import CARD, WEIGHTS, open_bundle, parse
from ctde_jax.checkpoint import (
    BEST,
    CHECKPOINTS,
    MANIFEST,
    OTHER_POINT,
    Damaged,
    Tensors,
    is_identity,
    newest,
    read,
)
from ctde_jax.data import Dataset, digests_of_conversion
from ctde_jax.devices import PyTree
from ctde_jax.errors import InputError, quoted
from ctde_jax.models import fine_tuning, is_random, is_trained, split_variables
from ctde_jax.rounds import state
from ctde_jax.trainer.trained import Trained

Source: TypeAlias = Trained | Path | str | nnx.Module | nnx.State | Mapping[str, Any]
"""A source of parameters.

- a `Trained`;
- the folder of a run (its newest checkpoint), of one of its checkpoints, or of a bundle;
- a `.safetensors` file whose names are paths, such as `layers/0/kernel` or `layers.0.kernel`;
- an nnx module or its state, the variables of a linen module, or a tree of parameters alone.
"""

_MOST_LINES = 40
"""Maximum number of lines of the table; if there are more, it shows the first of each source."""


class Given(NamedTuple):
    """The parameters and the model state of a source, by name."""

    params: Tensors
    model_state: Tensors  # empty if the source has only parameters
    is_checkpoint: bool = False
    """Whether the arrays may have a leading axis, `[replica, ...]`, as in gossip."""

    meaning: Mapping[str, str] = {}
    """Digests of the conversion of inputs and classes, by name; empty if they are not recorded."""

    @property
    def digest(self) -> str:
        """SHA-256 of all names, shapes, dtypes and values."""
        # Sorted by name, so that the order of a file or a dict does not matter.
        digest = sha256()
        for part in (self.params, self.model_state):
            for name, tensor in sorted(part.items()):
                digest.update(f"{name} {tensor.dtype}{list(tensor.shape)}\n".encode())
                digest.update(np.ascontiguousarray(tensor).tobytes())
        return digest.hexdigest()


_MEANING = (
    *("the recipe of the columns", "the shift of the inputs", "the scale of the inputs"),
    *("the class names", "the vocabulary"),
)
"""Parts of a data set that determine the meaning of inputs and outputs."""


class Start(NamedTuple):
    """Initial parameters and model state of a run, and a table that shows the source of each."""

    params: PyTree  # numpy arrays
    model_state: PyTree  # numpy arrays
    table: Table


def start_from(
    given: Given, params: PyTree, model_state: PyTree, only: Sequence[str] | None = None
) -> Start:
    """Replaces initialized parameters and model state by those of a source, by name.

    Without `only`, source and model must have exactly the same parameters. With patterns, the
    parameters and model state whose name matches a pattern are loaded; all others stay as they were
    initialized, and everything else in the source is ignored. If the source has no model state, the
    model state stays as it was initialized.

    Args:
        given: The parameters that `read_source` returned.
        params: The initialized parameters of the model.
        model_state: The initialized model state, such as batch statistics.
        only: Patterns of names in the syntax of `fnmatch`, such as `encoder/*` or `*/kernel`.

    Raises:
        InputError: `only` is empty, or a pattern matches nothing. Or an array that must be loaded
            is missing in the source, or differs in shape, or in dtype unless both are floats. Or,
            without `only`, the source has further arrays. The message lists the differences.
    """
    # Name the leaves of both sides. Without patterns, everything must match.
    needed = {"params": state.named(params), "model_state": state.named(model_state)}
    there = {"params": given.params, "model_state": given.model_state}
    names = [name for part in needed.values() for name in part]
    wanted = set(names) if only is None else fine_tuning.find_matches("init_only", only, names)

    # Decide for each leaf of the model, and collect all faults for one error.
    loaded: dict[str, Tensors] = {"params": {}, "model_state": {}}
    lines: list[tuple[str, str, str]] = []
    faults: list[str] = []
    for part, leaves in needed.items():
        for name, leaf in leaves.items():
            tensor = there[part].get(name)
            shape = f"{leaf.dtype}{list(leaf.shape)}"
            if name not in wanted:
                lines.append((name, shape, "initialized, not in init_only"))
            elif part == "model_state" and not there[part]:
                lines.append((name, shape, "initialized, no model state in the source"))
            elif tensor is None:
                faults.append(f"{name} is missing")
            elif not _fits(
                tensor := _center(tensor, leaf) if given.is_checkpoint else tensor, leaf
            ):
                faults.append(f"{name} is {tensor.dtype}{list(tensor.shape)} instead of {shape}")
            else:
                lines.append((name, shape, "loaded"))
                loaded[part][name] = np.asarray(tensor).astype(leaf.dtype)

    # Leftovers of the source are a fault unless `init_only` selects some parameters.
    unused = [name for part in needed for name in there[part] if name not in needed[part]]
    lines += [(name, "", "unused") for name in unused]
    if only is None:
        faults += [f"{name} is not in the model" for name in unused]

    # Report at most ten faults.
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise InputError(
            "init_from",
            f"must contain the parameters of this model, but {'; '.join(faults[:10])}{more}. To "
            "load only some parameters, pass their names or patterns as init_only.",
        )
    return Start(
        _replaced(params, loaded["params"]),
        _replaced(model_state, loaded["model_state"]),
        _table(lines),
    )


def note_on_meaning(given: Given, data: Dataset) -> str | None:
    """Returns a sentence on the parts of `_MEANING` that differ from those of the source."""
    if not given.meaning:
        return None
    now = digests_of_conversion(data)
    different = [name for name in _MEANING if given.meaning.get(name) != now.get(name)]
    if not different:
        return None
    note = f"note       in the run of the loaded parameters, {' and '.join(different)} differed"
    if different[0] != _MEANING[0]:
        return note
    return f"{note}; from_table(..., like=data) converts a table like that of another data set"


def _replaced(tree: PyTree, loaded: Tensors) -> PyTree:
    # `named` keeps the order of the leaves, so the structure can be filled again.
    leaves = [loaded.get(name, leaf) for name, leaf in state.named(tree).items()]
    return jax.tree.structure(tree).unflatten(leaves)


def _fits(tensor: np.ndarray, leaf: jax.Array) -> bool:
    """Returns whether a tensor can replace a leaf: equal shapes, and equal dtypes or two floats."""
    both_float = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (tensor, leaf))
    return tensor.shape == leaf.shape and (both_float or tensor.dtype == leaf.dtype)


def _table(lines: Sequence[tuple[str, str, str]]) -> Table:
    table = Table("parameter", "shape", "source", title="Initial parameters", title_justify="left")
    kinds = list(dict.fromkeys(kind for _, _, kind in lines))
    # Every kind gets the same number of lines, so that all of them are shown.
    per_kind = _MOST_LINES // max(1, len(kinds)) if len(lines) > _MOST_LINES else len(lines)
    for kind in kinds:
        same = [line for line in lines if line[2] == kind]
        for line in same[:per_kind]:
            table.add_row(*line)
        if len(same) > per_kind:
            table.add_row(f"... and {len(same) - per_kind:,} more", "", kind)
    return table


def read_source(source: Source) -> Given:
    """Reads the parameters and model state of a source.

    Args:
        source: One of the kinds of `Source`.

    Raises:
        InputError: The source is none of these kinds, cannot be read, or is a checkpoint that does
            not contain the parameters at which its optimizer is evaluated.
    """
    if isinstance(source, Trained):
        return Given(_arrays(source.params), _arrays(source.model_state))
    # Objects of nnx, without the state of their RNG streams, as a run draws from its seed.
    if isinstance(source, nnx.Module):
        source = nnx.state(source)
    if isinstance(source, nnx.State):
        params, _, rest = nnx.split_state(source, is_trained, is_random, ...)
        return Given(_arrays(nnx.to_pure_dict(params)), _arrays(nnx.to_pure_dict(rest)))

    # The variables of a linen module are `params` and other collections; other trees are
    # parameters.
    if isinstance(source, Mapping):
        tree = source.unfreeze() if isinstance(source, FrozenDict) else dict(source)
        rest = {name: part for name, part in tree.items() if name != "params"}
        are_collections = all(isinstance(part, Mapping) for part in rest.values())
        if isinstance(tree.get("params"), Mapping) and are_collections:
            params, rest = split_variables(tree)
            return Given(_arrays(params), _arrays(rest))
        return Given(_arrays(tree), {})

    # A path; anything else is an error.
    if isinstance(source, Path | str):
        return _from_path(Path(source).expanduser())
    raise InputError(
        "init_from",
        "must be a Trained, the path of a run, checkpoint, bundle or .safetensors file, or a tree "
        f"of parameters, got {type(source).__name__}.",
    )


def _arrays(tree: PyTree) -> Tensors:
    return {name: np.asarray(leaf) for name, leaf in state.named(tree).items()}


def _from_path(path: Path) -> Given:
    # A file, a bundle, or else a run or one of its checkpoints.
    if path.is_file():
        return _parts(_load_file(path))
    if (path / CARD).is_file():
        return _parts(parse(open_bundle(path).read(WEIGHTS)))
    is_run = (path / CHECKPOINTS).is_dir()
    if not is_run and not (path / MANIFEST).is_file():
        raise InputError(
            "init_from",
            "must be the path of a run, checkpoint, bundle or .safetensors file, got "
            f"{quoted(str(path))}.",
        )

    # Read the newest checkpoint of a run without falling back to an older one if it is damaged.
    try:
        _, tensors, facts = read(newest(path / CHECKPOINTS) if is_run else path)
    except (Damaged, IndexError) as error:
        fault = error if isinstance(error, Damaged) else f"{path} has none yet"
        raise InputError(
            "init_from", f"must refer to an intact checkpoint, but {fault}."
        ) from error

    # The point at which such an optimizer is evaluated is not among the tensors.
    if facts.get(OTHER_POINT) and not any(name.startswith(BEST) for name in tensors):
        raise InputError(
            "init_from",
            f"must not be {path}, because its optimizer is evaluated at other parameters than the "
            "saved ones; repeat the call of fit, which loads its checkpoint, and pass the result.",
        )
    identity = facts.get("identity")
    meaning = identity["data"] if identity is not None and is_identity(identity) else {}
    return _of_checkpoint(tensors)._replace(meaning=meaning)


def _of_checkpoint(tensors: Tensors) -> Given:
    """Selects the parameters and model state of a checkpoint that `fit` would return.

    These are the best of early stopping, else the moving average, else the newest parameters.
    """
    is_averaged = any(name.startswith("ema_params/") for name in tensors)
    part = "ema_params" if is_averaged else "params"
    params = state.below(tensors, f"{BEST}/0/") or state.merged_params(tensors, part)
    model_state = state.below(tensors, f"{BEST}/1/") or state.below(tensors, "model_state/")
    return Given(params, model_state, is_checkpoint=True)


def _center(tensor: np.ndarray, leaf: jax.Array) -> np.ndarray:
    """Averages a tensor over axis 0 if its shape is `[replica, ...]` for the shape of `leaf`."""
    # Accumulate at least in float32.
    if tensor.ndim != leaf.ndim + 1 or tensor.shape[1:] != leaf.shape:
        return tensor
    return tensor.mean(axis=0, dtype=np.promote_types(tensor.dtype, np.float32)).astype(
        tensor.dtype
    )


def _load_file(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            "init_from",
            f"must be a readable .safetensors file, but {quoted(str(path))} is not ({error}).",
        ) from error


def _parts(tensors: Tensors) -> Given:
    """Splits tensors into those below `params/` and `model_state/`, whose prefix is removed.

    If no name starts with `params/`, all tensors are parameters.
    """
    # Names with dots are paths, too, as in files of other libraries.
    if not any("/" in name for name in tensors):
        tensors = {name.replace(".", "/"): tensor for name, tensor in tensors.items()}
    parts: dict[str, Tensors] = {"params": {}, "model_state": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part in parts:
            parts[part][rest] = tensor
    return Given(parts["params"] or tensors, parts["model_state"])
