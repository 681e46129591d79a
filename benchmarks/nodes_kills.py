"""Kills (-9) of nodes, of the server and of its SuperLink at random moments; see `nodes.py`.

Three nodes and a server train an MLP on the digits, in 4 bits with error feedback; a round needs
the messages of all nodes. A killer kills a random process: a node, the server or the SuperLink. A
killed node or server is started again at once, by the same command; the server restarts its
SuperLink itself. Two of three kills follow the one before within four seconds, in which the
processes start; the others follow after one to six more rounds, or end the killing if the last
round is closed. So a run always advances, and is killed in all of its phases: while it starts,
trains, and sends the bundle. A run that makes no progress for `HANG` seconds counts as a hang.
"""

import os
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from federation import SERVER, Federation, running
from harness import Log, Row, Table, console, machine, publish

NODES = 3
ROUNDS = 40
STEPS = 2  # of a round
LEAST_KILLS = 200
HANG = 180.0  # seconds
NODE = "node"
SUPERLINK = "superlink"
VICTIMS = (NODE, SERVER, SUPERLINK)
CHANCES = (0.45, 0.2, 0.35)  # a server has no SuperLink while it starts
UNDISTURBED = {"seed": 0}
HEADER = (
    "seed",
    "kills of nodes",
    "of the server",
    "of the SuperLink",
    "hangs",
    "ended without a kill",
    "rounds",
    "lost or repeated",
    "final state",
    "seconds",
)

OPTIONS = [
    *("--strategy", "diloco", "--reduce", "int4", "--error-feedback"),
    *("--nodes", str(NODES), "--rounds", str(ROUNDS), "--sync-every", str(STEPS)),
    *("--batch-size", "48", "--eval-every", str(ROUNDS * STEPS)),
]


class Run:
    """A run of the federation and the killer.

    Args:
        federation: The processes.
        rng: Source of all random choices.
    """

    def __init__(self, federation: Federation, rng: np.random.Generator):
        self._federation = federation
        self._rng = rng
        self._progress_at = time.monotonic()
        self._progress = 0
        self.kills = Counter()
        self.faults: list[str] = []
        self.is_hanging = False

    def wait(self) -> None:
        """Waits until the server has ended, without any kill."""
        while self._goes_on():
            time.sleep(0.05)

    def kill_at_random(self) -> None:
        """Kills random processes until the server has ended."""
        rng = self._rng
        while True:
            # A random moment.
            if rng.random() < 2 / 3:
                rounds = 0
                pause = rng.uniform(0, 4)
            elif (closed := len(self._federation.rounds())) < ROUNDS:
                rounds = min(closed + rng.integers(1, 7), ROUNDS)
                pause = rng.uniform(0, 0.5)
            else:
                self.wait()
                return
            while self._goes_on() and len(self._federation.rounds()) < rounds:
                time.sleep(0.01)
            end = time.monotonic() + pause
            while self._goes_on() and time.monotonic() < end:
                time.sleep(0.01)
            if not self._goes_on():
                return

            self._kill(rng.choice(VICTIMS, p=CHANCES))

    def _kill(self, victim: str) -> None:
        if victim == SUPERLINK:
            process = self._federation.superlink()
            if process is None:
                return
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
                self.kills[victim] += 1
            return
        name = self._rng.choice(self._federation.nodes) if victim == NODE else victim
        if self._federation.status(name) is None:
            self._federation.kill(name)
            self._federation.start(name)
            self.kills[victim] += 1

    def _goes_on(self) -> bool:
        """Returns whether the server has not ended; starts processes that failed, and reports."""
        for name in (SERVER, *self._federation.nodes):
            if self._federation.status(name) not in (None, 0):
                self.faults.append(f"{name}: {self._federation.last_words(name)}")
                console.print(self.faults[-1])
                self._federation.start(name)
        now = time.monotonic()
        progress = len(self._federation.rounds())
        if progress != self._progress:
            self._progress_at = now
        self._progress = progress
        self.is_hanging = now - self._progress_at > HANG
        return not self.is_hanging and self._federation.status(SERVER) is None


def measure_run(seed: int) -> Row:
    """Runs a federation; returns the row of a run, without kills if the seed is 0."""
    begin = time.monotonic()
    with (
        TemporaryDirectory() as folder,
        running(Path(folder), NODES, OPTIONS, HANG) as federation,
    ):
        run = Run(federation, np.random.default_rng(seed))
        if seed == UNDISTURBED["seed"]:
            run.wait()
        else:
            run.kill_at_random()
        return {
            "kills": dict(run.kills),
            "is_hanging": run.is_hanging,
            "faults": run.faults,
            "steps": federation.rounds(),
            "bundles": sum(map(federation.has_bundle, federation.nodes)),
            "digest": federation.digest(),
            "seconds": round(time.monotonic() - begin, 1),
        }


def measure(log: Log) -> None:
    """Runs an undisturbed federation, and others until there are enough kills."""
    log.make(lambda: measure_run(0), **UNDISTURBED)
    number = 0
    while sum(sum(row["kills"].values()) for row in log.find()) < LEAST_KILLS:
        number += 1
        log.make(lambda number=number: measure_run(number), seed=number)


def report(log: Log, file: Path) -> None:
    """Writes the table of all runs."""
    (undisturbed,) = log.find(**UNDISTURBED)
    expected = list(range(STEPS, ROUNDS * STEPS + 1, STEPS))
    rows = []
    for row in log.find():
        lost = len(set(expected) - set(row["steps"]))
        repeated = len(row["steps"]) - len(set(row["steps"]))
        is_in_order = row["steps"] == expected
        kills = Counter(row["kills"])
        rows.append(
            [
                str(row["seed"] or "undisturbed"),
                *(str(kills[victim]) for victim in VICTIMS),
                str(int(row["is_hanging"])),
                str(len(row["faults"])),
                str(len(row["steps"])),
                f"{lost + repeated}" + ("" if is_in_order else ", not in order"),
                "equal" if row["digest"] == undisturbed["digest"] else "differs",
                f"{row['seconds']:.0f}",
            ]
        )
    total = sum(sum(row["kills"].values()) for row in log.find())
    note = (
        f"{total} kills. Equal: all bits of all tensors in the newest checkpoint of the server are "
        f"those of the undisturbed run. {machine('flwr')}."
    )
    publish(file, [Table("Kills at random moments", HEADER, rows)], note)
