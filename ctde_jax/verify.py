"""Command `python -m ctde_jax.verify`: tests the guarantees of this library on this machine.

    python -m ctde_jax.verify resume               # a run that is killed repeatedly ends with
                                                   # the same bits
    python -m ctde_jax.verify exact                # training on 1, 2, 4 and 8 devices gives
                                                   # the same bits
    python -m ctde_jax.verify replicas             # all devices hold equal values after every
                                                   # dispatch
    python -m ctde_jax.verify eval                 # every test example counts once
    python -m ctde_jax.verify checkpoint FOLDER    # the tensors of a run's checkpoints match
                                                   # their SHA-256
    python -m ctde_jax.verify bundle FOLDER        # the artifacts of a bundle reproduce the
                                                   # outputs of the trained model

The first four take the options of python -m ctde_jax.train. The last takes --input FILE (labeled
examples to score) and --expect SHA256 (the required beginning of the SHA-256 of card.json); on a
node it needs only numpy and the runtimes to verify.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ctde_jax.bundle import EXAMPLES, RUNTIMES, Parser, open_bundle, parity, read, run, streams
from ctde_jax.errors import (
    InputError,
    NonFiniteLoss,
    Preempted,
    ReplicasDiverged,
    check_known,
    quoted,
)


def main(arguments: Sequence[str]) -> int:
    """Verifies the property that the first argument names.

    Args:
        arguments: Name of the property, and its arguments.

    Returns:
        The exit status: 0 if the property holds, 1 if not, 2 for invalid input, 75 if a signal
        ended the training.
    """
    name, *rest = arguments or ["--help"]
    if name == "bundle":
        return _bundle(rest)
    if {"-h", "--help"} & {name, *rest}:
        print(__doc__)
        return 0
    return _training(name, rest)


def _training(name: str, arguments: Sequence[str]) -> int:
    """Verifies a property of training or checkpoints, and returns the exit status.

    Args:
        name: Name of the property, a key of `PROOFS`.
        arguments: Options of `ctde_jax.train`, or the folder of checkpoints.
    """
    # Not imported at the top, as a node lacks the packages of the trainer.
    try:
        from ctde_jax import config
        from ctde_jax.config import proofs
    except ImportError as error:
        print(
            f"error: verify {name} requires the packages of the trainer, such as {error.name}; "
            "without them only verify bundle is available.",
            file=sys.stderr,
        )
        return 2

    # A divergence of the replicas is a violation of the property, not an error.
    try:
        check_known("verify", name, [*proofs.PROOFS, "bundle"])
        violations, success = proofs.PROOFS[name](arguments)
    except InputError as error:
        print(f"error: {config.flag(error.option)} {error.sentence}", file=sys.stderr)
        return 2
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ReplicasDiverged as error:
        violations = [str(error)]
        success = ""
    except Preempted as error:
        print(error, file=sys.stderr)
        return os.EX_TEMPFAIL
    return _print_verdict(violations, success)


def _bundle(arguments: Sequence[str]) -> int:
    """Verifies the artifacts of a bundle with the installed runtimes; returns the exit status."""
    # The options.
    parser = Parser(
        "ctde_jax.verify bundle",
        "Verifies on this machine that a bundle reproduces the outputs of the trained model.",
    )
    parser.add_argument("bundle", type=Path, metavar="FOLDER", help="folder of the bundle")
    parser.add_argument(
        "--input", type=Path, metavar="FILE", help="labeled examples to score, a .npz or .csv file"
    )
    parser.add_argument(
        "--expect",
        metavar="SHA256",
        help="required beginning of the SHA-256 of card.json, 8 or more digits",
    )
    chosen = parser.parse_args(arguments)
    status = 0

    # `run` turns exceptions into exit statuses, so the verdict is passed by `nonlocal`.
    def prove() -> None:
        nonlocal status

        # The bundle must contain examples, or the user must pass labeled ones.
        bundle = open_bundle(chosen.bundle, chosen.expect)
        examples = None if chosen.input is None else read([chosen.input], bundle.card, labeled=True)
        if examples is None and EXAMPLES not in bundle.card.files:
            raise InputError(
                "input",
                f"must name a file with labels, because {bundle.folder} contains no examples.",
            )

        # Run each artifact and print one line per format.
        tried = []
        violations = []
        for name in bundle.card.artifacts:
            if name not in RUNTIMES:
                print(f"{quoted(name)}: skipped, this version does not support the format")
        for name, found in parity.repeat(bundle).items():
            if found is None:
                print(
                    f"{name}: skipped, its runtime is not installed; "
                    f"`pip install {RUNTIMES[name].install}`"
                )
                continue

            # Difference on the examples of the bundle, accuracy on those of the user, receipt.
            results = (
                [f"maximum difference {found.relative:.1e} on {found.examples:,} examples"]
                if found.examples
                else []
            )
            if examples is not None:
                results.append(
                    f"accuracy {parity.score(bundle, name, examples):.4f} on "
                    f"{len(examples.inputs):,} examples"
                )
            receipt = bundle.card.artifacts[name].receipt.get("measured", {})
            results.append(
                f"receipt {', '.join(f'{metric} {mean:.4f}' for metric, mean in receipt.items())}"
            )
            print(f"{name}: {'; '.join(results)}")
            tried.append(name)
            if not found.holds:
                violations.append(
                    f"{name} differs from the trained model by more than {found.allowed:.1e}"
                )

        # A bundle is not verified if no artifact was run.
        if not tried:
            raise InputError(
                "bundle", "has no artifact that can run on this machine; see the lines above."
            )
        status = _print_verdict(violations, f"every file matches its SHA-256; {_agreement(tried)}")

    return run(prove, names={"bundle": "FOLDER"}) or status


def _agreement(tried: Sequence[str]) -> str:
    """Returns the verdict on artifacts whose outputs are within their tolerances."""
    exact = [name for name in tried if parity.is_exact(name)]
    inexact = [name for name in tried if not parity.is_exact(name)]
    parts = [f"the outputs of {', '.join(exact)} agree with the trained model"] if exact else []
    if inexact:
        parts.append(f"the outputs of {', '.join(inexact)} differ by no more than at the export")
    return "; ".join(parts)


def _print_verdict(violations: Sequence[str], success: str) -> int:
    """Prints the violations, or `success` if there are none; returns the exit status, 1 or 0."""
    for violation in violations:
        print(f"wrong: {violation}", file=sys.stderr)
    if not violations:
        print(f"holds: {success}")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(streams.run(main))
