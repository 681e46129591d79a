"""A folder of static files with which a browser runs a model; it needs only a file server.

The source of the page is in `page/`. The runtime is onnxruntime-web: npm fetches it once, the
archive is checked against the SHA-512 pinned here, and stored in the user's cache folder.
"""

import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from hashlib import sha256, sha512
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from platformdirs import user_cache_path

from ctde_jax.bundle import CARD, Bundle, Card
from ctde_jax.errors import InputError

# `npm view onnxruntime-web@VERSION dist.integrity` shows the SHA-512 of a version in base64.
PACKAGE = "onnxruntime-web@1.30.0"
SHA512 = (
    "ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca"
    "590a5cdc57bb2f35ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61"
)
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""Files of the package: the module that the page imports, the module that it loads, and the
WebAssembly binary, for one or more threads.

The page names the modules `.js`, as not every server sends `.mjs` with the media type of a script.
"""

SUMS_OF_RUNTIME = "ort/files.json"
PAGE = ("index.html", "page.css", "page.js", "common.js", "pictures.js", "ink.js", "texts.js")


def check_page(folder: Path, formats: Sequence[str]) -> None:
    """Checks before an export whether a page can be written.

    Args:
        folder: Folder for the page.
        formats: Formats that will be exported.

    Raises:
        InputError: The folder contains files that do not belong to a page, the formats lack "onnx"
            or its packages are not installed, or npm is required and not installed.
    """
    if "onnx" not in formats:
        raise InputError("web", f"requires the format onnx, but --formats are {' '.join(formats)}.")
    if find_spec("jax2onnx") is None:
        raise InputError("web", "requires the format onnx; `pip install 'ctde_jax[onnx]'`.")
    # Only the first page needs npm; later ones find the archive in the cache.
    if not _cached_archive().exists():
        _find_npm()
    _check_replaceable(folder)


def write_page(bundle: Bundle, folder: Path | str) -> Path:
    """Writes the page for a model whose bundle has an ONNX file.

    Args:
        bundle: Bundle of an image classifier for uint8 images or of a language model.
        folder: Folder to create; an existing page in it is replaced.

    Returns:
        The folder. A browser must get its files from a server, such as `python -m http.server`.

    Raises:
        InputError: The bundle has no ONNX file, the page does not support the model's inputs, npm
            is not installed or cannot fetch the runtime, or the folder cannot be written to or
            contains files that do not belong to a page.

    Examples:
        >>> bundle = ctde.open_bundle("bundle")  # doctest: +SKIP
        >>> folder = ctde.write_page(bundle, "page")  # doctest: +SKIP
    """
    # Check the bundle and the folder.
    card = bundle.card
    folder = Path(folder)
    if "onnx" not in card.artifacts:
        raise InputError("web", "requires the format onnx, which the bundle does not contain.")
    _check_replaceable(folder)
    if not (_reads_pictures(card) or card.predicts == "tokens"):
        got = f"inputs of {card.input_dtype} {list(card.input_shape)}"
        raise InputError(
            "web",
            "requires a language model, or a classifier of uint8 images with 1 or 3 channels, got "
            f"{got}.",
        )

    # Card and model. `read` verifies a file against the card; the card itself is read directly.
    artifact = card.artifacts["onnx"]
    files = [CARD, artifact.file, *([artifact.step] if artifact.step else [])]
    contents = {
        name: (bundle.folder / CARD).read_bytes() if name == CARD else bundle.read(name)
        for name in files
    }
    contents |= {name: (Path(__file__).parent / "page" / name).read_bytes() for name in PAGE}

    # Runtime, with the sizes and SHA-256 that the page checks.
    runtime = {
        f"ort/{name.replace('.mjs', '.js')}": content for name, content in _runtime().items()
    }
    sums = {
        name: {"bytes": len(content), "sha256": sha256(content).hexdigest()}
        for name, content in runtime.items()
    }
    contents |= {**runtime, SUMS_OF_RUNTIME: json.dumps(sums, indent=1).encode()}

    # Nothing is written before everything has been read.
    try:
        (folder / "ort").mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise InputError(
            "web",
            f"must be a writable folder, but writing to {folder} failed: {error.strerror}.",
        ) from error
    return folder


def _reads_pictures(card: Card) -> bool:
    """Returns whether the model classifies images: uint8, 1 or 3 channels, sides at most 1:2.

    The limit of the ratio excludes sequences of features.
    """
    # Missing axes have length 1: [height, width] is an image with one channel.
    height, width, channels = (*card.input_shape, 1, 1, 1)[:3]
    is_picture = (
        card.predicts == "classes"
        and card.input_dtype == "uint8"
        and len(card.input_shape) in (2, 3)
    )
    return is_picture and channels in (1, 3) and max(height, width) <= 2 * min(height, width)


def _runtime() -> dict[str, bytes]:
    """Returns the contents of the files of the runtime, from the cached archive or a download.

    Raises:
        InputError: npm is not installed or cannot fetch the archive, or it cannot be cached.
    """
    # A damaged archive is fetched again.
    cached = _cached_archive()
    if not cached.exists() or sha512(cached.read_bytes()).hexdigest() != SHA512:
        try:
            _fetch(cached)
        except OSError as error:
            raise InputError(
                "web", f"cannot cache {PACKAGE} in {cached.parent}: {error.strerror}."
            ) from error

    # Archives of npm have their files below package/.
    with tarfile.open(fileobj=io.BytesIO(cached.read_bytes())) as package:
        members = {name: package.extractfile(f"package/dist/{name}") for name in RUNTIME}
        return {name: member.read() for name, member in members.items() if member}


def _check_replaceable(folder: Path) -> None:
    """Raises InputError unless the folder is new, empty, or a page written before."""
    # A file in place of the folder counts as an unknown name.
    names = (
        {path.name for path in folder.iterdir()}
        if folder.is_dir()
        else {""}
        if folder.exists()
        else set()
    )
    if names and not (
        names <= {*PAGE, CARD, "model.onnx", "step.onnx", "ort"}
        and (folder / SUMS_OF_RUNTIME).exists()
    ):
        raise InputError(
            "web",
            f"must be a new folder, an empty one, or an existing page, got {folder}.",
        )


def _find_npm() -> str:
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(
            "web",
            f"requires npm (https://nodejs.org) to fetch {PACKAGE}, but npm is not installed.",
        )
    return npm


def _cached_archive() -> Path:
    return user_cache_path("ctde_jax") / "npm" / f"{PACKAGE.replace('@', '-')}.tgz"


def _fetch(cached: Path) -> None:
    """Fetches the package with npm, and caches it if its SHA-512 is the pinned one.

    Raises:
        InputError: npm is not installed or fails, or the SHA-512 differs.
        OSError: The archive cannot be written.
    """
    npm = _find_npm()
    cached.parent.mkdir(parents=True, exist_ok=True)

    # `npm pack` downloads the archive without installing it.
    with TemporaryDirectory() as folder:
        done = subprocess.run([npm, "pack", PACKAGE], cwd=folder, capture_output=True, text=True)
        (fetched,) = list(Path(folder).glob("*.tgz")) or [None]
        if done.returncode or fetched is None:
            raise InputError(
                "web", f"requires {PACKAGE}, but npm could not fetch it: {_reason(done.stderr)}."
            )
        content = fetched.read_bytes()
    if sha512(content).hexdigest() != SHA512:
        raise InputError(
            "web", f"requires {PACKAGE}, but the archive that npm fetched has another SHA-512."
        )

    # Atomic, so that an interrupted write leaves no partial archive.
    new = cached.with_suffix(".new")
    new.write_bytes(content)
    new.replace(cached)


def _reason(stderr: str) -> str:
    """Returns the reason for a failure from the standard error of npm.

    This is the text of the first `npm error` line that has more than three words and does not
    contain the path of the log; error codes are shorter. If there is no such line, returns "npm
    gave no reason".
    """
    lines = [
        line.removeprefix("npm error").strip()
        for line in stderr.splitlines()
        if line.startswith("npm error")
    ]
    reasons = [
        line for line in lines if len(line.split()) > 3 and not line.startswith("A complete log")
    ]
    return next(iter(reasons), "npm gave no reason").rstrip(".")
