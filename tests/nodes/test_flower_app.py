"""The example `examples/flower` trains with Flower's own commands, in real processes."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctde_jax.bundle import open_bundle

pytest.importorskip("flwr", reason="requires Flower: pip install 'ctde_jax[flower]'")
processes = pytest.importorskip("ctde_jax.nodes.flower.processes")

APP = Path(__file__).parents[2] / "examples" / "flower"
NODES = {"north": 1, "south": 2}
ROUNDS = 2


@pytest.fixture
def flower(tmp_path):
    """Starts a SuperLink and two SuperNodes; returns a function that runs `flwr`."""
    programs = Path(sys.executable).parent
    port = processes.find_port()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    environment = {
        **os.environ,
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Flower starts its other programs by their names.
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(APP.parents[1]),
    }
    started = []

    def start(name, *arguments):
        with (tmp_path / f"{len(started)}.log").open("wb") as log:
            command = [programs / name, "--insecure", *map(str, arguments)]
            # A session, as these programs start others.
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        started.append(process)

    def flwr(*arguments):
        command = [programs / "flwr", *map(str, arguments)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=240, check=True
        ).stdout

    start("flower-superlink", "--port", port, "--disable-runtime-dependency-installation")
    end = time.monotonic() + 60
    while not is_listening(port):
        assert time.monotonic() < end
        time.sleep(0.1)
    for name, part in NODES.items():
        config = f'folder="{tmp_path / name}" part={part}'
        address = f"127.0.0.1:{port}"
        ports = ("--superlink", address, "--port", processes.find_port())
        start("flower-supernode", *ports, "--node-config", config)
    yield flwr
    for process in started:
        os.killpg(process.pid, 9)
        process.wait()
    # A worker ends if its files are removed.
    for place in tmp_path.glob("*/worker-*/worker.sock"):
        place.unlink()


def is_listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_example_trains_with_the_commands_of_flower(tmp_path, flower):
    run = tmp_path / "run"
    config = f'folder="{run}" rounds={ROUNDS}'
    output = flower("run", APP, "here", "--stream", "--run-config", config)
    assert "Trained(step 32" in output

    # Every round has the messages of both nodes, in 4 bits, and the nodes have the bundle.
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rounds = [row["round"] for row in rows if row["split"] == "train"]
    assert [sorted(each["nodes"]) for each in rounds] == [[*NODES]] * ROUNDS
    assert rows[-1]["accuracy"] > 0.8
    assert rows[-2]["bytes_sent"] < ROUNDS * 6000
    bundle = open_bundle(run / "bundle").sha256
    for name in NODES:
        (received,) = (tmp_path / name).glob("run-*/bundle")
        assert open_bundle(received).sha256 == bundle


def test_process_of_a_client_app_does_not_import_jax():
    """It lives for one message, and would take seconds to import JAX."""
    code = "import sys, federated; assert not {'jax', 'optax', 'flax'} & {*sys.modules}"
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{APP.parents[1]}:{APP}"},
        check=True,
    )
