"""A server over the network: rounds with the nodes that connect, then the bundle for them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctde_jax.bundle import open_bundle
from ctde_jax.checkpoint import named
from ctde_jax.data import Dataset
from ctde_jax.errors import InputError, Preempted, check_at_least, check_at_most, check_positive
from ctde_jax.export import write_bundle
from ctde_jax.nodes.bundles import FOLDER as BUNDLE
from ctde_jax.nodes.certificates import create_certificates
from ctde_jax.nodes.federation import Federation
from ctde_jax.nodes.keys import check_insecure, read_allowed
from ctde_jax.nodes.link import run_rounds, send_bundle
from ctde_jax.nodes.opening import open_server
from ctde_jax.nodes.server import Server
from ctde_jax.trainer import AnyCallback, Clock, Saving, Trained, deferred, plan_rows

if TYPE_CHECKING:
    from ctde_jax.nodes.flower.link import FlowerLink

_REQUEST_SECONDS = 24 * 3600.0
"""Seconds after which a request without reply is dropped; the deadline of a round is separate."""


@dataclass(frozen=True)
class Listening:
    """The address of a server, and the nodes that it accepts.

    Args:
        host: Address to listen on.
        port: Port to listen on.
        names: Further host names and IP addresses by which nodes reach the server, for its
            certificate.
        allow: File with the public keys of the nodes, one per line, or a folder of `.pub` files.
        insecure: Whether to use neither TLS nor keys, and accept all nodes; on loopback only.

    Raises:
        InputError: `insecure` is combined with another address than loopback, or with `allow`; or
            there is neither.
    """

    host: str = "127.0.0.1"
    port: int = 9092
    names: Sequence[str] = ()
    allow: Path | str | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, port=self.port)
        check_at_most(65535, port=self.port)
        check_insecure(self.insecure, self.host)
        if self.insecure and self.allow is not None:
            raise InputError("allow", "must be left out with insecure, which accepts all nodes.")
        if not self.insecure and self.allow is None:
            raise InputError(
                "allow",
                "must be a file of the nodes' public keys, or a folder of .pub files; on loopback, "
                "insecure accepts all nodes.",
            )


def serve(
    federation: Federation,
    data: Dataset,
    run_dir: Path | str,
    listening: Listening,
    *,
    quorum: int | None = None,
    deadline: float | None = None,
    bundle_every: int | None = None,
    linger: float = 30.0,
    saving: Mapping[str, Any] = {},
    options: Mapping[str, Any] | None = None,
    callbacks: Sequence[AnyCallback] = (),
    show: bool = True,
) -> Trained:
    """Trains with nodes over the network, and sends them the bundle of the trained model.

    The same call continues the run in the folder after an interruption of any kind.

    Args:
        federation: The federation, equal on all nodes.
        data: Data set with the test split, on which the server evaluates.
        run_dir: Folder of the run, with certificates in its subfolder `certificates`.
        listening: The address, and the nodes to accept.
        quorum: Minimum number of messages in a round; by default that of all nodes.
        deadline: Seconds after which a round with a quorum is closed; by default it waits for all
            nodes that are connected.
        bundle_every: Number of rounds between two bundles for the nodes; by default only the last.
        linger: Seconds to wait at the end for nodes that lack the bundle.
        saving: Other fields of `Saving`.
        options: Options that the nodes receive; see `node.MakeSetup`.
        callbacks: Callbacks, as of `fit`.
        show: Whether to show progress.

    Returns:
        The trained model, or as it is after Ctrl-C.

    Raises:
        InputError: An argument is invalid, the folder has another run or cannot be written to, or
            the port is in use.
        NonFiniteLoss: The loss became NaN or infinite.
        Preempted: SIGTERM or SIGHUP ended the run, and its checkpoint is written.
    """
    from ctde_jax.nodes.flower.serving import serve as serve_link  # requires the extra

    folder = named("run_dir", run_dir)

    def open_link(server: Server) -> AbstractContextManager["FlowerLink"]:
        certificates = None
        allowed = []
        if not listening.insecure:
            names = [listening.host, *listening.names]
            certificates = create_certificates(folder / "certificates", names)
            allowed = read_allowed(Path(listening.allow or ""))
        return serve_link(
            folder,
            listening.host,
            listening.port,
            certificates=certificates,
            allowed=allowed,
            log=lambda line: server.say(f"superlink  {line}"),
        )

    return coordinate(
        federation,
        data,
        folder,
        open_link,
        quorum=quorum,
        deadline=deadline,
        bundle_every=bundle_every,
        linger=linger,
        saving=saving,
        options=options,
        callbacks=callbacks,
        show=show,
    )


def coordinate(
    federation: Federation,
    data: Dataset,
    folder: Path,
    open_link: Callable[[Server], AbstractContextManager["FlowerLink"]],
    *,
    quorum: int | None = None,
    deadline: float | None = None,
    bundle_every: int | None = None,
    linger: float = 30.0,
    saving: Mapping[str, Any] = {},
    options: Mapping[str, Any] | None = None,
    callbacks: Sequence[AnyCallback] = (),
    show: bool = True,
) -> Trained:
    """Trains with the nodes of a link, whatever it is; result and errors are those of `serve`.

    Args:
        federation: The federation, equal on all nodes.
        data: Data set with the test split, on which the server evaluates.
        folder: Folder of the run.
        open_link: Opens the link to the nodes, once the folder is open.
        quorum: Minimum number of messages in a round.
        deadline: Seconds after which a round with a quorum is closed.
        bundle_every: Number of rounds between two bundles for the nodes.
        linger: Seconds to wait at the end for nodes that lack the bundle.
        saving: Other fields of `Saving`.
        options: Options that the nodes receive.
        callbacks: Callbacks, as of `fit`.
        show: Whether to show progress.
    """
    check_positive(deadline=deadline)
    check_at_least(1, bundle_every=bundle_every)
    clock = Clock()
    saving_values = Saving(folder, **saving)
    with (
        deferred(saves=True) as stop,
        open_server(
            federation,
            data,
            saving_values,
            quorum=quorum,
            options=options,
            callbacks=callbacks,
            stop=stop,
            show=show,
        ) as server,
    ):

        def trained() -> Trained:
            server.evaluate()
            center = server.evaluated_center()
            record = server.record
            rows = plan_rows(record.training)
            return record.result(center, (), None, dict(clock.seconds), bool(stop), rows)

        def write() -> None:
            write_bundle(trained(), data, folder / BUNDLE, show=False)

        with open_link(server) as flower:
            clock.lap("start-up")
            link = LinkByIdentity(flower)
            while not server.is_complete and not stop:
                run_rounds(server, link, deadline, lambda: bool(stop), bundle_every)
                clock.lap("train")
                if bundle_every is not None and not (server.is_complete or stop):
                    write()
                    server.offer(folder / BUNDLE)
                clock.lap("evaluate")
            if server.is_complete and not stop:
                if not _is_current(folder / BUNDLE, server):
                    write()
                server.offer(folder / BUNDLE)
                send_bundle(server, link, linger, lambda: bool(stop))
        if stop.is_preemption and not server.is_complete:
            assert stop.asked_by is not None
            raise Preempted(server.record.meter.position.step, folder, stop.asked_by.name)
        result = trained()
        server.record.callbacks("on_end", result)
        return result


def _is_current(folder: Path, server: Server) -> bool:
    """Returns whether a folder has the bundle of the parameters as they are."""
    try:
        facts = open_bundle(folder).card.facts
    except InputError:
        return False
    # Early stopping returns the parameters of an earlier step.
    step = server.record.best.step or server.record.meter.position.step
    return facts["training"]["step"] == step


class LinkByIdentity:
    """A link to nodes by identity, over one whose ids of nodes change if they reconnect."""

    def __init__(self, link: "FlowerLink"):
        self._link = link
        self._ids: dict[str, int] = {}

    def connected(self) -> Collection[str]:
        """Returns the identities of the nodes that are connected now."""
        self._ids = {self._link.identity(node): node for node in sorted(self._link.nodes())}
        return self._ids.keys()

    def push(self, requests: Mapping[str, bytes]) -> None:
        """Sends a request to each node; returns at once."""
        self._link.push(
            {self._ids[identity]: request for identity, request in requests.items()},
            _REQUEST_SECONDS,
        )

    def pull(self) -> list[tuple[str, bytes | str]]:
        """Returns the replies that have come; see `Link`."""
        return [(self._link.identity(node), reply) for node, reply in self._link.pull()]
