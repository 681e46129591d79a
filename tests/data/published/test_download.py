"""A downloaded file is complete and verified, whatever its mirrors send, or there is an error."""

import gzip
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from ctde_jax.data.published.download import BLOCK, RESUMES, fetch, sha256_of
from ctde_jax.errors import InputError

CONTENT = np.random.default_rng(0).bytes(3000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PACKED = gzip.compress(CONTENT, mtime=0)
TIMEOUT = 0.3

# Takes the handler, the file, and the start of the requested range.
Behavior = Callable[["Handler", bytes, int | None], None]


class Mirror(ThreadingHTTPServer):
    """A server that answers each request with the next behavior, and repeats the last one."""

    def __init__(self, *behaviors: Behavior, file: bytes = PACKED):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviors, self.file = list(behaviors), file
        self.ranges: list[str | None] = []
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/file.gz"

    def handle_error(self, request, client_address):
        """Ignores clients that disconnect."""


class Handler(BaseHTTPRequestHandler):
    """Passes each request to the mirror's behavior."""

    @property
    def mirror(self) -> Mirror:
        """Returns the server with its type."""
        assert isinstance(self.server, Mirror)
        return self.server

    def do_GET(self):
        """Records the requested range, and calls the next behavior."""
        mirror, requested = self.mirror, self.headers["Range"]
        mirror.ranges.append(requested)
        behavior = mirror.behaviors.pop(0) if len(mirror.behaviors) > 1 else mirror.behaviors[0]
        behavior(
            self,
            mirror.file,
            int(requested.removeprefix("bytes=").removesuffix("-")) if requested else None,
        )

    def head(self, status: int, length: int, **headers: str) -> None:
        """Sends the status line and the headers."""
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, format, *args):
        """Logs nothing."""


def partial(
    handler: Handler, file: bytes, start: int | None, limit: int | None = None, shift: int = 0
) -> None:
    """Answers a range with 206, or 416 beyond the end; sends at most `limit` bytes of it."""
    if start is None:
        handler.head(200, len(file))
    elif start >= len(file):
        return handler.head(416, 0)
    else:
        first = start + shift
        handler.head(
            206, len(file) - first, Content_Range=f"bytes {first}-{len(file) - 1}/{len(file)}"
        )
        file = file[first:]
    handler.wfile.write(file[:limit])


def whole(handler: Handler, file: bytes, start: int | None) -> None:
    """Ignores ranges."""
    partial(handler, file, None)


def breaks_off_after(limit: int) -> Behavior:
    """Announces the whole range and closes the connection early."""
    return lambda handler, file, start: partial(handler, file, start, limit)


def whole_breaks_off_after(limit: int) -> Behavior:
    """Ignores ranges, and breaks off at the same byte every time."""
    return lambda handler, file, start: partial(handler, file, None, limit)


def wrong_range(handler: Handler, file: bytes, start: int | None) -> None:
    """Answers with a range that starts a few bytes late."""
    partial(handler, file, start, shift=7)


def always_partial(handler: Handler, file: bytes, start: int | None) -> None:
    """Answers with a range although none was requested."""
    partial(handler, file, start or 0, shift=7)


def stalls_after(limit: int) -> Behavior:
    """Holds the connection open and sends no more."""

    def stall(handler: Handler, file: bytes, start: int | None) -> None:
        partial(handler, file, start, limit)
        handler.mirror.closing.wait()

    return stall


def trickles(handler: Handler, file: bytes, start: int | None) -> None:
    """Sends single bytes, each well within the timeout."""
    partial(handler, file, start, 10)
    while not handler.mirror.closing.wait(TIMEOUT / 5):
        handler.wfile.write(b"x")


def silent(handler: Handler, file: bytes, start: int | None) -> None:
    """Takes the request and never answers."""
    handler.mirror.closing.wait()


def not_found(handler: Handler, file: bytes, start: int | None) -> None:
    """Answers that there is no such file."""
    handler.head(404, 0)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Mirror]]:
    """Starts mirrors, and stops them after the test."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    mirrors, threads = [], []

    def start(*behaviors: Behavior, file: bytes = PACKED) -> Mirror:
        mirrors.append(Mirror(*behaviors, file=file))
        threads.append(threading.Thread(target=mirrors[-1].serve_forever, args=(0.01,)))
        threads[-1].start()
        return mirrors[-1]

    yield start
    for mirror, thread in zip(mirrors, threads, strict=True):
        mirror.closing.set()
        mirror.shutdown()
        thread.join()
        mirror.server_close()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Returns a path in a folder that does not exist yet."""
    return tmp_path / "data" / "file.gz"


def part_of(target: Path) -> Path:
    """Returns the path of the partial file."""
    return target.with_name("file.gz.part")


def write_part(target: Path, arrived: bytes) -> None:
    """Writes the partial file of an earlier run."""
    target.parent.mkdir()
    part_of(target).write_bytes(arrived)


@pytest.mark.parametrize("behavior", [partial, whole])
def test_file_arrives_byte_for_byte(serve, target: Path, behavior: Behavior):
    """The folder is created, and contains only the file."""
    assert fetch([serve(behavior).url], target, SHA256) == target
    assert target.read_bytes() == PACKED
    assert list(target.parent.iterdir()) == [target]


def test_existing_file_is_not_downloaded(serve, target: Path):
    """Its content is not checked, because it is the user's file."""
    mirror = serve(whole)
    target.parent.mkdir()
    target.write_bytes(b"the user's own")

    assert fetch([mirror.url], target, SHA256).read_bytes() == b"the user's own"
    assert mirror.ranges == []


def test_log_gets_one_plain_line(serve, target: Path, capsys: pytest.CaptureFixture[str]):
    """A log does not contain the frames of a progress bar."""
    fetch([serve(whole).url], target, SHA256)
    assert capsys.readouterr().err == "Downloading file.gz\n"


def test_terminal_gets_a_progress_bar(
    serve, target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The bar ends at the size of the download."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fetch([serve(whole).url], target, SHA256)

    assert f"{len(PACKED) / 1000:.1f}/{len(PACKED) / 1000:.1f} kB" in capsys.readouterr().err


def test_broken_connection_is_resumed_at_the_first_missing_byte(serve, target: Path):
    """Every request is for the missing bytes only, and no byte is sent twice."""
    mirror = serve(breaks_off_after(1000))

    assert fetch([mirror.url], target, SHA256).read_bytes() == PACKED
    assert mirror.ranges == [None, "bytes=1000-", "bytes=2000-", "bytes=3000-"]


def test_download_is_restarted_after_a_wrong_range(serve, target: Path):
    """Bytes of another range are discarded, so one mirror is enough."""
    mirror = serve(breaks_off_after(1000), wrong_range, partial)

    assert fetch([mirror.url], target, SHA256).read_bytes() == PACKED
    assert mirror.ranges == [None, "bytes=1000-", None]


def test_mirror_without_ranges_is_left_when_it_makes_no_progress(serve, target: Path):
    """A restart gets no further than before, so the next mirror is used."""
    broken, good = serve(whole_breaks_off_after(1000)), serve(partial)

    assert fetch([broken.url, good.url], target, SHA256).read_bytes() == PACKED
    assert broken.ranges == [None, "bytes=1000-"]
    assert good.ranges == ["bytes=1000-"]


def test_mirror_that_keeps_breaking_off_is_left(serve, target: Path):
    """The number of resumptions is limited, even if each makes progress."""
    broken, good = serve(breaks_off_after(10)), serve(partial)

    assert fetch([broken.url, good.url], target, SHA256).read_bytes() == PACKED
    assert len(broken.ranges) == 1 + RESUMES
    assert good.ranges == [f"bytes={10 * (1 + RESUMES)}-"]


def test_part_of_an_earlier_run_is_resumed(serve, target: Path):
    """Only the missing bytes are requested."""
    mirror = serve(partial)
    write_part(target, PACKED[:1234])

    assert fetch([mirror.url], target, SHA256).read_bytes() == PACKED
    assert mirror.ranges == ["bytes=1234-"]


@pytest.mark.parametrize(
    ("behavior", "arrived", "ranges"),
    [
        pytest.param(whole, PACKED[:100], ["bytes=100-"], id="200 instead of 206"),
        pytest.param(partial, PACKED + b"more", [f"bytes={len(PACKED) + 4}-", None], id="416"),
        pytest.param(wrong_range, PACKED[:100], ["bytes=100-", None], id="206 of another range"),
        pytest.param(partial, b"something else", ["bytes=14-", None], id="wrong part"),
    ],
)
def test_download_is_restarted_if_the_part_cannot_be_resumed(
    serve, target: Path, behavior: Behavior, arrived: bytes, ranges: list[str | None]
):
    """One mirror is enough to recover from an unusable part."""
    mirror = serve(behavior)
    write_part(target, arrived)

    assert fetch([mirror.url], target, SHA256).read_bytes() == PACKED
    assert mirror.ranges == ranges


@pytest.mark.parametrize(
    "wrong", [gzip.compress(b"wrong", mtime=0), b"<html>no gzip</html>", PACKED[:-9], b""]
)
def test_wrong_content_is_discarded_for_the_next_mirror(serve, target: Path, wrong: bytes):
    """The whole file is requested from the next mirror."""
    bad, good = serve(whole, file=wrong), serve(partial)

    assert fetch([bad.url, good.url], target, SHA256).read_bytes() == PACKED
    assert good.ranges == [None]


@pytest.mark.parametrize("behavior", [stalls_after(1000), trickles, silent])
def test_mirror_that_stalls_is_left_after_the_timeout(serve, target: Path, behavior: Behavior):
    """It gets one request, and the next mirror sends the file."""
    slow, good = serve(behavior), serve(partial)
    start = time.monotonic()

    assert fetch([slow.url, good.url], target, SHA256, timeout=TIMEOUT).read_bytes() == PACKED
    assert time.monotonic() - start >= TIMEOUT
    assert slow.ranges == [None]


def test_bytes_of_a_stalled_mirror_are_kept(serve, target: Path):
    """The next mirror sends only the rest."""
    slow, good = serve(stalls_after(1000)), serve(partial)
    fetch([slow.url, good.url], target, SHA256, timeout=TIMEOUT)
    assert good.ranges == ["bytes=1000-"]


def test_failure_names_every_mirror_with_its_reason_and_the_solution(serve, target: Path):
    """The error lists the mirrors and the manual download."""
    gone = Mirror(whole)
    gone.server_close()
    mirrors = {
        serve(not_found).url: "returned 404 Not Found",
        serve(
            whole, file=gzip.compress(b"wrong", mtime=0)
        ).url: "sent a different file (the checksum differs)",
        serve(always_partial).url: "sent a different part of the file than requested",
        serve(silent).url: "did not respond within 0.3 s",
        serve(trickles).url: f"sent less than {BLOCK:,} bytes within 0.3 s",
        serve(
            whole_breaks_off_after(5)
        ).url: f"closed the connection after 5 of {len(PACKED):,} bytes",
        gone.url: "could not be reached",
    }
    with pytest.raises(InputError) as caught:
        fetch(list(mirrors), target, SHA256, timeout=TIMEOUT)

    sentence = str(caught.value)
    assert sentence.startswith("data_dir has no file.gz, and it could not be downloaded: ")
    for url, reason in mirrors.items():
        assert f"{url} {reason}" in sentence
    assert sentence.endswith(
        f"Copy the file to {target.parent}, or pass a folder that contains it."
    )


@pytest.mark.parametrize(
    ("behavior", "kept"),
    [(stalls_after(1000), PACKED[:1000]), (whole_breaks_off_after(5), PACKED[:5])],
)
def test_failure_leaves_the_part_and_no_target(
    serve, target: Path, behavior: Behavior, kept: bytes
):
    """If the target exists, it is complete."""
    with pytest.raises(InputError):
        fetch([serve(behavior).url], target, SHA256, timeout=TIMEOUT)

    assert list(target.parent.iterdir()) == [part_of(target)]
    assert part_of(target).read_bytes() == kept


def test_wrong_content_leaves_no_file(serve, target: Path):
    """Wrong content is not kept as a part."""
    with pytest.raises(InputError):
        fetch([serve(whole, file=gzip.compress(b"wrong", mtime=0)).url], target, SHA256)
    assert list(target.parent.iterdir()) == []


def test_unwritable_folder_is_refused(serve, target: Path):
    """Nothing is requested if it cannot be stored."""
    target.parent.write_text("a file where the folder should be")
    mirror = serve(whole)

    with pytest.raises(
        InputError, match="data_dir must be a writable folder with enough free space"
    ) as caught:
        fetch([mirror.url], target, SHA256)

    assert str(target.parent) in str(caught.value)
    assert "pass another folder" in str(caught.value)
    assert mirror.ranges == []


def test_checksum_is_that_of_the_decompressed_content(tmp_path: Path):
    """The name determines whether a file is decompressed."""
    (tmp_path / "plain").write_bytes(CONTENT)
    (tmp_path / "packed.gz").write_bytes(PACKED)
    (tmp_path / "packed").write_bytes(PACKED)

    assert sha256_of(tmp_path / "plain") == sha256_of(tmp_path / "packed.gz") == SHA256
    assert sha256_of(tmp_path / "packed") == hashlib.sha256(PACKED).hexdigest()


@pytest.mark.parametrize(
    ("stored", "fault"),
    [
        pytest.param(PACKED[:-100], "is a truncated gzip file", id="truncated"),
        pytest.param(b"\0" + PACKED[1:], "is a corrupt gzip file", id="corrupt start"),
        pytest.param(
            PACKED[:20] + b"\xff" * 40 + PACKED[60:], "is a corrupt gzip file", id="corrupt middle"
        ),
        pytest.param(PACKED[:-8] + bytes(8), "is a corrupt gzip file", id="corrupt end"),
        pytest.param(None, "cannot be read (No such file or directory)", id="missing"),
    ],
)
def test_damaged_file_has_no_checksum(tmp_path: Path, stored: bytes | None, fault: str):
    """The error distinguishes truncated from corrupt files."""
    path = tmp_path / "file.gz"
    if stored is not None:
        path.write_bytes(stored)

    with pytest.raises(InputError) as caught:
        sha256_of(path)

    assert str(caught.value).startswith(f"data_dir contains {path}, which {fault}")
    assert str(caught.value).endswith("replace it, or remove it to download the published file.")
