"""What is read from files, and written to files and standard streams; needs the standard library alone."""

from ctde_jax.files import streams
from ctde_jax.files.atomic import bring_to_disk, put_back, written_whole
from ctde_jax.files.reading import are_numbers, finder, number_of, open_regular, read_small
from ctde_jax.files.streams import Screen

__all__ = [
    "Screen",
    "are_numbers",
    "bring_to_disk",
    "finder",
    "number_of",
    "open_regular",
    "put_back",
    "read_small",
    "streams",
    "written_whole",
]
