"""Command `python -m ctde_jax.serve`: trains with nodes that keep their data.

    python -m ctde_jax.serve --insecure --nodes 2 --strategy diloco --rounds 20
    python -m ctde_jax.node --insecure --server 127.0.0.1:9092 --part 1/2    # another terminal
    python -m ctde_jax.node --insecure --server 127.0.0.1:9092 --part 2/2    # a third one

The server sends the options of model, optimizer and strategy to its nodes. It does not train, and
evaluates on the test split of its data set.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from math import ceil
from pathlib import Path

from ctde_jax import config as options
from ctde_jax.bundle import Parser, streams
from ctde_jax.errors import InputError, NonFiniteLoss, Preempted, check_at_least


def main(arguments: Sequence[str]) -> int:
    """Serves a run with the given options until it is complete.

    Args:
        arguments: Arguments of the command line.

    Returns:
        The exit status: 0; 2 for invalid options or data, or a loss that is not finite; 75 after
        SIGTERM or SIGHUP; 130 after Ctrl-C.
    """
    parser = _parser()
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        print("\nAll other options are those of python -m ctde_jax.train.")
        return 0
    chosen, rest = parser.parse_known_args(arguments)
    try:
        return _serve(chosen, options.parse(rest, "serve"))
    except InputError as error:
        is_own = error.option in vars(chosen)
        flag = options.as_flag(error.option) if is_own else options.flag(error.option)
        print(f"error: {flag} {error.sentence}", file=sys.stderr)
        return 2
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Preempted as error:
        print(error, file=sys.stderr)
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:
        return 130


def _parser() -> Parser:
    parser = Parser("ctde_jax.serve", __doc__ or "")
    parser.allow_abbrev = False
    add = parser.add_argument
    add("--nodes", type=int, help="nodes among which a batch is divided (default: --quorum)")
    add("--rounds", type=int, help="rounds (default: those of --steps or --epochs)")
    add("--quorum", type=int, help="least number of messages in a round (default: --nodes)")
    add(
        "--deadline",
        type=float,
        help="seconds after which a round with a quorum is closed (default: it waits for all "
        "connected nodes)",
    )
    add("--bundle-every", type=int, help="rounds between bundles for the nodes (default: the last)")
    add(
        "--linger",
        type=float,
        default=30.0,
        help="seconds to wait at the end for nodes that lack the bundle (default: 30)",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=9092, help="port to listen on (default: 9092)")
    add(
        "--names", nargs="+", default=[], help="other host names of the server, for its certificate"
    )
    add("--allow", type=Path, help="public keys of the nodes: a file, or a folder of .pub files")
    add(
        "--insecure",
        action="store_true",
        help="neither TLS nor keys; accepts all nodes, on loopback only",
    )
    return parser


def _serve(chosen: Namespace, config: options.Config) -> int:
    from ctde_jax import devices  # not at the top, as these import JAX
    from ctde_jax.config import build
    from ctde_jax.nodes import Listening, build_federation, check_installed, serve, to_send
    from ctde_jax.trainer import console, line

    check_installed()
    check_at_least(1, nodes=chosen.nodes, rounds=chosen.rounds, quorum=chosen.quorum)
    nodes = chosen.nodes or chosen.quorum
    if nodes is None:
        raise InputError("nodes", "must be the number of nodes, such as 3, got none.")
    listening = Listening(chosen.host, chosen.port, chosen.names, chosen.allow, chosen.insecure)
    devices.start()
    data = build.load_data(config.data, config.optimization.seed)

    # A round has --sync-every steps.
    rounds = chosen.rounds
    if rounds is None:
        steps = build.count_total_steps(config, data, nodes, None)
        rounds = ceil(steps / max(1, config.aggregation.sync_every))
    federation = build_federation(config, data, nodes, rounds)
    folder = config.run.run_dir or options.new_run_folder(config, "nodes-")
    screen = console()
    screen.print(line("server", f"{chosen.host}:{chosen.port}, {nodes} nodes, {rounds:,} rounds"))
    screen.print(line("folder", f"{folder}; the same command with --run-dir continues the run"))
    if not chosen.insecure:
        screen.print(line("nodes need", f"{folder / 'certificates' / 'ca.pem'}, as --authority"))

    if config.aggregation.dp_clip_norm is not None:
        screen.print(line("privacy", _describe_privacy(config.aggregation, rounds)))

    def prepare(folder: Path) -> None:
        options.save(config, folder / options.CONFIG)

    trained = serve(
        federation,
        data,
        folder,
        listening,
        quorum=chosen.quorum,
        deadline=chosen.deadline,
        bundle_every=chosen.bundle_every,
        linger=chosen.linger,
        saving={
            "resume": config.run.resume == "auto",
            "keep_checkpoints": config.run.keep_checkpoints,
            "keep_best": config.run.keep_best,
            "prepare": prepare,
        },
        options=to_send(config, nodes, rounds),
        callbacks=build.build_trackers(config.run.track, folder),
    )
    screen.print(repr(trained))
    return 130 if trained.interrupted else 0


def _describe_privacy(chosen: options.AggregationOptions, rounds: int) -> str:
    """Returns the guarantee for a node that takes part in all rounds."""
    from ctde_jax.aggregate import epsilon

    noise = chosen.dp_noise_multiplier
    if not noise:
        return f"messages are clipped to norm {chosen.dp_clip_norm:g}; no noise, so no guarantee"
    return f"epsilon {epsilon(noise, rounds):.2f} at delta 1e-5 for {rounds:,} rounds"


if __name__ == "__main__":
    sys.exit(streams.run(main))
