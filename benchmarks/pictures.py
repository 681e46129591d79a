"""Compares training on pictures that stay in a file with training on pictures in memory.

    python benchmarks/pictures.py                        # a minute on a quiet machine
    python benchmarks/pictures.py --turns 3 --pictures 2000

The script writes JPEG files of 32 x 32 pixels in color to a temporary folder, one folder for each
of 10 classes. `from_folder` decodes them once into a file in the cache folder, which is timed. Two
contestants then train the CNN on this file in turns: one holds all pixels on the device, as below a
gigabyte, the other reads each batch from the file, as from a gigabyte on. The file is evicted from
the page cache before each turn. A turn is a `fit` of its first 16 steps, which are not counted, and
of the counted steps.
"""

import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import optax
from harness import RESULTS, Log, Table, command_line, machine, publish, spread, take_turns
from PIL import Image

import ctde_jax as ctde
from ctde_jax.data import pictures as decoding

SIDE = 32
CLASSES = 10
BATCH_SIZE = 64
ROW_STEPS = 16  # steps per row of the history
WARM_ROWS = 1
PLACES = {"memory": 2**63, "file": 0}
"""Contestants, with the number of bytes from which pixels stay in their file."""


def write_pictures(folder: Path, count: int) -> None:
    """Writes smooth random pictures, which compress like photographs, and a few for testing."""
    rng = np.random.default_rng(0)
    for split, examples in {"train": count, "test": BATCH_SIZE}.items():
        for number in range(examples):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            place = folder / split / f"class {number % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(place / f"{number}.jpg")


def load(folder: Path, where: str) -> ctde.data.Dataset:
    decoding.STREAMED_FROM = PLACES[where]
    return ctde.data.from_folder(folder)


def train(dataset: ctde.data.Dataset, cache: Path, steps: int) -> float:
    """Returns the seconds of the counted steps of a training."""
    for file in cache.rglob("*.npy"):
        with file.open("rb") as content:
            # Only pages that are written to the disk can be evicted.
            os.fsync(content.fileno())
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    trained = ctde.fit(
        ctde.models.cnn((SIDE, SIDE, 3), CLASSES),
        dataset,
        optax.adam(0.001),
        batch_size=BATCH_SIZE,
        steps=WARM_ROWS * ROW_STEPS + steps,
        log_every=ROW_STEPS,
        show=False,
    )
    rows = [row for row in trained.history if row["split"] == "train"][WARM_ROWS:]
    return sum(row["examples"] / row["examples_per_second"] for row in rows)


def main(pictures: int = 20_000, turns: int = 5, steps: int = 48) -> None:
    """Measures, prints the table, and writes it to results/pictures.md.

    Args:
        pictures: Number of training pictures.
        turns: Number of counted turns of each contestant.
        steps: Number of counted steps in a turn.
    """
    log = Log(RESULTS / "pictures.jsonl")
    size = {"pictures": pictures, "steps": steps}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pictures"
        cache = Path(temporary) / "cache"
        os.environ["XDG_CACHE_HOME"] = str(cache)
        write_pictures(folder, pictures)

        # Decode all pictures, and load them again from the cache.
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            load(folder, "memory")
            seconds.append(round(time.perf_counter() - begin, 2))
        log.put({"contestant": "loading", **size}, decode=seconds[0], cached=seconds[1])

        data = {where: load(folder, where) for where in PLACES}
        assert data["file"].train.is_on_disk > data["memory"].train.is_on_disk
        take_turns(
            log,
            [
                ({"contestant": where, **size}, lambda each=data[where]: train(each, cache, steps))
                for where in PLACES
            ],
            turns,
        )

    # Ratios of the same turn, so that other load on the machine affects both alike.
    in_memory, in_file = (
        np.array(log.find(contestant=where, **size)[0]["seconds"]) for where in PLACES
    )
    examples = steps * BATCH_SIZE
    rows = [
        ("memory", spread(examples / in_memory, ".0f"), "1"),
        ("file", spread(examples / in_file, ".0f"), spread(in_memory / in_file)),
    ]
    [loading] = log.find(contestant="loading", **size)
    versions = f"{machine()}, pillow {version('pillow')}"
    note = (
        f"{pictures:,} JPEG files of {SIDE} x {SIDE} pixels in color: decoded once in "
        f"{loading['decode']:.1f} s, and loaded from the cache in {loading['cached']:.1f} s at the "
        f"next start. The CNN at batch {BATCH_SIZE}, {steps} steps in each of {turns} turns, on "
        f"{jax.devices()[0].device_kind}. Medians with quartiles. {versions}."
    )
    header = ("pixels in", "examples/s", "of the speed in memory, turn by turn")
    publish(RESULTS / "pictures.md", [Table("Pictures in folders", header, rows)], note)


if __name__ == "__main__":
    command_line(main)
