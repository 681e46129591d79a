"""Command `python -m ctde_jax.execute`: runs a bundle on a node.

    python -m ctde_jax.execute BUNDLE --input pictures.npy
    python -m ctde_jax.execute BUNDLE --input table.csv --score
    python -m ctde_jax.execute BUNDLE --prompt "ROMEO:"

It needs only numpy and the selected runtime: no package of the trainer, no other node and no
network.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from ctde_jax.bundle import (
    RUNTIMES,
    Bundle,
    Examples,
    Parser,
    Predict,
    answers,
    load,
    open_bundle,
    pick,
    read,
    run,
    streams,
    traceable,
)
from ctde_jax.errors import InputError, check_at_least, on_one_line

# Options that require --input, and those that require --prompt.
_OF_INPUTS = ("score", "label_column", "batch_size", "all_devices", "json")
_OF_TEXTS = ("length", "temperature", "seed")
_SHOWN = 8
"""Maximum number of values of an output in a line of the table."""


def main(arguments: Sequence[str]) -> int:
    """Runs a bundle according to the options.

    Args:
        arguments: Arguments of the command line.

    Returns:
        The exit status, 2 for invalid input or a damaged bundle.
    """
    return run(lambda: _execute(_parse(arguments)), names={"bundle": "BUNDLE"})


def _parse(arguments: Sequence[str]) -> Namespace:
    """Parses the command line.

    Raises:
        InputError: An option requires --input, but --prompt is given, or vice versa.
    """
    parser = Parser("ctde_jax.execute", __doc__ or "")
    _add_common_options(parser)
    _add_input_options(parser)
    _add_prompt_options(parser)
    chosen = parser.parse_args(arguments)

    # An option of the other mode would be ignored, so it is refused.
    given, others = ("--prompt", _OF_INPUTS) if chosen.input is None else ("--input", _OF_TEXTS)
    for name in others:
        if getattr(chosen, name) != parser.get_default(name):
            raise InputError(name, f"cannot be combined with {given}; leave one of them out.")
    return chosen


def _add_common_options(parser: Parser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")

    # Either examples or a text to continue.
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument(
        "--input",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="examples: one .npy, .npz, .csv, .jsonl or .png file, several .png files, or - for "
        "JSON lines from standard input",
    )
    mode.add_argument(
        "--prompt", metavar="TEXT", help="beginning of a text that a language model continues"
    )

    runtimes = ", ".join(RUNTIMES)
    parser.add_argument(
        "--runtime",
        metavar="NAME",
        help=f"one of {runtimes} (default: the first of these that is installed and in the bundle)",
    )
    parser.add_argument(
        "--expect",
        metavar="SHA256",
        help="required beginning of the SHA-256 of card.json, 8 or more digits",
    )


def _add_input_options(parser: Parser) -> None:
    """Adds the options that require --input, `_OF_INPUTS`."""
    parser.add_argument(
        "--score",
        action="store_true",
        help="print accuracy and loss; labels are y_test of a .npz or a column of a .csv file",
    )
    parser.add_argument(
        "--label-column",
        metavar="NAME",
        help="column of a .csv file that contains the labels (default: the last)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="number of examples per batch (default: 64)",
    )
    parser.add_argument(
        "--all-devices",
        action="store_true",
        help="run an independent copy of the model on each device; requires the runtime jax",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one line of JSON per example, or of the score"
    )


def _add_prompt_options(parser: Parser) -> None:
    """Adds the options that require --prompt, `_OF_TEXTS`."""
    parser.add_argument(
        "--length",
        type=int,
        default=200,
        metavar="N",
        help="number of characters to generate (default: 200)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="sampling temperature; 0 selects the most likely character (default: 1)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of the sampling (default: 0)"
    )


def _execute(chosen: Namespace) -> None:
    check_at_least(1, batch_size=chosen.batch_size)
    bundle = open_bundle(chosen.bundle, chosen.expect)
    runtime = chosen.runtime or ("jax" if chosen.all_devices else pick(bundle))

    # Continue a text, and print it character by character.
    if chosen.prompt is not None:
        text = answers.write(
            bundle, runtime, chosen.prompt, chosen.length, chosen.temperature, chosen.seed
        )
        for part in chain([chosen.prompt], map(_escaped, text), ["\n"]):
            print(part, end="", flush=True)
        return

    # Compute outputs batch by batch; they are lazy, so that results appear as they are computed.
    examples = read(chosen.input, bundle.card, chosen.label_column, labeled=chosen.score)
    size = chosen.batch_size
    if chosen.all_devices:
        predict, size = _on_all_devices(bundle, runtime, size)
    else:
        predict = load(bundle, runtime)
    outputs = (
        predict(examples.inputs[first : first + size])
        for first in range(0, len(examples.inputs), size)
    )
    if chosen.score:
        _show_score(bundle, examples, outputs, chosen.json)
    else:
        _show(bundle, outputs, chosen.json)


def _on_all_devices(bundle: Bundle, runtime: str, size: int) -> tuple[Predict, int]:
    """Puts a copy of the model on each local device and distributes each batch over them.

    The copies do not communicate: their compiled program is checked for collectives.

    Args:
        bundle: The bundle.
        runtime: Name of the runtime, which must be "jax".
        size: Batch size; rounded up to a multiple of the number of devices.

    Returns:
        The function from inputs to outputs, and the rounded batch size, its maximum.

    Raises:
        InputError: The runtime is not "jax" or is not installed, the bundle has no artifact for it,
            or the packages of the trainer are not installed.
    """
    if runtime != "jax":
        raise InputError("all_devices", f"requires the runtime jax, got {runtime}.")
    load(bundle, runtime)  # raises InputError if the runtime or the artifact is missing
    import jax

    # A node may have JAX without the packages of the trainer.
    try:
        from ctde_jax import devices
        from ctde_jax.cost import collectives
        from ctde_jax.devices import replica
    except ImportError as error:
        raise InputError(
            "all_devices",
            f"requires ctde_jax with its dependencies, but {error.name} cannot be imported.",
        ) from error

    # Compile for inputs [device, examples per device, ...].
    local_devices = devices.start(cpu_devices=devices.FAKE_DEVICES)
    card = bundle.card
    per_device = ceil(size / len(local_devices))
    call = traceable(bundle, bundle.read(card.artifacts[runtime].file))
    copies = replica.parallel(call, local_devices, in_axes=(0,), out_axes=0)
    shape = (len(local_devices), per_device, *card.input_shape)
    like = jax.ShapeDtypeStruct(shape, card.input_dtype)
    program = replica.compiled(replica.lowered(copies, like), local_devices)

    # Independence is a property of the compiled program: it has no collectives.
    found = collectives.read(program.as_text() or "")
    assert not found, f"the program of independent copies contains {found}"
    print(
        f"{len(local_devices)} independent copies; their program contains no collective",
        file=sys.stderr,
    )

    def predict(inputs: np.ndarray) -> np.ndarray:
        # Examples are repeated to fill a short batch, and the surplus outputs dropped.
        filled = np.resize(inputs, shape)
        (outputs,) = map(np.asarray, program(replica.shard(filled, local_devices)))
        return outputs.reshape(-1, *outputs.shape[2:])[: len(inputs)]

    return predict, per_device * len(local_devices)


def _show(bundle: Bundle, outputs: Iterator[np.ndarray], as_json: bool) -> None:
    """Prints the outputs, one line per example, as soon as a batch is computed."""
    describe = {"classes": _class, "tokens": _token}.get(bundle.card.predicts, _numbers)
    first = 0
    for batch in outputs:
        for example, output in enumerate(batch, start=first):
            row = {"example": example, **describe(bundle, output)}
            if as_json:
                print(json.dumps(row))
                continue
            # The header comes before the first example.
            if not example:
                print("  ".join(f"{name:>11}" for name in row))
            print("  ".join(f"{_cell(value):>11}" for value in row.values()))
        first += len(batch)


# Cells of the table, and fields of the JSON, by what the model predicts.
def _class(bundle: Bundle, logits: np.ndarray) -> dict[str, Any]:
    best = int(logits.argmax())
    names = bundle.card.classes
    label = names[best] if best < len(names) else str(best)
    return {"label": label, "probability": float(np.exp(answers.log_probabilities(logits)[best]))}


def _token(bundle: Bundle, logits: np.ndarray) -> dict[str, Any]:
    # logits: float32[length, vocabulary]; the last position predicts the next token.
    last = logits[-1]
    names = bundle.card.vocabulary
    best = int(last.argmax())
    probability = float(np.exp(answers.log_probabilities(last)[best]))
    return {"next": repr(names[best]) if best < len(names) else best, "probability": probability}


def _numbers(bundle: Bundle, outputs: np.ndarray) -> dict[str, Any]:
    return {"outputs": outputs.tolist()}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list):
        flat = np.ravel(value)
        more = f" and {len(flat) - _SHOWN} more" if len(flat) > _SHOWN else ""
        return " ".join(f"{number:.5g}" for number in flat[:_SHOWN]) + more
    return on_one_line(str(value))


def _escaped(character: str) -> str:
    """Escapes control characters other than line ends and tabs, which a terminal may interpret."""
    return character if character in "\n\r\t" else on_one_line(character)


def _show_score(
    bundle: Bundle, examples: Examples, outputs: Iterator[np.ndarray], as_json: bool
) -> None:
    """Prints accuracy and cross-entropy in nats; every example counts once."""
    assert examples.labels is not None
    done = 0
    loss = 0.0
    correct = 0.0
    for batch in outputs:
        labels = examples.labels[done : done + len(batch)]
        losses, is_correct = answers.score(batch, labels)
        done = done + len(batch)
        loss = loss + losses.sum()
        correct = correct + is_correct.sum()
    row = {"examples": done, "accuracy": correct / done, "loss": loss / done}
    if as_json:
        print(json.dumps(row))
    else:
        print(f"examples {done:,}  accuracy {correct / done:.2%}  loss {loss / done:.4f}")


if __name__ == "__main__":
    sys.exit(streams.run(main))
