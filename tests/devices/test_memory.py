"""Training that exceeds the memory is refused with both sizes; training that fits is not."""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import ctde_jax as ctde
from ctde_jax.devices import memory
from ctde_jax.errors import InputError
from ctde_jax.rounds import state

MODEL = ctde.models.mlp([64, 32, 10])
PARAMS = 64 * 32 + 32 + 32 * 10 + 10


def with_memory(monkeypatch, size: int) -> None:
    monkeypatch.setattr(memory, "of_this_machine", lambda: size)


def test_memory_of_the_machine_is_at_most_that_of_proc_meminfo():
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = sum(1024 * int(lines[name].split()[0]) for name in ("MemTotal", "SwapTotal"))
    assert 0 < memory.of_this_machine() <= total


def test_limit_of_a_container_is_respected(tmp_path, monkeypatch):
    (tmp_path / "v2").write_text("123456\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(
        memory, "_LIMITS", (str(tmp_path / "none"), str(tmp_path / "v2"), str(tmp_path / "absent"))
    )
    assert memory.of_this_machine() == 123456


@pytest.mark.parametrize("replicas", [1, 4])
def test_state_of_adam_takes_three_times_the_parameters(replicas):
    params, model_state = jax.eval_shape(
        MODEL.init, jax.random.key(0), np.zeros((1, 64), np.float32)
    )
    like = state.like_created(params, model_state, optax.adam(0.1), ctde.Strategy(), replicas)
    counters = 4 + 4  # the step counters of the state and of Adam
    assert memory.size_of(params) == 4 * PARAMS
    assert memory.size_of(like) == replicas * (3 * 4 * PARAMS + counters)


@pytest.mark.slow
def test_training_is_refused_only_if_it_exceeds_the_memory(digits, monkeypatch):
    """Four replicas of parameters, two moments and gradients: 16 bytes per parameter."""
    needed = 4 * (16 * PARAMS + 8)
    devices = ctde.devices.start(4)
    fit = {"devices": devices, "batch_size": 64, "steps": 1, "show": False}
    with_memory(monkeypatch, needed - 1)
    rule = (
        f"model must fit into memory: {PARAMS:,} parameters, .* on 4 CPU devices take at least .* "
        "kB"
    )
    with pytest.raises(InputError, match=rule):
        ctde.fit(MODEL, digits, optax.adam(0.01), **fit)
    with_memory(monkeypatch, max(needed, 10**9))
    assert ctde.fit(MODEL, digits, optax.adam(0.01), **fit).step == 1


def test_temporary_arrays_are_counted_before_the_first_step(digits, monkeypatch):
    monkeypatch.setattr(memory, "check_training", lambda *_: None)
    with_memory(monkeypatch, 100)
    with pytest.raises(
        InputError, match="batch_size must fit into memory: the temporary arrays of a step"
    ):
        ctde.fit(
            MODEL,
            digits,
            optax.adam(0.01),
            devices=ctde.devices.start(2),
            batch_size=64,
            steps=1,
            show=False,
        )


def test_overlapping_windows_of_a_text_are_counted_before_they_are_created(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("ab" * 500)
    needed = 2 * 4 * 99 * (900 - 99)  # inputs and labels, int32, of the 900 characters for training
    with_memory(monkeypatch, needed)
    assert len(ctde.data.from_text(tmp_path / "text", 99, 1).train.inputs) == 801
    with_memory(monkeypatch, needed - 1)
    with pytest.raises(
        InputError,
        match=r"window must fit into memory: 801 training windows take at least 634\.4 kB",
    ):
        ctde.data.from_text(tmp_path / "text", 99, 1)
