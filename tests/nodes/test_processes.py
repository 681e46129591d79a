"""Federations of real processes: kills, full disks, hostile nodes, and strangers."""

import os
import resource
import signal

import jax
import numpy as np
import pytest
from commands import LIMIT, Commands, wait_until
from nodes_here import run_federation

import ctde_jax as ctde
from ctde_jax import checkpoint
from ctde_jax.config import parse
from ctde_jax.nodes.options import build_federation

pytest.importorskip("flwr", reason="requires Flower: pip install 'ctde_jax[flower]'")
run_node = pytest.importorskip("ctde_jax.nodes.flower.node").run_node

pytestmark = pytest.mark.slow

NAMES = ["north", "south"]
OF_SERVER = ["--nodes", "2", "--rounds", "12"]
OPTIONS = [
    *("--strategy", "diloco", "--reduce", "int4", "--error-feedback", "--sync-every", "2"),
    *("--batch-size", "16", "--eval-every", "24"),
]


@pytest.fixture
def start(tmp_path):
    """Returns a function that makes commands, whose processes end with the test."""
    made = []

    def make(names, options) -> Commands:
        made.append(Commands(tmp_path, names, options))
        return made[-1]

    yield make
    for commands in made:
        commands.stop()


def start_nodes(commands: Commands) -> None:
    for index, name in enumerate(NAMES):
        start_node(commands, name, index)


def start_node(commands: Commands, name: str, index: int) -> None:
    commands.node(name, "--index", str(index), "--part", f"{index + 1}/{len(NAMES)}")


def wait_for_rounds(commands: Commands, more: int) -> None:
    rounds = len(commands.rounds()) + more
    wait_until(lambda: len(commands.rounds()) >= rounds)


def wait_for_line(commands: Commands, name: str, sentence: str) -> None:
    """Waits until a line of a log contains a sentence."""
    wait_until(lambda: any(sentence in line for line in commands.log(name).splitlines()))


def check_complete(commands: Commands) -> None:
    """Checks that all commands end without an error, and that no round is lost or repeated."""
    for name in ("server", *NAMES):
        assert commands.running[name].wait(LIMIT) == 0, commands.log(name)
        assert "Traceback" not in commands.log(name)
    assert [row["step"] for row in commands.rounds()] == [*range(2, 25, 2)]
    cards = [commands.folder / name / "bundle" / "card.json" for name in ("server", *NAMES)]
    assert len({card.read_bytes() for card in cards}) == 1


def tensors_of(run_dir):
    found = checkpoint.newest_intact(run_dir / checkpoint.CHECKPOINTS, print)
    assert found is not None
    return found.tensors


@pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="only Linux limits the files of a running process"
)
def test_kills_and_full_disks_do_not_change_a_bit(start, digits, tmp_path):
    commands = start(NAMES, [*OF_SERVER, *OPTIONS])
    commands.serve()
    start_nodes(commands)
    wait_for_rounds(commands, 1)

    # The disk of a node is full for some time; both sides report it.
    commands.fill_disk("north")
    wait_for_line(commands, "north", "refused    folder cannot be written")
    wait_for_line(commands, "server", "refused    north: request was refused: folder cannot be")
    commands.free_disk("north")
    wait_for_rounds(commands, 1)

    os.kill(commands.superlink(), signal.SIGKILL)
    wait_for_rounds(commands, 2)
    commands.kill("south")
    start_node(commands, "south", 1)
    wait_for_rounds(commands, 1)

    # The disk of the server is full: it ends with a sentence, and is started again.
    commands.fill_disk("server")
    assert commands.running["server"].wait(LIMIT) == 2
    assert commands.log("server").splitlines()[-1].startswith("error: --run-dir cannot be written")
    commands.serve()
    wait_for_rounds(commands, 1)
    commands.kill("server")
    commands.serve()
    check_complete(commands)

    # The same federation in one process, undisturbed.
    federation = build_federation(parse(OPTIONS, "serve"), digits, nodes=2, rounds=12)
    parts = ctde.data.partition.iid(digits.train.labels, 2)
    run_federation(tmp_path / "here", federation, digits, parts)
    expected = tensors_of(tmp_path / "here" / "server")
    found = tensors_of(commands.run_dir)
    assert found.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, found, expected)
