"""Networks, and the two doors through which a network of the user's own comes in."""

from ctde_jax.models.base import Model, count_params, from_linen, from_nnx, in_bfloat16, with_raw_inputs
from ctde_jax.models.mlp import MLP, mlp

__all__ = ["MLP", "Model", "count_params", "from_linen", "from_nnx", "in_bfloat16", "mlp", "with_raw_inputs"]
