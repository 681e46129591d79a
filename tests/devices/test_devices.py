"""Fake CPU devices start in any state of JAX, and survive long runs."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from ctde_jax import devices
from ctde_jax.errors import InputError

LOOP = """
step = jax.pmap(lambda x: jax.lax.pmean(x, "replica") * 1.0001, axis_name="replica", \
donate_argnums=0)
x = jnp.ones((COUNT, 1000))
for _ in range(2000):
    x = step(x)
assert jnp.isfinite(x).all()
print("survived on", len(x), "devices")
"""


def run(program: str, **environment: str) -> str:
    """Runs a program in a new process, in which JAX has not started yet."""
    clean = {
        name: value for name, value in os.environ.items() if name not in ("NPROC", "XLA_FLAGS")
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**clean, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_fake_devices_survive_two_thousand_asynchronous_steps(count):
    start = f"import jax, jax.numpy as jnp, ctde_jax; COUNT = len(ctde_jax.devices.start({count}))"
    assert f"survived on {count} devices" in run(start + LOOP)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_fake_devices_survive_two_thousand_asynchronous_rounds(count):
    """One training round per dispatch; nothing is fetched before the end."""
    program = f"""
import ctde_jax, jax, numpy as np, optax
from ctde_jax.devices import replica
from ctde_jax.rounds import state
from ctde_jax.rounds.gradient import make_gradient
from ctde_jax.rounds.round import parallel_rounds
from ctde_jax.models.tasks import classification
devices = ctde_jax.devices.start({count})
train = ctde_jax.data.digits().train
model, optimizer, strategy = \
ctde_jax.models.mlp([64, 128, 10]), optax.adam(0.01), ctde_jax.Strategy()
params, model_state = model.init(jax.random.key(0), train.inputs[:1])
here = state.place(params, model_state, optimizer, strategy, devices)
train_rounds = \
parallel_rounds(make_gradient(model, classification), optimizer, strategy, devices, None)
indices = np.arange({count} * 8, dtype=np.int32).reshape({count}, 1, 1, 8)
split, key = replica.replicate((train, jax.random.key(1)), devices)
batches = replica.shard(indices, devices)
for _ in range(2000):
    here, sums = train_rounds(here, split, batches, np.int32(0), np.int32(1), key)
print("survived", int(here.step), "rounds")
"""
    assert run(program) == "survived 2000 rounds\n"


@pytest.mark.slow
def test_second_start_loads_programs_from_the_cache(monkeypatch, tmp_path):
    """The cache is in the user's cache folder, or in the folder that JAX is configured with."""
    program = """
import ctde_jax, jax
ctde_jax.devices.start(2)
found = []
jax.monitoring.register_event_listener(lambda event, **facts: found.append(event.split("/")[-1]))
jax.jit(lambda x: x * 2 + 1)(3.0)
print(jax.config.jax_compilation_cache_dir, "cache_hits" in found)
"""
    custom = str(tmp_path / "own")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    starts = [run(program).split() for _ in range(2)]

    assert [start[1] for start in starts] == ["False", "True"]
    assert starts[0][0].startswith(str(tmp_path / "ctde_jax" / "programs"))
    assert run(program, JAX_COMPILATION_CACHE_DIR=custom).split()[0] == custom


def test_running_backend_is_restarted():
    """A notebook may have used JAX before; its arrays stay readable."""
    program = """
import jax, jax.numpy as jnp
old = jnp.arange(3.0)
assert len(jax.devices()) == 1
import ctde_jax
COUNT = len(ctde_jax.devices.start(8))
assert old.sum() == 3
"""
    assert "survived on 8 devices" in run(program + LOOP)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "environment"),
    [
        ("", {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "NPROC": "2"}),
        ("import jax; jax.config.update('jax_num_cpu_devices', 4)", {}),
    ],
    ids=["by XLA_FLAGS", "by jax_num_cpu_devices"],
)
def test_backend_with_too_few_threads_is_restarted(before, environment):
    program = """
import jax, jax.numpy as jnp
assert len(jax.devices()) == 4
import ctde_jax
COUNT = len(ctde_jax.devices.start(4))
"""
    assert "survived on 4 devices" in run(before + program + LOOP, **environment)


def test_default_without_accelerators_is_one_cpu_device_or_four_in_commands():
    program = """
from ctde_jax import devices
print(len(devices.start()), len(devices.start(cpu_devices=devices.FAKE_DEVICES)), \
len(devices.start(2, 4)))
"""
    assert run(program) == "1 4 2\n"


@pytest.mark.slow
def test_fit_without_devices_uses_one_cpu_device():
    program = """
import ctde_jax, optax
model, data = ctde_jax.models.mlp([64, 10]), ctde_jax.data.digits()
print(len(ctde_jax.fit(model, data, optax.sgd(0.1), batch_size=64, steps=1, show=False).devices))
"""
    assert run(program) == "1\n"


def test_importing_the_package_imports_no_jax():
    assert run("import sys, ctde_jax; print('jax' in sys.modules)") == "False\n"


def test_unavailable_platform_is_refused():
    program = """
import jax, ctde_jax
for platform in ("cuda", "gpu", "garbage", "CPU"):
    jax.config.update("jax_platforms", platform)
    try:
        ctde_jax.devices.start(2)
    except ctde_jax.InputError as error:
        print(error)
"""
    lines = run(program).splitlines()
    assert [line.split("got ")[1].split()[0] for line in lines] == [
        "'cuda'",
        "'gpu'",
        "'garbage'",
        "'CPU'",
    ]
    for line in lines:
        assert line.startswith("JAX_PLATFORMS must name a platform that JAX can start here")
        assert line.endswith(
            "set the environment variable JAX_PLATFORMS=cpu to train on fake CPU devices, or "
            "unset it."
        )


@pytest.mark.parametrize("nproc", ["100000", "many", "-1", "0", ""])
def test_devices_start_with_any_value_of_nproc(nproc):
    assert run("import ctde_jax; print(len(ctde_jax.devices.start(2)))", NPROC=nproc) == "2\n"


@pytest.mark.parametrize("count", [1025, 100_000, 2**31 - 1])
def test_more_than_1024_devices_are_refused(count):
    with pytest.raises(InputError, match=f"devices must be at most 1,024, got {count}"):
        devices.start(count)


@pytest.mark.parametrize("count", [0, -1])
def test_less_than_one_device_is_refused(count):
    with pytest.raises(InputError, match=f"devices must be at least 1, got {count}"):
        devices.start(count)


def test_more_accelerators_than_exist_are_refused(monkeypatch):
    """The machine reports two GPUs."""
    gpus = [SimpleNamespace(platform="gpu", id=number, process_index=0) for number in range(2)]
    monkeypatch.setattr(jax, "devices", lambda: gpus)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    assert devices.start() == gpus
    assert devices.start(1) == gpus[:1]
    with pytest.raises(
        InputError, match=r"at most 2, the number of GPU devices .* got 3; .* JAX_PLATFORMS=cpu"
    ):
        devices.start(3)
