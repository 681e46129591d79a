"""Keys and certificates: created once, private, and checked before a connection is made."""

import shutil
import ssl
import subprocess

import pytest

from ctde_jax.errors import InputError
from ctde_jax.nodes import certificates, keys

pytest.importorskip("cryptography")


def test_private_keys_are_readable_by_their_owner_only(tmp_path):
    certificates.create_certificates(tmp_path, [])
    keys.create_node_key(tmp_path, "north")
    for name in ("ca.key", "server.key", "node.key"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


def test_key_is_created_once(tmp_path):
    assert keys.create_node_key(tmp_path, "a") == keys.create_node_key(tmp_path, "a")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_identity_is_the_fingerprint_of_ssh_keygen(tmp_path):
    public = keys.create_node_key(tmp_path, "north")
    command = ["ssh-keygen", "-l", "-f", tmp_path / "node.pub"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.split()[1:3] == [public.identity, "north"]
    assert keys.identity_of(public.pem) == public.identity


def test_list_of_nodes_is_read_from_lines_or_from_a_folder(tmp_path):
    nodes = [keys.create_node_key(tmp_path / name, name) for name in ("north", "south")]
    (tmp_path / "all").mkdir()
    for node in nodes:
        shutil.copy(tmp_path / node.name / "node.pub", tmp_path / "all" / f"{node.name}.pub")
    lines = [path.read_text() for path in sorted((tmp_path / "all").iterdir())]
    (tmp_path / "allowed").write_text("# hospitals\n\n" + "".join(lines))
    assert keys.read_allowed(tmp_path / "allowed") == nodes
    assert keys.read_allowed(tmp_path / "all") == nodes


@pytest.mark.parametrize("line", ["ssh-ed25519 AAAA north", "north", "\x00\xff"])
def test_list_of_nodes_has_keys_only(tmp_path, line):
    (tmp_path / "allowed").write_text(f"\n{line}\n")
    with pytest.raises(InputError, match=r"allow must have lines .* in line 2"):
        keys.read_allowed(tmp_path / "allowed")


def test_list_of_nodes_must_exist(tmp_path):
    with pytest.raises(InputError, match="allow must be a file of public keys"):
        keys.read_allowed(tmp_path / "allowed")


@pytest.mark.parametrize("name", ["", "two words", "line\n"])
def test_name_of_a_node_is_a_word(tmp_path, name):
    with pytest.raises(InputError, match="name must be a word"):
        keys.create_node_key(tmp_path, name)


def test_node_needs_its_private_key(tmp_path):
    (tmp_path / "node.key").write_text("no key")
    with pytest.raises(InputError, match="folder must have the private key"):
        keys.load_node_key(tmp_path)


def test_authority_stays_when_the_names_of_the_server_change(tmp_path):
    paths = certificates.create_certificates(tmp_path, ["a.example"])
    authority = paths.authority.read_bytes()
    first = paths.certificate.read_bytes()
    certificates.create_certificates(tmp_path, ["a.example"])
    assert paths.certificate.read_bytes() == first
    certificates.create_certificates(tmp_path, ["a.example", "10.0.0.1"])
    assert paths.authority.read_bytes() == authority
    assert paths.certificate.read_bytes() != first
    # The key fits the certificate, and the authority can be loaded.
    ssl.create_default_context(cafile=paths.authority)
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(paths.certificate, paths.key)


@pytest.mark.parametrize("host", ["", "a b", "https://a.example"])
def test_certificate_is_for_hosts(tmp_path, host):
    with pytest.raises(InputError, match="hosts must be host names or IP addresses"):
        certificates.create_certificates(tmp_path, [host])


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]"])
def test_loopback_may_be_insecure(host):
    keys.check_insecure(True, host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "a.example", "", "localhost.a"])
def test_other_machines_need_tls(host):
    keys.check_insecure(False, host)
    with pytest.raises(InputError, match="insecure is allowed on loopback only"):
        keys.check_insecure(True, host)
