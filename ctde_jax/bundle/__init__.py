"""What a node has of a trained model: a folder that says what it is, and runs with no trainer and no network.

Nothing here imports JAX, unless a node asks for that runtime.
"""

from ctde_jax.bundle.card import Artifact, Bundle, Card, open_bundle
from ctde_jax.bundle.runtimes import RUNTIMES, load, load_step, pick

__all__ = ["RUNTIMES", "Artifact", "Bundle", "Card", "load", "load_step", "open_bundle", "pick"]
