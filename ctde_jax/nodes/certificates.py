"""The certificates of a server, which prove to nodes that they talk to this server.

The server has an authority that signs its certificate, and nodes have a copy of the authority's
certificate, `ca.pem`. No other authority is involved.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ctde_jax.errors import InputError, quoted, writing_to
from ctde_jax.nodes.keys import load_private, new_key, private_bytes, write, write_private

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_VALID = datetime.timedelta(days=3650)


@dataclass(frozen=True)
class Certificates:
    """Files of a server's certificates, in PEM.

    Attributes:
        authority: Certificate of the authority; every node needs a copy.
        certificate: Certificate of the server, signed by the authority.
        key: Private key of the server, readable by its owner only.
    """

    authority: Path
    certificate: Path
    key: Path


def create_certificates(folder: Path, hosts: Sequence[str]) -> Certificates:
    """Creates an authority and the certificate of a server, or returns those that exist.

    The authority is created once; the certificate is created again if `hosts` has changed.

    Args:
        folder: Folder of the files `ca.pem`, `ca.key`, `server.pem` and `server.key`.
        hosts: Host names and IP addresses by which nodes reach the server. The names of loopback
            are always included.

    Raises:
        InputError: If a host is not a host name or an IP address, or if `folder` cannot be written
            to.
    """
    names = [_general_name(host) for host in dict.fromkeys([*hosts, *_LOOPBACK])]
    paths = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    with writing_to(folder, "folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if not (paths.authority.exists() and (folder / "ca.key").exists()):
            _create_authority(folder / "ca.key", paths.authority)
            paths.certificate.unlink(missing_ok=True)
        is_current = paths.key.exists() and paths.certificate.exists()
        if not (is_current and _names_of(paths.certificate) == names):
            _create_certificate(folder / "ca.key", names, paths)
    return paths


def _create_authority(key_path: Path, path: Path) -> None:
    from cryptography import x509

    key = new_key()
    is_authority = x509.BasicConstraints(ca=True, path_length=0)
    write_private(key_path, _private(key))
    write(path, _sign(_AUTHORITY, key, key, is_authority))


def _create_certificate(authority_key: Path, names: list, paths: Certificates) -> None:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    key = new_key()
    extensions = (
        x509.BasicConstraints(ca=False, path_length=None),
        x509.SubjectAlternativeName(names),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
    )
    content = _sign("ctde_jax server", key, load_private(authority_key), *extensions)
    write_private(paths.key, _private(key))
    write(paths.certificate, content)


_AUTHORITY = "ctde_jax authority"


def _sign(subject: str, key, authority_key, *extensions) -> bytes:
    """Returns a certificate in PEM for a key, signed by the key of the authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import NameOID

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(_AUTHORITY))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks of the machines may differ.
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + _VALID)
    )
    for extension in extensions:
        is_critical = isinstance(extension, x509.BasicConstraints)
        builder = builder.add_extension(extension, critical=is_critical)
    signed = builder.sign(authority_key, hashes.SHA384())
    return signed.public_bytes(serialization.Encoding.PEM)


def _private(key) -> bytes:
    from cryptography.hazmat.primitives.serialization import PrivateFormat

    return private_bytes(key, PrivateFormat.PKCS8)


def _names_of(path: Path) -> list:
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return list(alternatives.value)


def _general_name(host: str):
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host or not set(host.lower()) <= set("abcdefghijklmnopqrstuvwxyz0123456789-."):
        raise InputError("hosts", f"must be host names or IP addresses, got {quoted(host)}.")
    return x509.DNSName(host)
