"""Files that the user names: only regular ones are opened, as a pipe may block and a device may never end."""

import os
import stat
from io import BufferedReader
from pathlib import Path

_SMALL = 2**28
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path | str) -> BufferedReader:
    """Opens a regular file, or a link to one, for reading.

    Raises:
        OSError: The file cannot be opened, or is something else; `strerror` is the reason.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise OSError(None, f"it is {_KINDS.get(kind, 'something else')} and not a regular file", str(path))
    return open(path, "rb")


def read_small(path: Path | str) -> bytes:
    """Reads a regular file whose content is a description and not data.

    Raises:
        OSError: The file cannot be read, is not a regular one, or has more than 256 MiB.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _SMALL:
            raise OSError(None, f"it has more than {_SMALL:,} bytes", str(path))
        return file.read(size)  # with a limit, as files of the operating system may go on without end
