"""The command `python -m ctde_jax.verify`: what this library promises, proved on the user's own
machine.

    python -m ctde_jax.verify resume               # a run that is killed again and again ends
                                                   # with the same bits
    python -m ctde_jax.verify exact                # 1, 2, 4 and 8 devices train to the same bits
    python -m ctde_jax.verify replicas             # all devices hold the same after every dispatch
    python -m ctde_jax.verify eval                 # every test example counts once
    python -m ctde_jax.verify checkpoint FOLDER    # every bit of a run's checkpoints is as it
                                                   # was written
    python -m ctde_jax.verify bundle FOLDER        # a bundle says here what the trained model said

The first four take the options of a run. The last takes --input FILE, labeled test examples to
score, and --expect SHA256, how that of the card must begin; on a node it needs numpy and the
runtimes that it is to prove.
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
    what, *rest = arguments or ["--help"]
    if what == "bundle":
        return _bundle(rest)
    if {"-h", "--help"} & {what, *rest}:
        print(__doc__)
        return 0
    return _training(what, rest)


def _training(what: str, arguments: Sequence[str]) -> int:
    """Verifies a property of training or checkpoints."""
    # Not imported at the top, as a node lacks the packages of the trainer.
    try:
        from ctde_jax import config
        from ctde_jax.config import proofs
    except ImportError as error:
        print(
            f"error: verify {what} needs what trains, such as {error.name}; a node without it has "
            "bundle alone.",
            file=sys.stderr,
        )
        return 2

    # A divergence of the replicas is a verdict, not an error.
    try:
        check_known("verify", what, [*proofs.PROOFS, "bundle"])
        wrong, right = proofs.PROOFS[what](arguments)
    except InputError as error:
        print(f"error: {config.flag(error.option)} {error.sentence}", file=sys.stderr)
        return 2
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ReplicasDiverged as error:
        wrong = [str(error)]
        right = ""
    except Preempted as error:
        print(error, file=sys.stderr)
        return os.EX_TEMPFAIL
    return _say(wrong, right)


def _bundle(arguments: Sequence[str]) -> int:
    """Verifies the artifacts of a bundle with the runtimes that are installed."""
    # The options.
    parser = Parser(
        "ctde_jax.verify bundle", "Proves that a bundle says here what the trained model said."
    )
    parser.add_argument("bundle", type=Path, metavar="FOLDER", help="of the bundle")
    parser.add_argument(
        "--input", type=Path, metavar="FILE", help=".npz or .csv with labels, to score"
    )
    parser.add_argument(
        "--expect", metavar="SHA256", help="how the SHA-256 of card.json must begin"
    )
    chosen = parser.parse_args(arguments)
    status = 0

    # `run` turns exceptions into exit statuses, so the verdict is passed by `nonlocal`.
    def prove() -> None:
        nonlocal status

        # There must be something to compare with: examples in the bundle, or labels from the user.
        bundle = open_bundle(chosen.bundle, chosen.expect)
        examples = None if chosen.input is None else read([chosen.input], bundle.card, labeled=True)
        if examples is None and EXAMPLES not in bundle.card.files:
            raise InputError(
                "input",
                f"must be given, as {bundle.folder} came without examples: a file with labels.",
            )

        # Run each artifact and print one line per format.
        tried = []
        wrong = []
        for name in bundle.card.artifacts:
            if name not in RUNTIMES:
                print(f"{quoted(name)}: not known to this version, so not tried")
        for name, found in parity.repeat(bundle).items():
            if found is None:
                print(
                    f"{name}: not installed here, so not tried; "
                    f"`pip install {RUNTIMES[name].install}`"
                )
                continue

            # Difference on the examples of the bundle, accuracy on those of the user, receipt.
            says = (
                [f"differs by {found.relative:.1e} in {found.examples:,} examples"]
                if found.examples
                else []
            )
            if examples is not None:
                says.append(
                    f"is right in {parity.score(bundle, name, examples):.4f} of "
                    f"{len(examples.inputs):,}"
                )
            receipt = bundle.card.artifacts[name].receipt.get("measured", {})
            says.append(
                "its receipt says "
                f"{', '.join(f'{what} {mean:.4f}' for what, mean in receipt.items())}"
            )
            print(f"{name}: {'; '.join(says)}")
            tried.append(name)
            if not found.holds:
                wrong.append(
                    f"{name} differs from the trained model by more than {found.allowed:.1e}"
                )

        # A bundle of which nothing ran is not verified.
        if not tried:
            raise InputError("bundle", "has no artifact that runs here; the lines above state why.")
        status = _say(wrong, f"every file is as it was written, and {_sayings(tried)}")

    return run(prove, names={"bundle": "FOLDER"}) or status


def _sayings(tried: Sequence[str]) -> str:
    """Returns the verdict on artifacts that hold; inexact ones may differ as in their receipts."""
    exact = [name for name in tried if parity.is_exact(name)]
    others = [name for name in tried if not parity.is_exact(name)]
    says = [f"{', '.join(exact)} say what the model said"] if exact else []
    says += [f"{', '.join(others)} differ no more than their receipts say"] if others else []
    return ", and ".join(says)


def _say(wrong: Sequence[str], right: str) -> int:
    """Prints the verdict and returns the exit status."""
    for difference in wrong:
        print(f"wrong: {difference}", file=sys.stderr)
    if not wrong:
        print(f"holds: {right}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(streams.run(main))
