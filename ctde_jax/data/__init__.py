"""Data sets, their partition over replicas, and the order of the examples."""

from ctde_jax.data import augment, partition
from ctde_jax.data.arrays import plain, targets_or_classes
from ctde_jax.data.augment import Augment, apply_to
from ctde_jax.data.batches import (
    Batches,
    count_steps,
    deal,
    deal_part,
    filled_up,
    index_blocks,
    steps_per_epoch,
)
from ctde_jax.data.classes import look_up
from ctde_jax.data.dataset import (
    Dataset,
    folds,
    from_arrays,
    hold_out,
    is_channels_first,
    moments,
    standardized,
    weighted,
)
from ctde_jax.data.digests import digest, digests_of, digests_of_conversion
from ctde_jax.data.disk import DiskArray, slices
from ctde_jax.data.files import from_npz
from ctde_jax.data.folder import from_folder
from ctde_jax.data.huggingface import from_huggingface
from ctde_jax.data.loader import from_batches
from ctde_jax.data.meaning import Meaning, with_meaning
from ctde_jax.data.published.cifar import cifar10
from ctde_jax.data.published.digits import digits
from ctde_jax.data.published.idx import fashion_mnist, mnist
from ctde_jax.data.sequence import as_sequence
from ctde_jax.data.split import Drawn, Split, TrainingSplit, WeightedSplit, take
from ctde_jax.data.stream import Stream, check_size, check_stream
from ctde_jax.data.table import from_table
from ctde_jax.data.text import decode, encode, from_text

__all__ = [
    "Augment",
    "Batches",
    "Dataset",
    "DiskArray",
    "Drawn",
    "Meaning",
    "Split",
    "Stream",
    "TrainingSplit",
    "WeightedSplit",
    "apply_to",
    "as_sequence",
    "augment",
    "check_size",
    "check_stream",
    "cifar10",
    "count_steps",
    "deal",
    "deal_part",
    "decode",
    "digest",
    "digests_of",
    "digests_of_conversion",
    "digits",
    "encode",
    "fashion_mnist",
    "filled_up",
    "folds",
    "from_arrays",
    "from_batches",
    "from_folder",
    "from_huggingface",
    "from_npz",
    "from_table",
    "from_text",
    "hold_out",
    "index_blocks",
    "is_channels_first",
    "look_up",
    "mnist",
    "moments",
    "partition",
    "plain",
    "slices",
    "standardized",
    "steps_per_epoch",
    "take",
    "targets_or_classes",
    "weighted",
    "with_meaning",
]
