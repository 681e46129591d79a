"""The command `python -m ctde_jax.verify`: what this library promises, proved on the user's own machine.

    python -m ctde_jax.verify resume               # a run that is killed again and again ends with the same bits
    python -m ctde_jax.verify exact                # 1, 2, 4 and 8 devices train to the same bits
    python -m ctde_jax.verify replicas             # all devices hold the same after every dispatch
    python -m ctde_jax.verify eval                 # every test example counts once
    python -m ctde_jax.verify checkpoint FOLDER    # every bit of a run's checkpoints is as it was written
    python -m ctde_jax.verify bundle FOLDER        # a bundle says here what the trained model said

The first four take the options of a run. The last takes --input FILE, labeled test examples to score, and --expect
SHA256, how that of the card must begin; on a node it needs numpy and the runtimes that it is to prove.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ctde_jax.bundle import open_bundle, parity
from ctde_jax.bundle.command import Parser, run
from ctde_jax.bundle.inputs import LABELS, read
from ctde_jax.errors import InputError, NonFiniteLoss, Preempted, ReplicasDiverged, check_known


def main(arguments: Sequence[str]) -> int:
    """Proves what the first argument names; returns the exit status, 1 where it does not hold, 2 for a mistake."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    what, *rest = arguments
    return _bundle(rest) if what == "bundle" else _training(what, rest)


def _training(what: str, arguments: Sequence[str]) -> int:
    from ctde_jax import config  # here, as a node has none of it
    from ctde_jax.proofs import PROOFS

    try:
        check_known("verify", what, [*PROOFS, "bundle"])
        wrong, right = PROOFS[what](arguments)
    except InputError as error:
        print(f"error: {config.flag(error.option)} {error.sentence}", file=sys.stderr)
        return 2
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ReplicasDiverged as error:
        wrong, right = [str(error)], ""
    except Preempted as error:
        print(error, file=sys.stderr)
        return os.EX_TEMPFAIL
    return _say(wrong, right)


def _bundle(arguments: Sequence[str]) -> int:
    parser = Parser("ctde_jax.verify bundle", "Proves that a bundle says here what the trained model said.")
    parser.add_argument("bundle", type=Path, metavar="FOLDER", help="of the bundle")
    parser.add_argument("--input", type=Path, metavar="FILE", help=".npz or .csv with labels, to score")
    parser.add_argument("--expect", metavar="SHA256", help="how the SHA-256 of card.json must begin")
    chosen = parser.parse_args(arguments)
    status = 0

    def prove() -> None:
        nonlocal status
        bundle = open_bundle(chosen.bundle, chosen.expect)
        examples = None if chosen.input is None else read([chosen.input], bundle.card)
        if examples is not None and examples.labels is None:
            raise InputError("input", f"needs labels: {LABELS} in a .npz file, or a last column in a .csv file.")
        tried, wrong = [], []
        for name, found in parity.repeat(bundle).items():
            if found is None:
                print(f"{name}: not installed here, so not tried")
                continue
            says = f"{name}: differs by {found.relative:.1e} in {found.examples:,} examples"
            if examples is not None:
                says += f", and is right in {parity.score(bundle, name, examples):.4f} of {len(examples.inputs):,}"
            receipt = bundle.card.artifacts[name].receipt["measured"]
            print(f"{says}; its receipt says {', '.join(f'{what} {mean:.4f}' for what, mean in receipt.items())}")
            tried.append(name)
            if not found.holds:
                wrong.append(f"{name} differs from the trained model by more than {parity.PARITY:g}")
        if not tried:
            raise InputError("runtime", "must be installed, at least one of those of the bundle.")
        status = _say(wrong, f"every file is as it was written, and {', '.join(tried)} say what the model said")

    return run(prove, places=("bundle",)) or status


def _say(wrong: Sequence[str], right: str) -> int:
    for difference in wrong:
        print(f"wrong: {difference}", file=sys.stderr)
    if not wrong:
        print(f"holds: {right}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
