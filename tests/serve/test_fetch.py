"""Pictures from the web: never from this machine or its network, whatever name or redirect leads there."""

from __future__ import annotations

import asyncio
import http.server
import ipaddress
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from asking import picture, post
from hypothesis import given
from hypothesis import strategies as st

from pumice.serve.errors import ApiError
from pumice.serve.fetch import Address, Fetcher, is_public

PRIVATE = [
    "127.0.0.1", "127.8.9.10", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "0.0.0.0", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::", "::1", "fe80::1",
    "fc00::1",
    "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::", "2002:a00:1::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:db8::1", "fec0::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["93.184.215.14", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@given(st.ip_addresses(v=4))
def test_hiding_an_address_in_ipv6_gains_nothing(address: ipaddress.IPv4Address) -> None:
    mapped = ipaddress.IPv6Address(b"\0" * 10 + b"\xff\xff" + address.packed)
    if not is_public(address):
        assert not is_public(mapped)
        assert not is_public(
            ipaddress.IPv6Address(ipaddress.ip_address("64:ff9b::").packed[:12] + address.packed)
        )


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        site: Any = self.server
        site.seen.append((self.path, self.headers["Host"]))
        if self.path == "/slow":
            time.sleep(1)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        data = b"x" * 5000 if self.path == "/large" else picture()
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def begin(context: ssl.SSLContext | None = None) -> Any:
    site: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if context is not None:
        site.socket = context.wrap_socket(site.socket, server_side=True)
    site.seen = []
    threading.Thread(target=site.serve_forever, daemon=True).start()
    return site


@pytest.fixture(scope="module")
def site() -> Iterator[Any]:
    server = begin()
    yield server
    server.shutdown()
    server.server_close()


def fetch(
    url: str,
    names: dict[str, list[str]] | None = None,
    take: Callable[[int], None] = lambda _: None,
    **more: Any,
) -> tuple[bytes, list[str]]:
    """(what was fetched, the names that were resolved); the names' addresses are given."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return (names or {}).get(host, [host])

    async def run() -> bytes:
        fetcher = Fetcher(**{"size": 4000, "seconds": 5, "resolve": resolve, **more})
        try:
            return await fetcher.get(url, "field", take)
        finally:
            await fetcher.close()

    return asyncio.run(run()), asked


def only_loopback(address: Address) -> bool:
    """Stands for the public internet: this machine at one of its addresses."""
    return str(address) == "127.0.0.1"


def refused(url: str, names: dict[str, list[str]] | None = None, **more: Any) -> str:
    with pytest.raises(ApiError) as raised:
        fetch(url, names, **{"permitted": only_loopback, **more})
    assert (raised.value.status, raised.value.param) == (400, "field")
    return raised.value.message


def test_the_connection_goes_to_the_address_that_was_checked(site: Any) -> None:
    port = site.server_port
    data, asked = fetch(
        f"http://pictures.example:{port}/a.png", {"pictures.example": ["127.0.0.1"]}, permitted=only_loopback
    )
    assert data == picture()
    assert asked == ["pictures.example"]  # once: a second look could be told something else
    assert site.seen[-1] == ("/a.png", f"pictures.example:{port}")


def test_what_arrives_is_counted_before_it_is_kept(site: Any) -> None:
    url, counts = f"http://127.0.0.1:{site.server_port}/a.png", list[int]()
    fetch(url, take=counts.append, permitted=only_loopback)
    assert sum(counts) == len(picture())

    def no_room(count: int) -> None:
        raise ApiError(429, "ask again")

    with pytest.raises(ApiError, match="ask again"):
        fetch(url, take=no_room, permitted=only_loopback)


def test_names_that_lead_inside(site: Any) -> None:
    port = site.server_port
    for names in (["10.0.0.1"], ["127.0.0.1", "10.0.0.1"], ["::1"], ["::ffff:10.0.0.1"]):
        assert "not on the public internet" in refused(f"http://a.example:{port}/", {"a.example": names})
    assert "not on the public internet" in refused(f"http://127.0.0.1:{port}/", permitted=is_public)
    assert "without an address" in refused("http://a.example/", {"a.example": []})


def test_redirects_are_new_addresses(site: Any) -> None:
    base = f"http://127.0.0.1:{site.server_port}"
    assert fetch(f"{base}/to/{base}/a.png", permitted=only_loopback)[0] == picture()
    assert fetch(f"{base}/to//a.png", permitted=only_loopback)[0] == picture()
    before = len(site.seen)
    inside = f"http://inside.example:{site.server_port}/a.png"
    assert "public internet" in refused(f"{base}/to/{inside}", {"inside.example": ["127.0.0.2"]})
    assert len(site.seen) == before + 1
    assert "no http(s) address" in refused(f"{base}/to/file:///etc/passwd")
    assert "redirects more than 3" in refused(f"{base}/to/{base}/to/{base}/to/{base}/to/{base}/a.png")


def test_limits_of_size_and_time(site: Any) -> None:
    base = f"http://127.0.0.1:{site.server_port}"
    assert "larger than 4000 bytes" in refused(f"{base}/large")
    assert "within 0.2 s" in refused(f"{base}/slow", seconds=0.2)
    assert "status 404" in refused(f"{base}/missing")
    assert "user name" in refused(f"http://a:b@127.0.0.1:{site.server_port}/")
    assert "cannot be fetched" in refused("http://127.0.0.1:1/")
    for odd in ("http://", "http://[", "http://a b/", "http://xn--/", "http:///x"):
        refused(odd)


@pytest.mark.skipif(which("openssl") is None, reason="there is no openssl here")
def test_certificates_are_those_of_the_name(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate,
         "-days", "2", "-subj", "/CN=right.example", "-addext", "subjectAltName=DNS:right.example"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    secure = begin(context)
    tls_context = ssl.create_default_context(cafile=str(certificate))
    names = {"right.example": ["127.0.0.1"], "wrong.example": ["127.0.0.1"]}
    try:
        url = f"https://right.example:{secure.server_port}/a.png"
        assert fetch(url, names, permitted=only_loopback, verify=tls_context)[0] == picture()
        message = refused(f"https://wrong.example:{secure.server_port}/a.png", names, verify=tls_context)
        assert "cannot be fetched" in message
    finally:
        secure.shutdown()
        secure.server_close()


def test_the_server_fetches_only_where_it_is_allowed(local: Callable[..., Any], site: Any) -> None:
    part = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{site.server_port}/a.png"}}
    body = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]}
    before = len(site.seen)
    with local(allow_image_urls=True) as url:
        response = post(url, body)
        assert response.status_code == 400
        assert "not on the public internet" in response.json()["error"]["message"]
        assert response.json()["error"]["param"] == "messages.0.content.0.image_url"
    assert len(site.seen) == before
