"""CIFAR-10 in its binary version: records of one byte for the label and 3,072 for the image.

Files that are already in the folder are used as they are. Missing files are read from the published
archive, which is downloaded if it is missing, too. Nothing is unpacked to the disk.
"""

import gzip
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from rich.filesize import decimal

from ctde_jax.data.dataset import Dataset, from_arrays
from ctde_jax.data.disk import most_unpacked
from ctde_jax.data.published.download import content_of, damaged, existing, fetch
from ctde_jax.data.published.registry import Published
from ctde_jax.data.split import Split
from ctde_jax.errors import shortened

CHANNELS_FIRST = (3, 32, 32)
# One byte for the label, then the red, green and blue pixels of the image.
RECORD = 1 + 3 * 32 * 32
UNPACKED = "cifar-10-batches-bin"
ARCHIVE = "cifar-10-binary.tar.gz"
ARCHIVE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"

CIFAR10 = Published(
    name="cifar10",
    classes=(
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
    mirrors=(
        "https://www.cs.toronto.edu/~kriz/",
        "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
        "https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/",
    ),
    sha256={
        "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
        "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    },
)


def cifar10(data_dir: Path | str | None = None) -> Dataset:
    """Loads the small color photographs of Krizhevsky (2009), `uint8[examples, 32, 32, 3]`.

    There are 50,000 training and 10,000 test images in 10 classes, with labels `int32[examples]`.

    Args:
        data_dir: Existing folder with the binary files, or with their archive; by default the
            user's cache folder. The archive is downloaded into it if files are missing.

    Raises:
        InputError: If there is no such folder, a file in it is damaged, or the archive is missing
            and no mirror provides it.

    Examples:
        >>> data = ctde.data.cifar10()  # doctest: +SKIP
    """
    folder = CIFAR10.folder(data_dir)
    # Local files come first, the archive fills in for the others.
    paths = {name: path for name in CIFAR10.sha256 if (path := _local(folder, name))}
    contents = {name: b"".join(content_of(path)) for name, path in paths.items()}
    missing = [name for name in CIFAR10.sha256 if name not in paths]
    if missing:
        archive = fetch(
            [mirror + ARCHIVE for mirror in CIFAR10.mirrors], folder / ARCHIVE, ARCHIVE_SHA256
        )
        contents |= _members(archive, missing)
        paths |= dict.fromkeys(missing, archive)

    # The files are listed in order, the test file last.
    *train, test = (_split(name, contents[name], paths[name]) for name in CIFAR10.sha256)
    inputs, labels = map(np.concatenate, zip(*train, strict=True))
    dataset = from_arrays(inputs, labels, *test, name=CIFAR10.name, classes=CIFAR10.classes)
    return replace(dataset, notes=CIFAR10.notes(folder, contents))


def _local(folder: Path, name: str) -> Path | None:
    return existing((folder / name, folder / UNPACKED / name))


def _members(archive: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Reads the files with these names from any folder of an archive.

    Raises:
        InputError: If the archive is damaged or lacks a file.
    """
    contents = {}
    try:
        with _Unpacked(archive) as unpacked, tarfile.open(fileobj=unpacked, mode="r:") as members:
            for member in members:
                name = PurePosixPath(member.name).name
                # A header may announce more than an archive of this size can contain.
                if name in names and member.size > most_unpacked(archive.stat().st_size):
                    raise damaged(
                        archive,
                        f"lists {name} with {decimal(member.size)}, more than it can contain",
                    )
                if name in names and member.isfile() and (file := members.extractfile(member)):
                    contents[name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise damaged(
            archive, f"is not a complete .tar.gz archive ({shortened(str(error))})"
        ) from error
    missing = [name for name in names if name not in contents]
    if missing:
        raise damaged(archive, f"lacks {', '.join(missing)}")
    return contents


class _Unpacked(gzip.GzipFile):
    """A gzip archive in which a single read is limited to the maximum decompressed size.

    That is `most_unpacked` of its compressed size.
    """

    def __init__(self, archive: Path):
        super().__init__(archive, "rb")
        self._most = most_unpacked(archive.stat().st_size)

    def read(self, size: int | None = -1) -> bytes:
        # tarfile reads as many bytes as a header announces, which could fill the memory.
        if size is not None and size > self._most:
            raise EOFError(f"a header announces {decimal(size)}")
        return super().read(size)


def _split(name: str, content: bytes, path: Path) -> Split:
    where = "" if path.name == name else f" in {name}"
    if not content or len(content) % RECORD:
        raise damaged(
            path, f"has {len(content):,} bytes{where} instead of one or more records of {RECORD:,}"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    labels = records[:, 0]
    pictures = records[:, 1:].reshape(-1, *CHANNELS_FIRST)
    if labels.max() >= len(CIFAR10.classes):
        fault = f"has the label {labels.max()}{where} in record {labels.argmax()}"
        raise damaged(path, f"{fault}, but labels are from 0 to {len(CIFAR10.classes) - 1}")
    # The networks take channels last.
    return Split(np.ascontiguousarray(np.moveaxis(pictures, 1, -1)), labels)
