"""Images behind web addresses: only what the job names is asked, on a real server on this machine."""

from __future__ import annotations

import contextlib
import io
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipelines import web
from pipelines.errors import JobError, StorageError
from pipelines.inputs import Loader
from pipelines.job import parse_job
from pipelines.loading import _image
from pipelines.planner import check
from pipelines.web import NotFetched, Refused, fetch_url, permitted
from tests.conftest import free_port

LIMIT = 1 << 20


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (7, 40, 90)).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class Server:
    port: int
    seen: list[str] = field(default_factory=list)
    failures: int = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def fetch(self, path: str, *allow_hosts: str) -> bytes:
        return fetch_url(self.url(path), [self.host, *allow_hosts], LIMIT)


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.seen.append(self.path)
            name = self.path.split("?")[0]
            if name.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path[4:])
                self.end_headers()
            elif name.startswith("/status/"):
                self.send_response(int(name[8:]))
                self.end_headers()
            elif name == "/later" and server.failures > 0:
                server.failures -= 1
                self.send_response(503)
                self.end_headers()
            elif name == "/speech":
                self.wfile.write(b"\x1b[31mOH\x07 NO\r\n")
            elif name == "/drip":
                self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Long: ")
                for _ in range(300):
                    time.sleep(0.1)
                    self.wfile.write(b"x")
                    self.wfile.flush()
            else:
                body = b"x" * (2 * LIMIT) if name.startswith("/huge") else b"<html>" if name == "/page.jpg" else png()
                self.send_response(200)
                if name == "/short":
                    self.send_header("Content-Length", str(len(body) + 9))
                elif name != "/huge-untold":
                    self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Type", "text/plain")
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle()

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(served.server_port)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield server
    served.shutdown()
    served.server_close()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    running.seen.clear()
    monkeypatch.setattr(web, "ATTEMPTS", 3)
    return running


def job(out: Path, model: Path, image: str, **source: Any) -> Any:
    stage = {"op": "img2img", "model": str(model), "prompt": "x", "num_inference_steps": 4}
    source = {"rows": [{"image": image}], **source}
    return parse_job(yaml.safe_dump({"source": source, "stages": [stage], "sink": {"path": str(out)}}))


def test_no_web_address_is_asked_unless_the_job_names_its_host(
    tiny_model: Path, tmp_path: Path, server: Server
) -> None:
    with pytest.raises(JobError, match=rf"row 1: image .* source.allow_hosts: \['127.0.0.1:{server.port}'\]; or copy"):
        check(job(tmp_path, tiny_model, server.url("/a.png")))
    planned = check(job(tmp_path, tiny_model, server.url("/a.png"), allow_hosts=[server.host]))
    assert planned.table is not None
    # Planning asks no server: the URL is the version.
    assert (planned.table["image_version"].to_pylist(), server.seen) == ([server.url("/a.png")], [])
    row = planned.table.to_pylist()[0]
    loader = Loader(frozenset({"image"}), None, 8, "#ffffff", {}, allow_hosts=(server.host,))
    (loaded,) = loader([row])
    assert np.array_equal(loaded.image[0, 0], (7, 40, 90))
    (refused,) = Loader(frozenset({"image"}), None, 8, "#ffffff", {})([row])
    assert refused.kind == "image.refused"


def test_a_relative_path_beside_a_table_on_the_web_is_a_web_address_too(tiny_model: Path, tmp_path: Path) -> None:
    from pipelines.references import BadReference, References

    with pytest.raises(BadReference, match="asked only where the job names it"):
        References({}).locate("https://example.com/tables", "a.png")


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("http://example.com/a", ["example.com"]),
        ("https://EXAMPLE.com./a", ["example.com"]),
        ("https://a.example.org/x", ["*.example.org"]),
        ("https://a.b.example.org/x", ["*.EXAMPLE.org"]),
        ("https://example.com:8443/x", ["example.com:8443"]),
        ("http://[::1]:8000/x", ["[::1]:8000"]),
        ("http://bücher.example/x", ["xn--bcher-kva.example"]),
    ],
)
def test_a_host_that_the_job_names_is_permitted(url: str, hosts: list[str]) -> None:
    assert permitted(url, hosts).startswith(url[:5])


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("http://example.org/a", ["*.example.org"]),
        ("http://badexample.org/a", ["*.example.org", "example.org"]),
        ("http://example.com.evil.net/a", ["example.com"]),
        ("http://example.com@127.0.0.1/a", ["example.com"]),
        ("http://example.com:x@example.com/", ["example.com"]),
        ("http://example.com\\@evil.net/", ["example.com"]),
        ("http://example.com/a\r\nX: y", ["example.com"]),
        ("http://example.com:22/a", ["example.com"]),
        ("http://example.com:99999/a", ["example.com"]),
        ("http://127.0.0.1/a", ["*.0.0.1"]),
        ("http://[::1/a", ["example.com"]),
        ("http:///a", ["example.com"]),
        ("ftp://example.com/a", ["example.com"]),
    ],
)
def test_anything_else_is_refused(url: str, hosts: list[str]) -> None:
    with pytest.raises(Refused):
        permitted(url, hosts)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("localhost", None),
        ("2130706433", None),
        ("127.1", None),
        ("inside.example", "10.0.0.7"),
        ("inside.example", "192.168.1.1"),
        ("inside.example", "169.254.169.254"),
        ("inside.example", "100.64.0.1"),
        ("inside.example", "0.0.0.0"),
        ("inside.example", "224.0.0.1"),
        ("inside.example", "::1"),
        ("inside.example", "fd00::1"),
        ("inside.example", "fe80::1%eth0"),
        ("inside.example", "::ffff:127.0.0.1"),
        ("inside.example", "64:ff9b::7f00:1"),
        ("inside.example", "2002:7f00:1::"),
    ],
)
def test_a_name_for_an_address_that_is_not_public_is_refused_whoever_names_it(
    server: Server, monkeypatch: pytest.MonkeyPatch, name: str, address: str | None
) -> None:
    if address is not None:
        # The public one before it does not help.
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in ("93.184.215.14", address)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: found)
    with pytest.raises(NotFetched, match="is no public address; to allow it, give") as caught:
        fetch_url(f"http://{name}:{server.port}/a.png", [f"{name}:{server.port}"], LIMIT)
    assert (caught.value.kind, server.seen) == ("image.refused", [])


def test_a_name_is_looked_up_once_and_what_it_meant_then_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["93.184.215.14", "127.0.0.1", "127.0.0.1", "127.0.0.1"])
    asked: list[str] = []
    connected: list[Any] = []

    def look_up(host: str, *rest: Any, **named: Any) -> Any:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), 0))]

    def connect(address: Any, *rest: Any, **named: Any) -> Any:
        connected.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(web, "ATTEMPTS", 1)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(StorageError, match="not reached after 1 tries"):
        fetch_url("http://rebinds.example/a.png", ["rebinds.example"], LIMIT)
    assert (asked, connected) == (["rebinds.example"], [("93.184.215.14", 80)])


def test_a_redirect_is_followed_within_the_named_hosts_and_never_out_of_them(server: Server) -> None:
    assert server.fetch("/to//a.png") == png()
    assert server.fetch(f"/to/{server.url('/to//b.png?x=1')}") == png()
    server.seen.clear()
    for target in (
        "http://169.254.169.254/latest/meta-data",
        f"http://localhost:{server.port}/a.png",
        "file:///etc/passwd",
    ):
        with pytest.raises(NotFetched, match="redirects to") as caught:
            server.fetch(f"/to/{target}")
        assert caught.value.kind == "image.refused"
    # A name that the job allows must still be public.
    with pytest.raises(NotFetched, match="is at .*, which is no public address"):
        server.fetch(f"/to/http://localhost:{server.port}/a.png", f"localhost:{server.port}")
    assert all(path.startswith("/to/") for path in server.seen)
    with pytest.raises(NotFetched, match="more than 5 redirects"):
        server.fetch("/to/" * 7)


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("/status/404", "image.missing", "HTTP 404"),
        ("/status/410", "image.missing", "HTTP 410"),
        ("/status/403", "image.refused", "HTTP 403"),
        ("/status/500", "image.unavailable", "HTTP 500, 3 times"),
        ("/status/429", "image.unavailable", "HTTP 429, 3 times"),
        ("/huge", "image.too_large", "more than 1 MiB"),
        ("/huge-untold", "image.too_large", "more than 1 MiB"),
        ("/short", "image.unavailable", "no whole answer"),
    ],
)
def test_an_answer_without_an_image_is_its_rows_fault(server: Server, path: str, kind: str, message: str) -> None:
    with pytest.raises(NotFetched, match=message) as caught:
        server.fetch(path)
    assert caught.value.kind == kind
    assert len(server.seen) == (3 if kind == "image.unavailable" else 1)


def test_a_message_tells_how_often_a_server_was_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "ATTEMPTS", 50)
    monkeypatch.setattr(web, "DEADLINE_S", 0.5)
    with pytest.raises(NotFetched, match="HTTP 500, [0-9]+ times") as caught:
        server.fetch("/status/500")
    assert str(caught.value) == f"HTTP 500, {len(server.seen)} times"


def test_what_a_server_says_reaches_nobody_but_as_one_plain_line(server: Server) -> None:
    loader = Loader(frozenset({"image"}), None, 8, "#ffffff", {}, allow_hosts=(server.host,))
    row = dict.fromkeys(("height", "width", "image_version")) | {"image": server.url("/speech")}
    (bad,) = loader([row])
    said = _image(bad)["error_message"]
    assert said.endswith("no whole answer ( [31mOH NO ), 3 times")


def test_a_server_that_recovers_is_asked_again(server: Server) -> None:
    server.failures = 2
    assert server.fetch("/later") == png()
    assert server.seen == ["/later"] * 3


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """One that nobody has signed, for 127.0.0.1."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    return tmp_path / "cert.pem", tmp_path / "key.pem"


def test_https_needs_a_certificate_that_holds(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"fine " + self.headers["Host"].encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.socket = context.wrap_socket(served.socket, server_side=True)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{served.server_port}"
    with pytest.raises(NotFetched, match="its certificate does not hold") as caught:
        fetch_url(f"https://{host}/a", [host], LIMIT)
    assert caught.value.kind == "image.refused"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    assert fetch_url(f"https://{host}/a", [host], LIMIT) == f"fine {host}".encode()
    served.shutdown()
    served.server_close()


def test_a_server_that_drips_is_left_when_the_time_is_over(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "DEADLINE_S", 1.0)
    start = time.monotonic()
    with pytest.raises(NotFetched, match="took more than 1 s"):
        server.fetch("/drip")
    assert time.monotonic() - start < 10


def test_no_server_at_all_stops_the_job_and_is_no_rows_fault(server: Server) -> None:
    with pytest.raises(StorageError, match="not reached after 3 tries"):
        fetch_url(f"http://127.0.0.1:{(port := free_port())}/a.png", [f"127.0.0.1:{port}"], LIMIT)


def test_the_kind_of_an_image_is_told_by_its_content(server: Server) -> None:
    rows = [{"image": server.url(p), "height": None, "width": None, "image_version": None} for p in ("/a", "/page.jpg")]
    fine, page = Loader(frozenset({"image"}), None, 8, "#ffffff", {}, allow_hosts=(server.host,))(rows)
    assert (fine.image.shape, page.kind) == ((16, 24, 3), "image.format")


@pytest.mark.parametrize(
    "entry", ["*", "*.", "http://example.com", "example.com/a", "a b", "", "*.*.example.com", "a.com:0", "a.com:65536"]
)
def test_an_entry_that_names_no_host_is_refused(tiny_model: Path, tmp_path: Path, entry: str) -> None:
    with pytest.raises(JobError, match="source.allow_hosts: '.*' names no host; write example.com"):
        job(tmp_path, tiny_model, "a.png", allow_hosts=[entry])
