"""Key pairs of nodes, and the list of nodes that a server accepts.

Each node has a key pair, and the server has a file with one public key a line, in the format of
OpenSSH's `authorized_keys`. The keys are those that Flower's SuperNode reads: ECDSA on the curve
P-384. The fingerprint of the key is the identity of a node, whatever its address.
"""

import hashlib
import ipaddress
import os
from base64 import b64decode, b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ctde_jax.errors import InputError, quoted, writing_to

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import PrivateFormat


@dataclass(frozen=True)
class PublicKey:
    """Public key of a node.

    Attributes:
        line: The key as one line of OpenSSH, without a comment.
        name: Name of the node: the comment of the line, or "".
    """

    line: str
    name: str

    @property
    def identity(self) -> str:
        """Fingerprint as `ssh-keygen -l` prints it: `SHA256:` and 43 characters."""
        digest = hashlib.sha256(b64decode(self.line.split()[1])).digest()
        return "SHA256:" + b64encode(digest).decode().rstrip("=")

    @property
    def pem(self) -> bytes:
        """The key as Flower stores it: a SubjectPublicKeyInfo in PEM."""
        from cryptography.hazmat.primitives import serialization

        return serialization.load_ssh_public_key(self.line.encode()).public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )


def create_node_key(folder: Path, name: str) -> PublicKey:
    """Creates the key pair of a node, or returns the public key of the one that exists.

    Args:
        folder: Folder of the node; `node.key` is the private key, mode 0600, and `node.pub` the
            line for the server's list of keys.
        name: Name of the node in the server's reports, without spaces.

    Raises:
        InputError: If `name` is empty or has spaces, or if `folder` cannot be written to.
    """
    from cryptography.hazmat.primitives.serialization import PrivateFormat

    if name.split() != [name] or not name.isprintable():
        raise InputError("name", f"must be a word without spaces, got {quoted(name)}.")
    with writing_to(folder, "folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "node.key").exists():
            write_private(folder / "node.key", private_bytes(new_key(), PrivateFormat.OpenSSH))
        public = PublicKey(_line_of(load_node_key(folder).public_key()), name)
        write(folder / "node.pub", f"{public.line} {name}\n".encode())
    return public


def load_node_key(folder: Path) -> "EllipticCurvePrivateKey":
    """Reads the private key of a node.

    Raises:
        InputError: If `folder/node.key` is missing, or not a private key of `create_node_key`.
    """
    try:
        return load_private(folder / "node.key")
    except (OSError, ValueError) as error:
        raise InputError(
            "folder", f"must have the private key node.key, got {quoted(str(error))}."
        ) from None


def read_allowed(path: Path) -> list[PublicKey]:
    """Reads a server's list of nodes: one public key a line; empty lines and `#` are comments.

    Args:
        path: The file, or a folder whose files `*.pub` are read.

    Raises:
        InputError: If the file is missing, or if a line is not an ECDSA key of OpenSSH.
    """
    files = sorted(path.glob("*.pub")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise InputError("allow", f"must be a file of public keys, got {quoted(str(path))}.")
    keys: dict[str, PublicKey] = {}
    for file in files:
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
            if line.strip() and not line.startswith("#"):
                key = _parse_line(line, f"line {number} of {file}")
                keys[key.identity] = key
    return list(keys.values())


def identity_of(pem: bytes) -> str:
    """Returns the fingerprint of a public key in PEM; see `PublicKey.identity`."""
    from cryptography.hazmat.primitives import serialization

    return PublicKey(_line_of(serialization.load_pem_public_key(pem)), "").identity


def check_insecure(insecure: bool, host: str) -> None:
    """Raises InputError if a connection without TLS would leave the machine.

    Args:
        insecure: Whether the connection has neither TLS nor authentication.
        host: Host name or IP address that is listened on or connected to.
    """
    if insecure and not _is_loopback(host):
        raise InputError(
            "insecure",
            f"is allowed on loopback only, such as 127.0.0.1, got the host {quoted(host)}; "
            "leave it out to use TLS.",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _parse_line(line: str, where: str) -> PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    words = line.split(maxsplit=2)
    try:
        key = serialization.load_ssh_public_key(" ".join(words[:2]).encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePublicKey):
        raise InputError(
            "allow",
            f"must have lines of node.pub files, which start with ecdsa-sha2-nistp384, got "
            f"{quoted(line)} in {where}.",
        )
    return PublicKey(" ".join(words[:2]), words[2].strip() if len(words) > 2 else "")


def _line_of(key) -> str:
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ).decode()


def new_key() -> "EllipticCurvePrivateKey":
    """Returns a new private key."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def private_bytes(key: "EllipticCurvePrivateKey", form: "PrivateFormat") -> bytes:
    """Returns a private key in PEM, not encrypted."""
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def load_private(path: Path) -> "EllipticCurvePrivateKey":
    """Reads a private key in PEM; raises OSError or ValueError."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    content = path.read_bytes()
    is_ssh = b"OPENSSH" in content
    load = serialization.load_ssh_private_key if is_ssh else serialization.load_pem_private_key
    key = load(content, None)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ValueError(f"{path} is not a key on an elliptic curve")
    return key


def write_private(path: Path, content: bytes) -> None:
    """Writes a file that only its owner may read, whole or not at all."""
    write(path, content, 0o600)


def write(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(temporary, flags, mode), "wb") as file:
        file.write(content)
    temporary.replace(path)
