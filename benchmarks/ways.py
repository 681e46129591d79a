"""Ways to agree whose time `scale_model.py` foretells: what a round of each launches, encodes and decodes."""

import time
from collections.abc import Callable
from math import ceil, log2
from typing import NamedTuple

import jax
import numpy as np
import optax

import ctde_jax as ctde
from ctde_jax.aggregate import Codec, error_feedback, quantize, two_phase
from ctde_jax.cost import traffic

ROWS = 8
"""Slices in which a codec is timed."""

CODECS: dict[str, Codec] = {"int8": quantize(8), "int4": error_feedback(quantize(4))}


class Way(NamedTuple):
    """A way to agree."""

    inner_steps: int = 0
    codec: str | None = None

    @property
    def strategy(self) -> ctde.Strategy:
        """The mean, or an exchange by way of the owners of slices; between rounds Nesterov momentum."""
        parts = {} if self.codec is None else {"reduce": two_phase(CODECS[self.codec])}
        outer = {"outer": optax.sgd(0.7, momentum=0.9, nesterov=True)} if self.inner_steps else {}
        return ctde.Strategy(self.inner_steps, **parts, **outer)


WAYS = {
    "synchronous, float32": Way(),
    "synchronous, int8": Way(codec="int8"),
    "synchronous, int4": Way(codec="int4"),
    "DiLoCo 16, float32": Way(16),
    "DiLoCo 64, float32": Way(64),
    "DiLoCo 16, int4": Way(16, "int4"),
    "DiLoCo 64, int4": Way(64, "int4"),
}


class Launch(NamedTuple):
    """A collective of a round."""

    op: str
    payload: float
    """Bytes that a device puts in."""

    devices: int
    times: float

    def on(self, devices: int) -> "Launch":
        """Returns it on so many devices: of an all-gather each puts in its share of the result, else everything."""
        share = self.devices / devices if self.op == "all-gather" else 1
        return self._replace(payload=self.payload * share, devices=devices)

    @property
    def sent(self) -> float:
        """Bytes that leave a device."""
        others = self.devices - 1
        shares = {"all-reduce": 2 * others / self.devices, "all-to-all": others / self.devices, "all-gather": others}
        return self.times * self.payload * shares[self.op]

    @property
    def hops(self) -> float:
        """Messages that wait for each other, the best algorithm on a network."""
        doublings = ceil(log2(self.devices))
        one_by_one = {"all-reduce": 2 * doublings, "all-to-all": self.devices - 1, "all-gather": doublings}
        return self.times * one_by_one[self.op]

    @property
    def gloo_messages(self) -> float:
        """Messages of all devices together, around rings."""
        around = {"all-reduce": 2, "all-to-all": 1, "all-gather": 1}[self.op] * (self.devices - 1)
        return self.times * around * self.devices


def launches(counted: traffic.Traffic) -> list[Launch]:
    """Returns the collectives of a round."""
    return [Launch(one.op, one.payload, one.group_size, one.times) for one in counted.collectives]


def time_codec(codec: Codec, numbers: int) -> dict[str, float]:
    """Encodes and decodes so many numbers on one device."""
    shape = (ROWS, codec.block * ceil(numbers / ROWS / codec.block))
    values, key = jax.random.normal(jax.random.key(0), shape), jax.random.key(1)
    encode, decode = jax.jit(codec.encode), jax.jit(codec.decode, static_argnums=1)
    payload, _, state = encode(values, codec.init(shape), key)
    return {
        "encode": median_seconds(lambda: encode(values, state, key)),
        "decode": median_seconds(lambda: decode(payload, shape[1], key)),
    }


def codec_seconds(encode: float, decode: float, devices: int) -> float:
    """Returns what a round of `two_phase` takes: encoded are the message and the own slice, decoded twice as much."""
    return encode * (1 + 1 / devices) + 2 * decode


def median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Returns the median time of a call, after a first one that warms up."""
    times = []
    for _ in range(1 + repeats):
        before = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - before)
    return float(np.median(times[1:]))
