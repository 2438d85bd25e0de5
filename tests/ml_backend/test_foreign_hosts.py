"""Hosts outside Label Studio: which addresses may be asked, and that the one that was judged is the one that is asked.

Here the name service alone is a fake: nobody has a name whose address changes."""

import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest

from ml_backend.errors import SettingsError
from ml_backend.foreign_hosts import AllowedHosts, JudgingTransport, PrivateAddressError
from ml_backend.settings import Settings

Names = dict[str, list[str]]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """A name service: each look-up takes the first address, and the last one stays. Other names go to the real one."""
    table: Names = {}
    real = socket.getaddrinfo

    def look_up(host: str, *arguments: Any, **options: Any) -> Any:
        if host not in table:
            return real(host, *arguments, **options)
        answers = table[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [answer for one in found.split() for answer in real(one, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return table


class Server:
    """Answers with the `Host` that it was asked for."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Keeps the test output clean."""

            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(self.headers["Host"].encode())

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def get(url: str, allowed: str = "") -> str:
    with httpx.Client(transport=JudgingTransport(AllowedHosts.parse(allowed)), timeout=5) as client:
        return client.get(url).text


# Which addresses


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
        "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "::1", "::",
        "fe80::1", "fe80::1%2", "fc00::1", "fd12:3456::1", "ff02::1", "::ffff:169.254.169.254", "::ffff:10.0.0.1",
        "::127.0.0.1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "64:ff9b::a9fe:a9fe", "64:ff9b::10.0.0.1", "2001:db8::1",
        "2001:0:7f00:1::",
    ],
)  # fmt: skip
def test_no_private_or_special_address_may_be_asked(address: str) -> None:
    assert not AllowedHosts().allows(ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"])
def test_public_addresses_may_be_asked(address: str) -> None:
    assert AllowedHosts().allows(ip_address(address))


@pytest.mark.parametrize(
    ("allowed", "address", "expected"),
    [
        ("10.0.0.0/8", "10.20.30.40", True), ("10.0.0.0/8", "192.168.0.1", False),
        ("10.0.0.5", "10.0.0.5", True), ("10.0.0.5", "10.0.0.6", False), ("fd00::/8", "fd12::1", True),
        ("10.0.0.0/8", "::ffff:10.0.0.1", True), ("::1", "::1", True), ("[::1]", "::1", True),
        ("::1", "127.0.0.1", False), ("images.example", "10.0.0.1", False),
    ],
)  # fmt: skip
def test_a_network_that_is_allowed_opens_its_addresses_alone(allowed: str, address: str, expected: bool) -> None:
    assert AllowedHosts.parse(allowed).allows(ip_address(address)) is expected


@pytest.mark.parametrize(
    ("allowed", "host", "expected"),
    [
        ("minio.local", "minio.local", True), ("minio.local", "MINIO.local.", True),
        ("MinIO.local.", "minio.local", True), ("minio.local", "evil-minio.local", False),
        ("minio.local", "a.minio.local", False), ("minio.local", "minio.local.evil.com", False),
        ("*.hospital.example", "pacs.hospital.example", True), ("*.hospital.example", "hospital.example", False),
        ("*.hospital.example", "evilhospital.example", False), ("a, b ,,", "b", True),
        ("bücher.example", "bücher.example", True), ("xn--bcher-kva.example", "bücher.example", True),
        ("", "", False), ("", "anything", False),
    ],
)  # fmt: skip
def test_a_name_that_is_allowed_is_exactly_that_name(allowed: str, host: str, expected: bool) -> None:
    assert AllowedHosts.parse(allowed).has_name(host) is expected


@pytest.mark.parametrize(
    "hosts",
    ["http://minio.local", "minio.local:9000", "minio.local/x", "a b", "*", "*.", "a.*.b", "u@minio", "10.0.0.0/99"],
)
def test_what_is_no_host_is_refused_in_the_setting(hosts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSP_ALLOWED_IMAGE_HOSTS", hosts)
    with pytest.raises(SettingsError, match=r"TSP_ALLOWED_IMAGE_HOSTS: expected host names, \*\.domain"):
        Settings.from_environment()


# How they are asked


@pytest.mark.parametrize(
    "host",
["localhost", "LOCALHOST", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.1", "[::1]", "[::ffff:127.0.0.1]",
     "[::ffff:7f00:1]", "169.254.169.254", "2852039166", "0xa9fea9fe", "0xa9.0xfe.0xa9.0xfe", "0"],
)  # fmt: skip
def test_every_spelling_of_a_private_address_is_seen_through(host: str, server: Server) -> None:
    with pytest.raises(PrivateAddressError):
        get(f"http://{host}:{server.port}/")


@pytest.mark.parametrize("host", ["0177.0.0.1", "0251.0376.0251.0376", "127.0.0.1.", "127.0.0.0x1", "1.2.3.4.5"])
def test_what_is_no_address_is_not_asked(host: str, server: Server) -> None:
    with pytest.raises((httpx.InvalidURL, httpx.ConnectError, PrivateAddressError)):
        get(f"http://{host}:{server.port}/")


def test_a_name_with_private_addresses_is_asked_if_that_is_allowed(names: Names, server: Server) -> None:
    names["images.example"] = ["127.0.0.1"]
    with pytest.raises(PrivateAddressError, match=r"127\.0\.0\.1"):
        get(f"http://images.example:{server.port}/")
    assert get(f"http://images.example:{server.port}/", "127.0.0.0/8") == f"images.example:{server.port}"


def test_a_name_that_changes_its_address_after_it_was_judged_gains_nothing(names: Names, server: Server) -> None:
    names["images.example"] = ["127.0.0.1", "127.0.0.2"]  # nobody listens at the second
    assert get(f"http://images.example:{server.port}/", "127.0.0.1") == f"images.example:{server.port}"
    with pytest.raises(PrivateAddressError, match=r"127\.0\.0\.2"):
        get(f"http://images.example:{server.port}/", "127.0.0.1")


def test_of_several_addresses_those_that_may_be_asked_are_tried_in_turn(names: Names, server: Server) -> None:
    names["images.example"] = ["10.0.0.1 127.0.0.3 127.0.0.1"]
    assert get(f"http://images.example:{server.port}/", "127.0.0.0/8") == f"images.example:{server.port}"


def test_an_unknown_name_is_an_error_of_the_connection() -> None:
    for host in ("no-such-host.invalid", "a" * 64 + ".example"):
        with pytest.raises(httpx.ConnectError, match="is not known"):
            get(f"http://{host}/")


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """Of images.example, signed by an authority that this process trusts."""
    key, own = tmp_path / "key.pem", tmp_path / "own.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", own, "-days", "2",
         "-subj", "/CN=images.example", "-addext", "subjectAltName=DNS:images.example"],
        check=True, capture_output=True,
    )  # fmt: skip
    monkeypatch.setenv("SSL_CERT_FILE", str(own))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own, key)
    return context


def test_the_certificate_must_be_that_of_the_name(names: Names, certificate: ssl.SSLContext) -> None:
    names |= {"images.example": ["127.0.0.1"], "other.example": ["127.0.0.1"]}
    with Server(certificate) as server:
        assert get(f"https://images.example:{server.port}/", "127.0.0.1") == f"images.example:{server.port}"
        for host in ("other.example", "127.0.0.1"):
            with pytest.raises(httpx.ConnectError, match="certificate"):
                get(f"https://{host}:{server.port}/", "127.0.0.1")
