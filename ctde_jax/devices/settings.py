"""Rejects JAX settings that make training impossible, before any computation.

Settings come from environment variables such as `JAX_DISABLE_JIT=1`, from `jax.config.update`, or
from context managers.
"""

import jax

from ctde_jax.errors import InputError

_TRANSFERS = "the training transfers batches to the devices and fetches metrics from them"
_NEEDED = {
    "jax_disable_jit": ("False", "programs are compiled before the first step"),
    "jax_numpy_dtype_promotion": ("standard", "optax mixes dtypes"),
    "jax_debug_key_reuse": ("False", "the key of a step is used for every part of its batch"),
    "jax_transfer_guard_host_to_device": ("allow", _TRANSFERS),
    "jax_transfer_guard_device_to_host": ("allow", _TRANSFERS),
    "jax_transfer_guard_device_to_device": ("allow", _TRANSFERS),
}
"""Required value of each setting, and the reason."""


def check() -> None:
    """Raises InputError if a JAX setting has a value with which training is impossible."""
    for name, (needed, reason) in _NEEDED.items():
        # None: this version of JAX lacks the setting, or a transfer guard is not set.
        value = getattr(jax.config, name, None)
        given = str(getattr(value, "value", value))
        # A transfer guard of `log` or `log_explicit` forbids nothing.
        is_harmless = (
            value is None or given == needed or (needed == "allow" and "disallow" not in given)
        )
        if not is_harmless:
            raise InputError(
                name,
                f"must be {needed}, because {reason}, got {given}; set the environment variable "
                f"{name.upper()}={needed}, or call jax.config.update({name!r}, {_python(needed)}).",
            )


def _python(value: str) -> str:
    return "False" if value == "False" else repr(value)
