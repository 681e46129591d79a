"""How long a step would take on 8 to 4,096 devices: a model of time from bytes and launches, held against measurements.

    python benchmarks/scale_model.py            # a quarter of an hour; may be interrupted and goes on
    python benchmarks/scale_model.py --report   # tables and picture of what has been measured

A step on N devices, each with its own batch of 64, takes

    step = alone + (codec + sum over collectives of (hops x latency + bytes sent / bandwidth)) / steps of a round

- *alone* is the step of the same strategy on one device, measured here; *codec* encodes and decodes on it.
- Collectives are those of the program compiled for 8 fake devices; what their messages are on N devices follows from
  the type of the collective, and is held against the program compiled for 32.
- Hops, one waiting for the other: 2 log2 N for an all-reduce by halving and doubling (Thakur et al., 2005), which sends
  as many bytes as a ring; log2 N for an all-gather; N - 1 for an all-to-all.

The form is checked on real messages: 2, 4 and 8 processes of one core each, talking through Gloo over this machine's
loopback. There everything shares the machine: what counts is the sum of all devices' messages and bytes, and more
processes than cores take turns. Gloo is taken to send around rings, so an all-reduce has 2 (N - 1) hops. Latency,
bandwidth and the cost of a call are fitted to plain collectives on 2 and 4 processes; foretold are other sizes, 8
processes, and rounds of training.

What the model leaves out: stragglers, messages that travel while others compute, switches that several devices share,
links inside a machine, and that an accelerator would compute sooner.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optax
import points
from matplotlib import pyplot
from points import Row
from scale import perceptron, pictures, time_training
from scipy.optimize import nnls
from ways import CODECS, WAYS, Launch, Way, codec_seconds, launches, time_codec

import ctde_jax as ctde
from ctde_jax.cost import traffic
from ctde_jax.cost.targets import compile_rounds
from ctde_jax.data import deal

NAME = "scale_model"
LIMIT = 1200  # seconds for one point
PARAMETERS, BATCH_SIZE = 10_000_000, 64
DEVICES = tuple(2**exponent for exponent in range(3, 13))
COMPILED, COMPILED_AGAIN = 8, 32
TURNS = 3
PROCESSES = (2, 4, 8)
FITTED_PROCESSES, FITTED_SIZES = (2, 4), (2**10, 2**14, 2**18, 2**22)


class Network(NamedTuple):
    """What connects the devices."""

    name: str
    latency: float
    """Seconds from one device's memory to another's for a short message."""

    bandwidth: float
    """Bytes a second that leave a device."""


NETWORKS = (
    Network("10 Gbit/s Ethernet, TCP, 50 µs", 50e-6, 10e9 / 8),
    Network("100 Gbit/s Ethernet, RDMA, 5 µs", 5e-6, 100e9 / 8),
    Network("400 Gbit/s InfiniBand, 2 µs", 2e-6, 400e9 / 8),
)


def count_launches(way: Way, devices: int) -> Row:
    """Compiles rounds on fake devices, and reads their collectives."""
    data, model = pictures(devices * BATCH_SIZE), perceptron(PARAMETERS)
    program = compile_rounds(
        model,
        data,
        ctde.tasks.classification,
        optax.adam(1e-4),
        way.strategy,
        deal(data.train, devices, devices * BATCH_SIZE, seed=0),
        ctde.devices.start(devices),
    )
    return {"launches": launches(traffic.measure(program.as_text(), way.inner_steps))}


def time_alone(inner_steps: int) -> Row:
    """Trains on one device; nothing is sent."""
    dispatch = max(8, inner_steps)
    strategy = Way(inner_steps).strategy
    return time_training(perceptron(PARAMETERS), pictures(10_000), 1, BATCH_SIZE, strategy, dispatch)


def measure_point(point: Row) -> Row:
    """Measures what is asked for."""
    match point["what"]:
        case "launches":
            return count_launches(WAYS[point["way"]], point["devices"])
        case "alone":
            return time_alone(point["inner_steps"])
        case _:
            return time_codec(CODECS[point["codec"]], PARAMETERS)


def wanted() -> list[Row]:
    """Lists what is measured in a process of this script."""
    steps = {way.inner_steps: None for way in WAYS.values()}
    turns = [
        point
        for turn in range(TURNS)
        for point in (
            *({"what": "alone", "inner_steps": inner_steps, "turn": turn} for inner_steps in steps),
            *({"what": "codec", "codec": codec, "turn": turn} for codec in CODECS),
        )
    ]
    compiled = [
        {"what": "launches", "way": name, "devices": devices} for name in WAYS for devices in (COMPILED, COMPILED_AGAIN)
    ]
    return compiled + turns


def known(**says: object) -> list[Row]:
    """Returns the rows that say this, without those that failed."""
    return [row for row in points.known(NAME) if says.items() <= row.items() and "failed" not in row]


def launches_of(name: str, devices: int) -> list[Launch]:
    """Returns the collectives of a round as compiled for so many devices."""
    return [Launch(*one) for one in known(what="launches", way=name, devices=devices)[0]["launches"]]


class Alone(NamedTuple):
    """What a way takes on one device, by the median over the turns, in seconds."""

    step: float
    encode: float
    decode: float

    @classmethod
    def of(cls, way: Way) -> "Alone":
        step = float(np.median([row["step_seconds"][1] for row in known(what="alone", inner_steps=way.inner_steps)]))
        rows = known(what="codec", codec=way.codec) or [{"encode": 0.0, "decode": 0.0}]
        return cls(step, *(float(np.median([row[part] for row in rows])) for part in ("encode", "decode")))


def foretell(name: str, network: Network, devices: int) -> tuple[float, float]:
    """Returns the seconds of a step, and those of it that are neither codec nor exchange."""
    way, alone = WAYS[name], Alone.of(WAYS[name])
    messages = [launch.on(devices) for launch in launches_of(name, COMPILED)]
    exchange = sum(one.hops * network.latency + one.sent / network.bandwidth for one in messages)
    codec = codec_seconds(alone.encode, alone.decode, devices)
    return alone.step + (codec + exchange) / max(1, way.inner_steps), alone.step


class Held(NamedTuple):
    """A measurement beside what the model says of it."""

    what: str
    processes: int
    measured: float
    foretold: float


def check() -> tuple[list[Held], np.ndarray]:
    """Fits the model's three numbers to plain collectives, and foretells what they were not fitted to."""
    measured = known(what="loopback")
    alone = {program["name"]: program for row in measured if row["processes"] == 1 for program in row["programs"]}
    programs = [(row["processes"], program) for row in measured if row["processes"] > 1 for program in row["programs"]]
    cores = measured[0]["cores"]

    def features(processes: int, program: Row) -> np.ndarray:
        messages = [Launch(*one) for one in program["launches"]]
        turns = max(1.0, processes / cores)
        counts = (turns, sum(one.gloo_messages for one in messages), sum(one.sent for one in messages) * processes)
        return np.array(counts)

    plain = [(n, one) for n, one in programs if "size" in one]
    fitted = [(n, one) for n, one in plain if n in FITTED_PROCESSES and one["size"] in FITTED_SIZES]
    seconds = np.array([one["seconds"] for _, one in fitted])
    rows = np.stack([features(n, one) for n, one in fitted])
    numbers, _ = nnls(rows / seconds[:, None], np.ones(len(seconds)))  # relative errors count alike

    held = [
        Held(f"{one['name']}, {one['size']:,} numbers", n, one["seconds"], float(features(n, one) @ numbers))
        for n, one in plain
        if (n, one) not in fitted
    ]
    for n, program in programs:
        if "size" in program:
            continue
        name = program["name"]
        codec = alone.get(WAYS[name].codec, {"encode": 0.0, "decode": 0.0})
        busy = alone[name]["seconds"] + codec_seconds(codec["encode"], codec["decode"], n)
        exchange = float(features(n, program)[1:] @ numbers[1:])
        held.append(Held(f"a round, {name}", n, program["seconds"], busy * max(1, n / cores) + exchange))
    return held, numbers


MODEL_HEADER = ("network", "strategy", *(f"{devices:,} devices" for devices in DEVICES[::3]))
CHECK_HEADER = ("program", "processes", "measured, ms", "foretold, ms", "error")


def report_model() -> None:
    """Prints and writes what steps would take, and draws it."""
    lines = []
    for network in NETWORKS:
        for name in WAYS:
            steps = [foretell(name, network, devices) for devices in DEVICES[::3]]
            lines.append([network.name, name, *(f"{step * 1e3:,.1f} ms, {own / step:.0%}" for step, own in steps)])
    errors = []
    for name in WAYS:
        sent = sum(one.on(COMPILED_AGAIN).sent for one in launches_of(name, COMPILED))
        compiled = sum(one.sent for one in launches_of(name, COMPILED_AGAIN))
        errors.append(f"{name} {sent / compiled - 1:+.2%}")
    alone = Alone.of(Way()).step
    note = (
        f"A step, and the share of it that a device would also take alone: {alone * 1e3:.1f} ms where it is "
        f"synchronous. {PARAMETERS:,} parameters, {BATCH_SIZE} examples a device. Bytes on {COMPILED_AGAIN} devices, "
        f"as foretold from {COMPILED}, to those compiled: {', '.join(errors)}. {points.machine()}."
    )
    points.publish(NAME, "Steps on many devices, as the model has it", MODEL_HEADER, lines, note)

    figure, panels = pyplot.subplots(1, len(NETWORKS), figsize=(14, 4.8), layout="constrained", sharey=True)
    for axes, network in zip(panels, NETWORKS, strict=True):
        for i, name in enumerate(WAYS):
            steps = [foretell(name, network, devices)[0] * 1e3 for devices in DEVICES]
            axes.loglog(DEVICES, steps, color=f"C{i}", marker=".", label=name)
        axes.axhline(alone * 1e3, color="tab:gray", linestyle="--", label="alone, synchronous")
        axes.set(title=network.name, xlabel="devices")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("a step, ms, by the model")
    panels[-1].legend(fontsize=8)
    figure.savefig(points.RESULTS / f"{NAME}.png", dpi=120)


def report_check() -> None:
    """Prints and writes how far the model is from what was measured over loopback."""
    held, (call, latency, byte) = check()
    lines = [
        [
            one.what,
            str(one.processes),
            f"{one.measured * 1e3:,.3f}",
            f"{one.foretold * 1e3:,.3f}",
            f"{one.foretold / one.measured - 1:+.0%}",
        ]
        for one in held
    ]
    off = np.array([max(one.foretold / one.measured, one.measured / one.foretold) for one in held])
    note = (
        f"Fitted: {call * 1e6:.0f} µs a call, {latency * 1e6:.1f} µs a message, {1e-9 / byte if byte else np.inf:.2f} "
        f"GB/s of all processes together. Foretold and measured differ by a factor of {points.quartiles(off)}, "
        f"{off.max():.2f} at most. {points.machine()}."
    )
    points.publish(f"{NAME}_check", "The model beside what it was not fitted to", CHECK_HEADER, lines, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    chosen = points.parse(parser, measure_point)
    if not chosen.report:
        parts = [("rounds", 1), *((part, processes) for processes in PROCESSES for part in ("plain", "rounds"))]
        over_loopback = [{"what": "loopback", "part": part, "processes": processes} for part, processes in parts]
        points.measure(NAME, str(Path(__file__).parent / "loopback.py"), over_loopback, LIMIT)
        points.measure(NAME, __file__, wanted(), LIMIT)
    report_check()
    report_model()


if __name__ == "__main__":
    main()
