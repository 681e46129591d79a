"""Command `python -m ctde_jax.node`: takes part in a training, with data that stay here.

    python -m ctde_jax.node --server host:9092 --authority ca.pem --data-file mine.npz

The first start creates the key of the node; the server must have its public part, `node.pub`. The
same command continues after any interruption. At the end, the folder has the bundle of the trained
model.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ctde_jax.bundle import Parser, run, streams
from ctde_jax.errors import InputError, quoted


def main(arguments: Sequence[str]) -> int:
    """Takes part in the rounds of a server until the run has ended.

    Args:
        arguments: Arguments of the command line.

    Returns:
        The exit status: 0; 2 for invalid options or data, or if the server does not accept the
        node; 130 after Ctrl-C.
    """
    chosen = _parser().parse_args(arguments)
    return run(lambda: _join(chosen), {})


def _parser() -> Parser:
    parser = Parser("ctde_jax.node", __doc__ or "")
    add = parser.add_argument
    add("--server", metavar="HOST:PORT", help="address of the server")
    add("--folder", type=Path, help="folder of the node (default: node-NAME)")
    add("--name", default="node", help="name of the node, a word (default: node)")
    add("--index", type=int, help="index of the node (default: the first one that is free)")
    add(
        "--dataset",
        help="kind of the data, as of ctde_jax.train (default: npz, or digits without --data-file)",
    )
    add("--data-file", type=Path, help="file of the data, which stay on this machine")
    add("--data-dir", type=Path, help="folder of the data, which stay on this machine")
    add("--part", metavar="I/N", help="use one of N equal parts of the data, to try it out")
    add("--devices", type=int, help="number of devices (default: all accelerators, or 1)")
    add("--authority", type=Path, help="certificate ca.pem of the server")
    add("--insecure", action="store_true", help="neither TLS nor keys, on loopback only")
    add("--key", action="store_true", help="only create the key, and print its public part")
    return parser


def _join(chosen: Namespace) -> None:
    from ctde_jax.nodes import create_node_key

    # The key alone, before there is a server.
    folder = chosen.folder or Path(f"node-{chosen.name}")
    if chosen.key:
        public = create_node_key(folder, chosen.name)
        print(f"{public.line} {public.name}")
        return
    if chosen.server is None:
        raise InputError("server", "must be the address of the server, such as 127.0.0.1:9092.")

    from ctde_jax import devices  # not at the top, as these import JAX
    from ctde_jax.config import DataOptions, build
    from ctde_jax.data import partition
    from ctde_jax.nodes import Setup, build_federation, check_installed, join, received

    check_installed()
    dataset = chosen.dataset or ("npz" if chosen.data_file else "digits")
    local = DataOptions(dataset=dataset, data_file=chosen.data_file, data_dir=chosen.data_dir)
    part = _parse_part(chosen.part)

    def setup(sent) -> Setup:
        config, nodes, rounds = received(sent, local)
        data = build.load_data(config.data, config.optimization.seed)
        if part is not None:
            number, parts = part
            rows = partition.iid(data.train.labels, parts)[number - 1]
            data = partition.part(data, rows)
        return Setup(data, lambda data: build_federation(config, data, nodes, rounds))

    join(
        chosen.server,
        folder,
        setup,
        devices.start(chosen.devices, 1),
        name=chosen.name,
        index=chosen.index,
        authority=chosen.authority,
        insecure=chosen.insecure,
    )


def _parse_part(word: str | None) -> tuple[int, int] | None:
    """Returns number and count of `--part`, such as 1 and 3 for 1/3.

    Raises:
        InputError: The word is not of this form, or the number is not from 1 to the count.
    """
    if word is None:
        return None
    number, _, count = word.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise InputError(
            "part", f"must be a part and their number, such as 1/3, got {quoted(word)}."
        )
    return int(number), int(count)


if __name__ == "__main__":
    sys.exit(streams.run(main))
