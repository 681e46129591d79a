"""JAX settings of a notebook or shell do not change training, or are refused by name."""

import jax
import numpy as np
import optax
import pytest

import ctde_jax as ctde
from ctde_jax.errors import InputError

REFUSED = {
    "jax_disable_jit": (True, "False"),
    "jax_numpy_dtype_promotion": ("strict", "standard"),
    "jax_debug_key_reuse": (True, "False"),
    "jax_transfer_guard_host_to_device": ("disallow", "allow"),
    "jax_transfer_guard_device_to_host": ("disallow_explicit", "allow"),
    "jax_transfer_guard_device_to_device": ("disallow", "allow"),
}
HARMLESS = {
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_numpy_rank_promotion": "raise",
    "jax_check_tracer_leaks": True,
    "jax_enable_checks": True,
    "jax_traceback_filtering": "off",
    "jax_log_compiles": False,
    "jax_transfer_guard": "log",
}


@pytest.fixture
def setting():
    """Sets options of JAX, and restores them after the test."""
    before: dict[str, object] = {}

    def update(name: str, value: object) -> None:
        before.setdefault(name, getattr(jax.config, name))
        jax.config.update(name, value)

    yield update
    for name, value in before.items():
        jax.config.update(name, "allow" if value is None else value)


def fit(digits):
    return ctde.fit(
        ctde.models.mlp([64, 8, 10]),
        digits,
        optax.adam(0.01),
        devices=ctde.devices.start(2),
        batch_size=64,
        steps=3,
        show=False,
    )


@pytest.mark.parametrize("name", REFUSED)
def test_incompatible_setting_is_refused_with_the_required_value(digits, setting, name):
    devices, (value, needed) = ctde.devices.start(2), REFUSED[name]
    setting(name, value)
    sentence = (
        f"^{name} must be {needed}, because .*, got {value}; set the environment variable "
        f"{name.upper()}={needed}, or"
    )
    with pytest.raises(InputError, match=sentence):
        ctde.devices.start(2)
    with pytest.raises(InputError, match=sentence):
        ctde.fit(
            ctde.models.mlp([64, 10]),
            digits,
            optax.sgd(0.1),
            devices=devices,
            batch_size=64,
            steps=1,
        )


def test_setting_of_a_context_manager_is_checked(digits):
    with jax.disable_jit(), pytest.raises(InputError, match="jax_disable_jit must be False"):
        fit(digits)


@pytest.mark.slow
def test_harmless_settings_change_no_bit(digits, setting):
    expected = fit(digits)
    for name, value in HARMLESS.items():
        setting(name, value)
    with np.errstate(all="raise"):
        found = fit(digits)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
