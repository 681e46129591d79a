"""Downloads of published files, from any mirror, verified by their checksum.

Received bytes stay in `<target>.part`, so a download resumes after a broken connection.
The checksum is that of the decompressed content, which does not depend on a mirror's compression.
Only an archive, `.tar.gz`, is verified and read as it is.
"""

import gzip
import hashlib
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ctde_jax.bundle import open_regular
from ctde_jax.errors import InputError

BLOCK = 1 << 16
# Attempts to resume a broken connection, for each mirror.
RESUMES = 5
PART = ".part"

Report = Callable[[int, int | None], None]
"""`report(received, total)` shows the progress in bytes; `total` is None if unknown."""


def fetch(urls: Sequence[str], target: Path, sha256: str, timeout: float = 30.0) -> Path:
    """Downloads a file unless it exists, and returns its path.

    Args:
        urls: URLs of the file at several mirrors, tried in order.
        target: Path of the file; it appears there complete and verified, or not at all.
        sha256: Checksum of the file's decompressed content, or of an archive as it is.
        timeout: Seconds within which a mirror has to respond, and then to send each further 64 KiB.

    Raises:
        InputError: If no mirror provides the file, or its folder is not writable.
    """
    part = target.with_name(target.name + PART)
    reasons = []
    try:
        # Try the mirrors in order; the file only gets its name when it is verified.
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _progress(target.name) as report:
            for url in urls:
                try:
                    _fetch_verified(url, part, sha256, timeout, report)
                    # `replace` is atomic, so the target is never incomplete.
                    os.replace(part, target)
                    return target
                except _MirrorFailed as failure:
                    reasons.append(f"{url} {failure}")
    except OSError as error:
        raise InputError(
            "data_dir",
            f"must be a writable folder with enough free space, got {target.parent} "
            f"({error.strerror or error}); pass another folder.",
        ) from error

    # No mirror provided the file.
    raise InputError(
        "data_dir",
        f"has no {target.name}, and it could not be downloaded: {'; '.join(reasons)}. "
        f"Copy the file to {target.parent}, or pass a folder that contains it.",
    )


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of the content of a file, decompressed as by `content_of`."""
    digest = hashlib.sha256()
    for block in content_of(path):
        digest.update(block)
    return digest.hexdigest()


def content_of(path: Path) -> Iterator[bytes]:
    """Yields the content of a file in blocks, decompressed if its name ends in .gz but not .tar.gz.

    Raises:
        InputError: If the file cannot be read, or is incomplete.
    """
    # The name of the target determines the compression, also of a partial file.
    name = path.name.removesuffix(PART)
    packed = name.endswith(".gz") and not name.endswith(".tar.gz")
    try:
        with (
            open_regular(path) as stored,
            gzip.open(stored) if packed else nullcontext(stored) as file,
        ):
            while block := file.read(BLOCK):
                yield block
    except EOFError as error:
        raise damaged(path, "is a truncated gzip file") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise damaged(path, f"is a corrupt gzip file ({error})") from error
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror or error})") from error


def existing(paths: Iterable[Path]) -> Path | None:
    """Returns the first of these paths that is a regular file, or None if none exists.

    Raises:
        InputError: If a path exists but none is a regular file, such as a folder of that name.
    """
    there = [path for path in paths if os.path.lexists(path)]
    found = next((path for path in there if os.path.isfile(path)), None)
    if there and found is None:
        # Opening it raises an error with the reason.
        try:
            open_regular(there[0]).close()
        except OSError as error:
            raise damaged(there[0], f"cannot be read ({error.strerror})") from error
    return found


def damaged(path: Path, fault: str) -> InputError:
    """Returns the InputError for a file of the data folder; `fault` is a predicate of the file."""
    way_out = "replace it, or remove it to download the published file"
    return InputError("data_dir", f"contains {path}, which {fault}; {way_out}.")


class _MirrorFailed(Exception):
    """Raised if a mirror does not provide the file; the message is a predicate of its URL."""


class _BrokeOff(_MirrorFailed):
    """Raised if a connection breaks off; the download can be resumed from the same mirror."""


def _fetch_verified(url: str, part: Path, sha256: str, timeout: float, report: Report) -> None:
    inherited = part.exists()
    _complete(url, part, timeout, report)
    if _matches(part, sha256):
        return
    part.unlink()
    if not inherited:
        raise _MirrorFailed("sent a different file (the checksum differs)")
    # Bytes from an earlier download may be wrong, so try once more without them.
    _fetch_verified(url, part, sha256, timeout, report)


def _matches(part: Path, sha256: str) -> bool:
    try:
        return sha256_of(part) == sha256
    except InputError:
        return False


def _complete(url: str, part: Path, timeout: float, report: Report) -> None:
    # Resume only as long as each attempt adds to the file.
    for resumes_left in reversed(range(RESUMES + 1)):
        before = _size(part)
        try:
            return _append(url, part, timeout, report)
        except _BrokeOff:
            if not resumes_left or _size(part) <= before:
                raise


def _append(url: str, part: Path, timeout: float, report: Report) -> None:
    response, start = _answer(url, _size(part), timeout)
    total = None if response.length is None else start + response.length
    # If the mirror ignored the range, the partial file is overwritten.
    with response, part.open("ab" if start else "wb") as file:
        for piece in _pieces(response, timeout):
            file.write(piece)
            report(file.tell(), total)
    if total is not None and _size(part) < total:
        raise _BrokeOff(f"closed the connection after {_size(part):,} of {total:,} bytes")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _answer(url: str, start: int, timeout: float) -> tuple[HTTPResponse, int]:
    """Requests the bytes from `start` on; returns the response and its offset, `start` or 0."""
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urlopen(request, timeout=timeout)
    except HTTPError as error:
        error.close()
        # 416: the range is not satisfiable, because `start` is beyond the end of the file.
        if error.code == 416 and start:
            return _answer(url, 0, timeout)
        raise _MirrorFailed(f"returned {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, TimeoutError):
            raise _MirrorFailed(f"did not respond within {timeout:g} s") from error
        raise _MirrorFailed(f"could not be reached ({reason})") from error
    # A mirror may ignore the range and send the whole file.
    if response.status != 206:
        return response, 0
    # 206: the response must start at the requested byte, else request the whole file.
    if response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        return response, start
    response.close()
    if start:
        return _answer(url, 0, timeout)
    raise _MirrorFailed("sent a different part of the file than requested")


def _pieces(response: HTTPResponse, timeout: float) -> Iterator[bytes]:
    """Yields the received bytes.

    Raises:
        _MirrorFailed: If fewer than `BLOCK` bytes arrive within `timeout` seconds.
        _BrokeOff: If the connection breaks off.
    """
    # The timeout of the socket alone would accept a mirror that sends a byte from time to time.
    arrived = 0
    deadline = time.monotonic() + timeout
    try:
        while piece := response.read1(BLOCK):
            yield piece
            arrived += len(piece)
            if arrived >= BLOCK:
                arrived = 0
                deadline = time.monotonic() + timeout
            elif time.monotonic() > deadline:
                raise TimeoutError
    except TimeoutError as error:
        raise _MirrorFailed(f"sent less than {BLOCK:,} bytes within {timeout:g} s") from error
    except (OSError, HTTPException) as error:
        raise _BrokeOff(f"closed the connection ({error})") from error


@contextmanager
def _progress(name: str) -> Iterator[Report]:
    # Without a terminal, one line instead of a progress bar.
    if not sys.stderr.isatty():
        print(f"Downloading {name}", file=sys.stderr)
        yield lambda here, total: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(f"Downloading {name}", total=None)
        yield lambda here, total: bars.update(bar, completed=here, total=total)
