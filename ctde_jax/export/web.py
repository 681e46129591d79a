"""A folder of static files in which a browser runs a model: no server but one for files, and no network behind it.

The page is in `page/`. What computes is onnxruntime-web, as npm has it: fetched once by npm, held against the SHA-512
that is pinned here, and kept in the user's cache folder.
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

PACKAGE = "onnxruntime-web@1.30.0"
SHA512 = (
    "ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca"
    "590a5cdc57bb2f35ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61"
)
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""Of the package: what a page imports, what that loads, and the machine code, for one thread or several.

The page has the scripts as `.js`: not every server knows that `.mjs` is a script.
"""

SUMS_OF_RUNTIME = "ort/files.json"
PAGE = ("index.html", "page.css", "page.js", "common.js", "pictures.js", "ink.js", "texts.js")


def check_page(folder: Path, formats: Sequence[str]) -> None:
    """Finds out before an export whether there can be a page of it.

    Raises:
        InputError: The folder has anything but a page in it, there will be no ONNX file, or npm is needed and not here.
    """
    if "onnx" not in formats:
        raise InputError("web", f"needs the format onnx, and --formats are {' '.join(formats)}.")
    if find_spec("jax2onnx") is None:
        raise InputError("web", "needs the format onnx, and so `pip install 'ctde_jax[onnx]'`.")
    if not _kept().exists():
        _find_npm()
    _check_replaceable(folder)


def write_page(bundle: Bundle, folder: Path | str) -> Path:
    """Writes the page for a model whose bundle has an ONNX file.

    Args:
        bundle: Of a model that reads pictures of uint8 or texts.
        folder: Is made; a page that is there already is replaced.

    Returns:
        The folder. A browser must get its files from a server, such as `python -m http.server`.

    Raises:
        InputError: The bundle has no ONNX file, its model reads something else, npm is not there or cannot fetch the
            runtime, or the folder is something else or cannot be written to.
    """
    card, folder = bundle.card, Path(folder)
    if "onnx" not in card.artifacts:
        raise InputError("web", "needs the format onnx, which the bundle does not have.")
    _check_replaceable(folder)
    if not (_reads_pictures(card) or card.predicts == "tokens"):
        reads = f"{card.input_dtype} of the shape {list(card.input_shape)}"
        raise InputError(
            "web",
            f"goes with texts, and with pictures in 1 or 3 channels, and the model reads {reads}.",
        )
    artifact = card.artifacts["onnx"]
    files = [CARD, artifact.file, *([artifact.step] if artifact.step else [])]
    contents = {
        name: (bundle.folder / CARD).read_bytes() if name == CARD else bundle.read(name)
        for name in files
    }
    contents |= {name: (Path(__file__).parent / "page" / name).read_bytes() for name in PAGE}
    runtime = {
        f"ort/{name.replace('.mjs', '.js')}": content for name, content in _runtime().items()
    }
    said = {
        name: {"bytes": len(content), "sha256": sha256(content).hexdigest()}
        for name, content in runtime.items()
    }
    contents |= {**runtime, SUMS_OF_RUNTIME: json.dumps(said, indent=1).encode()}
    try:
        (folder / "ort").mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise InputError(
            "web",
            f"must be a folder that can be written to, and {folder} is none: {error.strerror}.",
        ) from error
    return folder


def _reads_pictures(card: Card) -> bool:
    """Says whether inputs are pictures to draw or show: gray or in color, and no sequence that is long and narrow."""
    height, width, channels = (*card.input_shape, 1, 1, 1)[:3]
    is_picture = (
        card.predicts == "classes"
        and card.input_dtype == "uint8"
        and len(card.input_shape) in (2, 3)
    )
    return is_picture and channels in (1, 3) and max(height, width) <= 2 * min(height, width)


def _runtime() -> dict[str, bytes]:
    """Takes the files of the runtime out of its package, which is fetched where the cache does not have it."""
    kept = _kept()
    if not kept.exists() or sha512(kept.read_bytes()).hexdigest() != SHA512:
        try:
            _fetch(kept)
        except OSError as error:
            raise InputError(
                "web", f"keeps {PACKAGE} in {kept.parent}, which failed: {error.strerror}."
            ) from error
    with tarfile.open(fileobj=io.BytesIO(kept.read_bytes())) as package:
        members = {name: package.extractfile(f"package/dist/{name}") for name in RUNTIME}
        return {name: member.read() for name, member in members.items() if member}


def _check_replaceable(folder: Path) -> None:
    """Lets nothing be replaced but a page."""
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
            f"must be new, empty, or a page that was written before, and {folder} is none of these.",
        )


def _find_npm() -> str:
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(
            "web",
            f"needs npm, of https://nodejs.org, to fetch {PACKAGE} once; it is not installed here.",
        )
    return npm


def _kept() -> Path:
    return user_cache_path("ctde_jax") / "npm" / f"{PACKAGE.replace('@', '-')}.tgz"


def _fetch(kept: Path) -> None:
    """Lets npm fetch the package, and keeps it if it is the one that is pinned."""
    npm = _find_npm()
    kept.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        done = subprocess.run([npm, "pack", PACKAGE], cwd=folder, capture_output=True, text=True)
        (fetched,) = list(Path(folder).glob("*.tgz")) or [None]
        if done.returncode or fetched is None:
            raise InputError(
                "web", f"needs {PACKAGE}, which npm could not fetch: {_reason(done.stderr)}."
            )
        content = fetched.read_bytes()
    if sha512(content).hexdigest() != SHA512:
        raise InputError(
            "web", f"needs {PACKAGE} as it was published, and what npm fetched has another SHA-512."
        )
    new = kept.with_suffix(".new")
    new.write_bytes(content)
    new.replace(kept)


def _reason(said: str) -> str:
    """Finds npm's reason among its lines: a sentence, which neither its code nor the place of its log is."""
    lines = [
        line.removeprefix("npm error").strip()
        for line in said.splitlines()
        if line.startswith("npm error")
    ]
    reasons = [
        line for line in lines if len(line.split()) > 3 and not line.startswith("A complete log")
    ]
    return next(iter(reasons), "it did not say why").rstrip(".")
