"""Data sets, who keeps which examples, and who sees them when."""

from ctde_jax.data import partition
from ctde_jax.data.batches import Batches, count_steps, deal, dispatches, steps_per_epoch
from ctde_jax.data.dataset import Dataset, Split, from_arrays, standardized
from ctde_jax.data.digits import digits
from ctde_jax.data.files import from_csv, from_npz
from ctde_jax.data.idx import fashion_mnist, mnist

__all__ = [
    "Batches",
    "Dataset",
    "Split",
    "count_steps",
    "deal",
    "digits",
    "dispatches",
    "fashion_mnist",
    "from_arrays",
    "from_csv",
    "from_npz",
    "mnist",
    "partition",
    "standardized",
    "steps_per_epoch",
]
